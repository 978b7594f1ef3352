"""How models become one: each method is a row of a table, made of functions of tensors.

A method over a base takes each expert's shift from it (the task vector `tau_i = expert_i - base`),
may thin it out (`trim`, `drop`), combines the shifts (`weighted_sum`, `agreed`) and adds what comes
out, times lambda, to the base. All is done for one tensor at a time, in float32. Where mergekit has
a method of the same name, it means the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Generator, Tensor

# Ways to thin out the shift of one expert: its tensor, the share to keep, and chance.


def trim(shift: Tensor, density: float, chance: Generator) -> Tensor:
    """TIES' first step (arXiv 2306.01708, Algorithm 1): keeps the largest magnitudes.

    The paper ranks all numbers of an expert together; like PEFT and mergekit, this ranks those of
    one tensor, which needs no more memory than that, and leaves none without any.
    """
    kept = max(1, int(density * shift.numel()))
    mask = torch.zeros(shift.numel(), dtype=torch.bool)
    mask[shift.abs().flatten().topk(kept, sorted=False).indices] = True
    return torch.where(mask.view_as(shift), shift, 0.0)


def drop(shift: Tensor, density: float, chance: Generator) -> Tensor:
    """DARE (arXiv 2311.03099, section 3.2): drops each number with probability 1 - density, and
    divides the others by the density, so that the expected shift stays the same."""
    kept = torch.bernoulli(torch.full_like(shift, density), generator=chance)
    return shift * kept / density


def chance(seed: int, model: str, name: str) -> Generator:
    """What `drop` draws from for one tensor of one model: it hangs on no other and no order."""
    digest = hashlib.sha256(f"{seed} {model} {name}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little"))


# Ways to combine tensors of several models with their weights.


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """sum_i w_i x_i; normalized, over sum_i w_i."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total += tensor * weight  # each rounded, so that what cancels out does so on any machine
    return total / sum(weights) if normalize else total


def agreed(tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """TIES' other steps (arXiv 2306.01708, Algorithm 1): elects a sign, sums what has it.

    At each place the sign is that of sum_i w_i tau_i (positive, where that is 0), and the result is
    the sum of the w_i tau_i with this sign; normalized, over the sum of their weights, which with
    equal weights is the paper's mean.
    """
    positive = weighted_sum(tensors, weights, normalize=False) >= 0
    total, share = torch.zeros_like(tensors[0]), torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        part = tensor * weight
        agrees = torch.where(positive, part > 0, part < 0)
        total.add_(part * agrees)
        share.add_(agrees, alpha=weight)
    return total / torch.where(share > 0, share, 1.0) if normalize else total


# How the result is scaled with depth.


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, by its name; None for embeddings, head and last norm."""
    number = re.search(r"\.(\d+)\.", f".{name}")
    return int(number.group(1)) if number else None


def depth_scale(name: str, layers: int, alpha: float, beta: float) -> float:
    """LiNeS (arXiv 2410.17146, section 4): alpha + beta l / (L - 1) for layer l = 0, ..., L - 1.

    What belongs to no layer has alpha, as in the authors' code.
    """
    return alpha + beta * (layer_of(name) or 0) / max(1, layers - 1)


class MethodSpec(NamedTuple):
    """A row of `METHODS`."""

    about: str
    paper: str
    combine: Callable[[Sequence[Tensor], Sequence[float], bool], Tensor]
    thin: Callable[[Tensor, float, Generator], Tensor] | None = None
    normalize: bool = False
    """Whether weights are normalized unless the recipe says otherwise."""
    least: int = 1
    """How few models make a merge."""
    over_base: bool = True
    """Whether shifts from a base are merged; else the models themselves."""


TASK_ARITHMETIC = "Ilharco et al. 2022, arXiv 2212.04089"
TIES = "Yadav et al. 2023, arXiv 2306.01708"
DARE = "Yu et al. 2023, arXiv 2311.03099"
LINES = "Wang et al. 2024, arXiv 2410.17146"
METHODS: dict[str, MethodSpec] = {
    "linear": MethodSpec(
        "the weighted average of the models",
        "model soups: Wortsman et al. 2022, arXiv 2203.05482",
        weighted_sum,
        normalize=True,
        least=2,
        over_base=False,
    ),
    "task_arithmetic": MethodSpec(
        "the base and the weighted sum of the experts' shifts from it",
        TASK_ARITHMETIC,
        weighted_sum,
    ),
    "ties": MethodSpec(
        "the largest shifts of each expert, where they have the sign that most weight is for",
        TIES,
        agreed,
        thin=trim,
        normalize=True,
        least=2,
    ),
    "dare_linear": MethodSpec(
        "task arithmetic with shifts of which a random share is kept, and scaled up for the rest",
        DARE,
        weighted_sum,
        thin=drop,
    ),
    "dare_ties": MethodSpec(
        "shifts thinned out in that way, where they have the sign that most weight is for",
        f"{DARE}, with {TIES}",
        agreed,
        thin=drop,
        least=2,
    ),
}
if TYPE_CHECKING:
    Method = str
else:  # what validates types at run time finds the names here
    Method = Literal[tuple(METHODS)]
