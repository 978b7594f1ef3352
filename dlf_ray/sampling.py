"""From a fused distribution to a token.

Randomness is a pure function of (seed, position): a request draws the same tokens whatever else is
in its batch, and again after a crash, since no generator state has to survive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from dlf_ray.messages import SamplingParams


def uniform(seed: int, position: int) -> float:
    """One draw from [0, 1) for a position of a sequence (Philox, a counter-based generator)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def penalised(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    generated: Sequence[Sequence[int]],
    end_tokens: Sequence[int],
) -> torch.Tensor:
    """Logits [R, V] with each row's penalties, biases and minimum length, as vLLM applies them.

    The repetition penalty (Keskar et al. 2019) is for tokens of prompt or answer, the presence and
    frequency penalties (OpenAI's) for those of the answer; then the biases. `end_tokens` cannot be
    drawn before `min_tokens`, nor the row's own stop tokens. A new tensor where anything changes.
    """
    changed = None
    for row, (each, prompt, answer) in enumerate(zip(params, prompts, generated, strict=True)):
        counted = each.presence_penalty or each.frequency_penalty
        barred = len(answer) < each.min_tokens
        if not (counted or each.repetition_penalty != 1 or each.logit_bias or barred):
            continue
        if changed is None:
            changed = logits.clone()
        own = changed[row]

        def ids(tokens: Iterable[int]) -> torch.Tensor:
            return torch.tensor(list(tokens), dtype=torch.long, device=logits.device)

        if each.repetition_penalty != 1:
            seen = ids({*prompt, *answer})
            held = own[seen]
            factor = each.repetition_penalty
            own[seen] = torch.where(held > 0, held / factor, held * factor)
        if counted:
            counts = torch.bincount(ids(answer), minlength=len(own)).to(own.dtype)
            own -= each.frequency_penalty * counts + each.presence_penalty * (counts > 0)
        if each.logit_bias:
            own[ids(each.logit_bias)] += own.new_tensor(list(each.logit_bias.values()))
        if barred:
            ends = ids({*(() if each.ignore_eos else end_tokens), *each.stop_token_ids})
            own[ends] = -torch.inf
    return logits if changed is None else changed


def top_logprobs(logprobs: torch.Tensor, counts: Sequence[int]) -> list[list[tuple[int, float]]]:
    """For each row of log-probabilities [R, V], its `counts[row]` highest with their tokens."""
    if not (most := max(counts, default=0)):
        return [[] for _ in counts]
    values, ids = logprobs.topk(min(most, logprobs.shape[-1]), dim=-1)
    return [
        list(zip(row_ids[:count], row_values[:count], strict=True))
        for row_ids, row_values, count in zip(ids.tolist(), values.tolist(), counts, strict=True)
    ]


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], draws: Sequence[float]
) -> list[int]:
    """A token per row of `logits` [R, V], by the row's own parameters and draw from [0, 1).

    Temperature first, then min-p, top-k, and top-p over what is left, as vLLM does.
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
            min_p=column([each.min_p for each in chosen]),
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
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [R, V] in descending order, 0 for what is cut, and their token ids [R, V].

    The settings are [R, 1] each. At least one token of each row stays.
    """
    ordered, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    scaled = (ordered - ordered[:, :1]) / temperature  # the highest stays finite, however cold
    # A probability is min_p times the highest where its logit is log(min_p) from the highest.
    low = scaled < min_p.log()
    probs = torch.softmax(scaled.masked_fill((rank >= top_k) | low, -torch.inf), -1)
    before = probs.cumsum(-1) - probs  # the mass of everything more probable
    return probs.masked_fill((before >= top_p) & (rank > 0), 0.0), ids
