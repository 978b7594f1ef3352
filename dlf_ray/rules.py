"""How experts are weighed: each rule and each way to select is a function and a row of a table.

The family file, requests, the command line, evaluation and the playground take their names from
these tables, and the README shows them. A rule either searches at each step for the weight of a
direction, which `SELECTS` proposes (`fusion` has the search), or has a function that gives the
weights of all experts from what the small models say. The rules that the paper does not have are
there to be compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

CONSIDERED = 10
"""The most probable tokens of an expert that `consistency` looks at, as in its paper's code."""
SHARPNESS = 2.0
"""How fast consistency falls with the distance of two probabilities, as in its paper's code."""
LEAST_ENTROPY = 1e-6
"""In nats: an expert that is certain weighs no more than this lets it."""


class Small(NamedTuple):
    """What the small models say of R rows, in float32."""

    experts: Sequence[Tensor]
    """T of [R, V]: their logits, as they came."""
    shifts: Tensor
    """[T, R, V]: expert minus base logits, up to a constant."""
    distances: Tensor
    """[2, T, R], nats, float64: KL(expert || base), KL(base || expert)."""
    given: Tensor
    """[R, T]: the weights that requests give."""
    measure: Callable[[Tensor], Tensor]
    """The distances [2, D, R] of other shifts [D, R, V] from the base."""


class Aims(NamedTuple):
    """What the small models alone determine, while the large one is still computing.

    Matching T experts is matching the centroid of their divergences, up to a constant:
    `sum_s (f - f_s)^2 = T (f - mean f)^2 + sum_s (f_s - mean f)^2`. So there is one target.
    """

    shifts: Tensor
    """[D, R, V], float32: the directions to go from the large model, up to a constant."""
    parts: Tensor
    """[D, R, T]: the weights of the experts are `alpha` times these."""
    target: Tensor
    """[2, R], nats, float64: what KL(fused || large) and KL(large || fused) are to be."""
    experts: int
    """How many experts the target stands for."""
    spread: Tensor
    """[R], float64: the part of the loss that no weight can change."""
    searched: bool = True
    """Whether `alpha` is to be found; else it is 1."""
    joint: bool = False
    """Whether a direction has parts of several experts, whose bounds must be equal then."""


# Ways to select: the directions that compete, and their targets.


def paper(small: Small) -> Aims:
    """Every expert alone, against the divergences of all."""
    count, rows = small.shifts.shape[:2]
    parts = torch.eye(count, device=small.shifts.device)[:, None].expand(-1, rows, -1)
    return Aims(small.shifts, parts, *_centroid(small))


def strongest(small: Small) -> Aims:
    """The expert that is farthest from the base, against its own divergences."""
    best = small.distances.sum(0).argmax(0)  # [R]
    count, rows = small.shifts.shape[:2]
    parts = torch.eye(count, device=best.device)[best]
    target = small.distances[:, best, torch.arange(rows, device=best.device)]
    spread = torch.zeros_like(target[0])
    return Aims(chosen(small.shifts, best)[None], parts[None], target, 1, spread)


def blend(small: Small) -> Aims:
    """All experts, in proportion to their distances from the base, as if they were one."""
    pull = small.distances.sum(0).T  # [R, T]
    total = pull.sum(-1, keepdim=True)
    parts = torch.where(total > 0, pull / total, 1 / pull.shape[1]).float()
    shifts = mixed(small.shifts, parts)
    target = small.measure(shifts)[:, 0]
    return Aims(shifts, parts[None], target, 1, torch.zeros_like(target[0]), joint=True)


# Rules that give the weights [R, T] of all experts.


def static(small: Small) -> Tensor:
    """As the request says."""
    return small.given


def entropy(small: Small) -> Tensor:
    """In proportion to 1 / H(expert), so that who is sure speaks; they sum to 1."""
    sure = torch.stack([1 / _entropy(logits.double().softmax(-1)) for logits in small.experts])
    return (sure / sure.sum(0)).T


def consistency(small: Small) -> Tensor:
    """In proportion to sum_v c(|p_v - mean p_v|) / H(p); they sum to 1.

    `p` is an expert's distribution over its `CONSIDERED` most probable tokens, the mean is over the
    experts, the sum over all tokens that any of them considers, and `c` falls from 1 at distance 0
    to 0 at distance 1: `(exp(-2 d) - exp(-2)) / (1 - exp(-2))`.
    """
    probs = torch.stack([_best(logits.double()).softmax(-1) for logits in small.experts])
    mean = probs.mean(0)
    least = math.exp(-SHARPNESS)
    near = ((-SHARPNESS * (probs - mean).abs()).exp() - least) / (1 - least)
    scores = (near * (mean > 0)).sum(-1) / _entropy(probs)  # [T, R]
    return (scores / scores.sum(0)).T


def _best(logits: Tensor) -> Tensor:
    """Logits [R, V] with all but the best ones, and what ties with the last of these, at -inf."""
    last = logits.topk(min(CONSIDERED, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < last, -torch.inf)


def _entropy(probs: Tensor) -> Tensor:
    """Of distributions [..., V], in nats, [...]; best in float64, for those who are nearly sure."""
    nats: Tensor = torch.special.entr(probs).sum(-1)
    return nats.clamp_min(LEAST_ENTROPY)


class RuleSpec(NamedTuple):
    """A row of `RULES`."""

    about: str
    paper: str
    weights: Callable[[Small], Tensor] | None = None
    """The weights of all experts; None where they are searched for."""
    refine: int = 0
    """Newton steps from the best of the grid towards the minimum in the reals."""
    given: bool = False
    """Whether requests and files give weights."""

    @property
    def searches(self) -> bool:
        return self.weights is None


class SelectSpec(NamedTuple):
    """A row of `SELECTS`."""

    about: str
    paper: str
    aims: Callable[[Small], Aims]


FAN = "Fan et al. 2024, arXiv 2406.15480"
BEYOND = "beyond the paper"
RULES: dict[str, RuleSpec] = {
    "grid": RuleSpec("the best weight of low, low + `step`, ... high", f"{FAN}, section 3.2"),
    "exact": RuleSpec("the minimum in the reals instead of on the grid", BEYOND, refine=4),
    "static": RuleSpec(
        "fixed `weights`, 1.0 unless given",
        "proxy tuning: Liu et al. 2024, arXiv 2401.08565",
        static,
        given=True,
    ),
    "entropy": RuleSpec(
        "weights in proportion to the inverse entropy of each expert; they sum to 1",
        "entropy-adaptive decoding measures certainty so: arXiv 2502.06833",
        entropy,
    ),
    "consistency": RuleSpec(
        "weights by how near each expert is to the mean of all, times its certainty; they sum to 1",
        "CoRE: Zeng et al. 2025, arXiv 2510.13855",
        consistency,
    ),
}
SELECTS: dict[str, SelectSpec] = {
    "paper": SelectSpec(
        "the expert whose direction fits the centroid of all targets best",
        f"{FAN}, section 3.3",
        paper,
    ),
    "strongest": SelectSpec(
        "the expert that is farthest from the base at this step, by its own single-expert rule",
        BEYOND,
        strongest,
    ),
    "blend": SelectSpec("all experts in proportion to that distance, as one expert", BEYOND, blend),
}
if TYPE_CHECKING:
    Rule = str
    Select = str
else:  # what validates types at run time finds the names here
    Rule = Literal[tuple(RULES)]
    Select = Literal[tuple(SELECTS)]


def fixed(small: Small, rule: Rule) -> Aims:
    """The one direction of a rule that has weights; the loss is told as of all experts."""
    weigh = RULES[rule].weights
    assert weigh
    parts = weigh(small).float()
    return Aims(mixed(small.shifts, parts), parts[None], *_centroid(small), searched=False)


def mixed(shifts: Tensor, parts: Tensor) -> Tensor:
    """sum_t parts_t shift_t of shifts [T, R, V] and parts [R, T], [1, R, V]."""
    total = parts[:, :1] * shifts[0]
    for part, shift in zip(parts.T[1:], shifts[1:], strict=True):
        total.addcmul_(part[:, None], shift)
    return total[None]


def chosen(shifts: Tensor, winner: Tensor) -> Tensor:
    """The shift [R, V] of each row's winner [R] among shifts [D, R, V]."""
    rows = torch.arange(len(winner), device=winner.device)
    return shifts.flatten(0, 1).index_select(0, winner * len(winner) + rows)


def _centroid(small: Small) -> tuple[Tensor, int, Tensor]:
    """The target of all experts, how many they are, and the spread around it."""
    target = small.distances.mean(1)
    spread = (small.distances - target[:, None]).square().sum((0, 1))
    return target, len(small.shifts), spread
