"""From a fused distribution to a token.

Randomness is a pure function of (seed, position): a request draws the same tokens whatever else is
in its batch, and again after a crash, since no generator state has to survive.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dlf_ray.messages import SamplingParams


def uniform(seed: int, position: int) -> float:
    """One draw from [0, 1) for a position of a sequence (Philox, a counter-based generator)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], draws: Sequence[float]
) -> list[int]:
    """A token per row of `logits` [R, V], by the row's own parameters and draw from [0, 1).

    Temperature first, then top-k, then top-p over what is left, as Hugging Face and vLLM do.
    """
    tokens: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, each in enumerate(params) if each.temperature > 0]
    if drawn:
        chosen = [params[row] for row in drawn]

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

        probs, ids = filtered(
            logits[drawn],
            temperature=column([each.temperature for each in chosen]),
            top_k=column([each.top_k or logits.shape[-1] for each in chosen]),
            top_p=column([each.top_p for each in chosen]),
        )
        # Inverse of the cumulative distribution, unnormalised, at the row's draw.
        cumulative = probs.cumsum(-1)
        point = column([draws[row] for row in drawn]) * cumulative[:, -1:]
        at = torch.searchsorted(cumulative, point, right=True)
        at = torch.minimum(at, (probs > 0).sum(-1, keepdim=True) - 1)
        for row, token in zip(drawn, ids.gather(-1, at)[:, 0].tolist(), strict=True):
            tokens[row] = token
    return tokens


def filtered(
    logits: torch.Tensor, *, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [R, V] in descending order, 0 for what is cut, and their token ids [R, V].

    `temperature`, `top_k` and `top_p` are [R, 1]. At least one token of each row stays.
    """
    ordered, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    probs = torch.softmax((ordered / temperature).masked_fill(rank >= top_k, -torch.inf), -1)
    before = probs.cumsum(-1) - probs  # the mass of everything more probable
    return probs.masked_fill((before >= top_p) & (rank > 0), 0.0), ids
