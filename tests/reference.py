"""The method as the paper writes it: slow, in float64, and plain enough to be checked by reading.

What the package computes in batches, with caches, shards and sums must agree with this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Answer(NamedTuple):
    """One step of one sequence."""

    weights: list[float]
    loss: float
    logprobs: Tensor
    """[V]: of the fused distribution."""
    kl: tuple[float, float]
    """KL(fused || large) and KL(large || fused)."""
    table: list[list[float]]
    """The loss of every candidate [direction][k]; `paper` has one direction per expert."""
    pulls: list[float]
    """[T]: how far each expert is from the base, what `strongest` and `blend` go by."""


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of two vectors of log-probabilities."""
    return float((p.exp() * (p - q)).sum())


def fuse(
    large: Tensor,  # [V]
    base: Tensor,  # [V]
    experts: Tensor | Sequence[Tensor],  # [T, V]
    *,
    rule: str = "grid",
    select: str = "paper",
    step: float = 0.1,
    bounds: Sequence[tuple[float, float]] | None = None,
    weights: Sequence[float] | None = None,
) -> Answer:
    large, base, experts = large.double(), base.double(), [x.double() for x in experts]
    softmax, count = torch.nn.functional.log_softmax, len(experts)
    p, q = softmax(large, -1), softmax(base, -1)
    if not count:
        return Answer([], 0.0, p, (0.0, 0.0), [], [])
    limits = [(0.0, 2.0)] * count if bounds is None else list(bounds)
    shifts = [x - base for x in experts]
    targets = [(kl(softmax(x, -1), q), kl(q, softmax(x, -1))) for x in experts]
    pulls = [sum(target) for target in targets]
    alone = torch.eye(count).tolist()
    strongest = pulls.index(max(pulls))

    if rule not in ("grid", "exact"):
        fixed = {"entropy": entropy, "consistency": consistency}
        given = [1.0] * count if weights is None else list(weights)
        directions = [fixed[rule](experts) if rule in fixed else given]
        limits = [(1.0, 1.0)]
    elif select == "paper":
        directions = alone
    elif select == "strongest":
        directions, targets = [alone[strongest]], [targets[strongest]]
        limits = [limits[strongest]]
    else:
        total = sum(pulls)
        directions = [[pull / total if total > 0 else 1 / count for pull in pulls]]
        joint = softmax(base + mixed(directions[0], shifts), -1)
        targets = [(kl(joint, q), kl(q, joint))]

    best: Answer | None = None
    table: list[list[float]] = []
    for direction, (low, high) in zip(directions, limits, strict=False):
        table.append([])
        for k in range(int((high - low) / step + 1e-6) + 1):
            alpha = low + k * step
            fused = softmax(large + alpha * mixed(direction, shifts), -1)
            f, g = kl(fused, p), kl(p, fused)
            loss = sum((f - f_aim) ** 2 + (g - g_aim) ** 2 for f_aim, g_aim in targets)
            table[-1].append(loss)
            if best is None or loss < best.loss:
                own = [alpha * part for part in direction]
                best = Answer(own, loss, fused, (f, g), table, pulls)
    assert best is not None
    return best


def entropy(experts: Sequence[Tensor]) -> list[float]:
    """Experts weighed by the inverse entropy of their distributions."""
    sure = [1 / max(1e-6, -float((x.softmax(-1) * x.log_softmax(-1)).sum())) for x in experts]
    return [each / sum(sure) for each in sure]


def consistency(experts: Sequence[Tensor]) -> list[float]:
    """CoRE: how near each expert's ten best tokens are to the mean of all, over its entropy."""
    probs: list[dict[int, float]] = []
    for x in experts:
        tenth = sorted(x.tolist())[-10:][0]
        best = [token for token, logit in enumerate(x.tolist()) if logit >= tenth]
        probs.append(dict(zip(best, x[best].softmax(-1).tolist(), strict=True)))
    considered = {token for each in probs for token in each}
    scores = []
    for each in probs:
        agreement = 0.0
        for token in considered:
            mean = sum(other.get(token, 0.0) for other in probs) / len(probs)
            near = math.exp(-2 * abs(each.get(token, 0.0) - mean))
            agreement += (near - math.exp(-2)) / (1 - math.exp(-2))
        scores.append(agreement / max(1e-6, -sum(p * math.log(p) for p in each.values())))
    return [score / sum(scores) for score in scores]


def mixed(parts: Sequence[float], shifts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part * shift for part, shift in zip(parts, shifts, strict=True)]).sum(0)


class Decoded(NamedTuple):
    tokens: list[int]
    steps: list[Answer]
    """One per token."""


@torch.no_grad()
def greedy(
    large: Any,
    base: Any,
    experts: Sequence[Any],
    prompts: Sequence[int] | Sequence[Sequence[int]],
    length: int,
    *,
    vocab: int | None = None,
    **how: Any,
) -> Decoded:
    """Decodes `length` tokens with Hugging Face models, all of them over all tokens at each step.

    `prompts` is one prompt of token ids, or one for each of large, base, *experts. `vocab` cuts the
    logits. `how` goes to `fuse`.
    """
    models = [large, base, *experts]
    texts: list[Any] = [prompts] * len(models) if isinstance(prompts[0], int) else list(prompts)
    tokens: list[int] = []
    steps = []
    for _ in range(length):
        logits = [
            model(input_ids=torch.tensor([[*text, *tokens]]), use_cache=False).logits[0, -1, :vocab]
            for model, text in zip(models, texts, strict=True)
        ]
        steps.append(fuse(logits[0], logits[1], logits[2:], **how))
        tokens.append(int(steps[-1].logprobs.argmax()))
    return Decoded(tokens, steps)
