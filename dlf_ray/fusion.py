"""Dynamic Logits Fusion: how far each step of a large model follows its small experts.

The method of "On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion" (Fan et
al., 2024, arXiv 2406.15480, sections 3.1-3.3): tensors in, tensors out. With `P` the large model's
distribution and `D` a shift (expert minus base logits), the fused distribution `P~_a` is
`softmax(large + a D)`, and its divergences from `P` are to match those of the expert from the base.
All divergences are in nats. They need no softmax per candidate: with the cumulants of `D` under `P`

    A(a) = log sum_v P_v exp(a D_v)      KL(P~_a || P) = a A'(a) - A(a)      KL(P || P~_a) = A(a)

for `D` centred, `sum_v P_v D_v = 0`. A candidate thus costs one exponential and two
multiply-adds per token of the vocabulary, and on a CPU the exponentials are the floor: at V = 32000
one core needs 40 us for an `expm1` and 6 us for a multiply-add. So the candidates of the grid are
made from each other, by multiply-adds. All 21 cost 0.4 ms, no more than the ten or so that a
bisection would evaluate singly (both divergences grow monotonically with `a >= 0`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Rule = Literal["grid", "exact", "static"]
Select = Literal["paper", "strongest", "blend"]
Bounds = Sequence[tuple[float, float]]


class Fused(NamedTuple):
    """What a step yields for each of R rows, all in float32."""

    logits: Tensor
    """[R, V]: the large model's plus the weighted shifts, up to a constant."""
    weights: Tensor
    """[R, T]"""
    loss: Tensor
    """[R], nats squared: what the rule minimises. It sums over all experts, for `strongest` and
    `blend` over the one problem that was solved."""
    kl: Tensor
    """[R, 2], nats: KL(fused || large) and KL(large || fused)."""


class Aims(NamedTuple):
    """What the small models alone determine, while the large one is still computing.

    Matching T experts is matching the centroid of their divergences, up to a constant:
    `sum_s (f - f_s)^2 = T (f - mean f)^2 + sum_s (f_s - mean f)^2`. So there is one target.
    """

    select: Literal["paper", "strongest", "blend", "static"]
    shifts: Tensor
    """[D, R, V], float32: the directions to go from the large model, up to a constant."""
    parts: Tensor
    """[D, R, T]: the weights of the experts are `alpha` times these."""
    target: Tensor
    """[2, R], nats: what KL(fused || large) and KL(large || fused) are to be."""
    experts: int
    """How many experts the target stands for."""
    spread: Tensor
    """[R]: the part of the loss that no weight can change."""


def fuse(
    large: Tensor,  # [R, V]
    base: Tensor,  # [R, V]
    experts: Sequence[Tensor] | Tensor,  # T of [R, V]
    *,
    rule: Rule = "grid",
    select: Select = "paper",
    step: float = 0.1,
    bounds: Bounds | None = None,  # T of (low, high)
    weights: Sequence[float] | None = None,  # T
    only: Sequence[int] | None = None,
) -> Fused:
    """Fuses R rows of logits, each by itself; the arguments are those of `aim` and `weigh`.

    Only the experts whose indices are in `only` take part; the others have the weight 0.
    """
    count = len(experts)
    chosen = list(range(count)) if only is None else list(only)
    if len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(count)):
        raise ValueError(f"`only` is {chosen}: name experts by different indices below {count}")
    for name, given in (("bounds", bounds), ("weights", weights)):
        if given is not None and len(given) != count:
            raise ValueError(f"`{name}` has {len(given)} entries: give one for each of {count}")
    aims = aim(
        base,
        [experts[t] for t in chosen],
        rule=rule,
        select=select,
        weights=None if weights is None else [weights[t] for t in chosen],
    )
    own = None if bounds is None else [bounds[t] for t in chosen]
    fused = weigh(large, aims, rule=rule, step=step, bounds=own)
    every = fused.weights.new_zeros(len(large), count)
    every[:, chosen] = fused.weights
    return fused._replace(weights=every)


def aim(
    base: Tensor,  # [R, V]
    experts: Sequence[Tensor] | Tensor,  # T of [R, V]
    *,
    rule: Rule,
    select: Select,
    weights: Sequence[float] | None = None,  # T
) -> Aims:
    """The directions in which the small models pull, and how far their experts are from the base.

    `select` says which directions compete: `paper` tries every expert alone, against the
    divergences of all; `strongest` takes the expert farthest from the base; `blend` takes all of
    them in proportion to their distance as if they were one expert. Under rule `static` there is
    one direction, the sum of the shifts times `weights` (1.0 each by default, proxy tuning), and
    nothing to select.

    Raises `ValueError` where shapes differ or a name is unknown.
    """
    _check("rule", rule, Rule)
    _check("select", select, Select)
    if base.dim() != 2 or any(expert.shape != base.shape for expert in experts):
        shapes = [tuple(logits.shape) for logits in (base, *experts)]
        raise ValueError(f"base and experts are {shapes}: give each as [rows, vocabulary], alike")
    count, rows = len(experts), len(base)
    if weights is not None and len(weights) != count:
        raise ValueError(f"`weights` has {len(weights)} entries: give one for each of {count}")

    base = base.float()
    shifts = base.new_empty(count, *base.shape)
    for shift, expert in zip(shifts, experts, strict=True):
        torch.sub(expert, base, out=shift)
    # a constant shift becomes zero exactly; at a probable token this costs no digits
    shifts -= shifts.gather(-1, base.argmax(-1)[None, :, None].expand(count, -1, -1))
    if not count:
        none = base.new_zeros(2, rows)
        return Aims("static", shifts, base.new_zeros(0, rows, 0), none, 0, none[0])
    probs = base.softmax(-1)

    def distances(shifts: Tensor) -> Tensor:  # [2, D, R]: KL(expert || base), KL(base || expert)
        alpha = base.new_ones(*shifts.shape[:2], 1)
        return _divergences(alpha, _cumulants(base, probs, shifts, alpha))[..., 0]

    each = distances(shifts)
    single = torch.eye(count, dtype=base.dtype, device=base.device)
    if select == "paper" or rule == "static":
        target = each.mean(1)
        spread = (each - target[:, None]).square().sum((0, 1))
        if rule == "static":
            parts = base.new_tensor([1.0] * count if weights is None else weights).expand(rows, -1)
            return Aims("static", _mix(shifts, parts), parts[None], target, count, spread)
        return Aims("paper", shifts, single[:, None].expand(-1, rows, -1), target, count, spread)

    pull = each.sum(0).T  # [R, T]
    if select == "strongest":
        best = pull.argmax(-1)
        parts = single[best]
        shifts = _mix(shifts, parts)
        target = each[:, best, torch.arange(rows, device=base.device)]
    else:
        total = pull.sum(-1, keepdim=True)
        parts = torch.where(total > 0, pull / total, 1 / count)
        shifts = _mix(shifts, parts)
        target = distances(shifts)[:, 0]
    return Aims(select, shifts, parts[None], target, 1, torch.zeros_like(target[0]))


def weigh(
    large: Tensor,  # [R, V]
    aims: Aims,
    *,
    rule: Rule = "grid",
    step: float = 0.1,
    bounds: Bounds | None = None,  # T of (low, high)
) -> Fused:
    """Weighs the experts at this step and adds their shifts to the large model's logits.

    Rule `grid` tries low, low + step, ... up to high (the paper: 0.0, 0.1, ... 2.0; the first
    minimum wins, in the order of the experts, then of the grid). `exact` goes on from there to the
    minimum in the reals, within one step and the bounds. `static` takes the weights of `aim`, which
    know no bounds.

    Raises `ValueError` where `large`, `rule` or `bounds` do not fit the aims.
    """
    _check("rule", rule, Rule)
    directions, rows, count = aims.parts.shape
    if large.shape != aims.shifts.shape[1:]:
        fit = list(aims.shifts.shape[1:])
        raise ValueError(f"large is {list(large.shape)}: give it as the small models' {fit}")
    logits = large.float()
    if not count:
        none = logits.new_zeros(rows, 2)
        return Fused(logits, none[:, :0], none[:, 0], none)
    if (rule == "static") != (aims.select == "static"):
        raise ValueError(
            f"rule {rule!r} cannot weigh aims of {aims.select!r}: use one rule in both"
        )
    limits = [(0.0, 2.0)] * count if bounds is None else list(bounds)
    ladder = None  # the distance of candidates that are its multiples, 0 first
    if rule == "static":
        alpha, tops = logits.new_ones(1, rows, 1), logits.new_ones(1, rows)
    else:
        if aims.select == "blend" and len(set(limits)) > 1:
            raise ValueError(f"`blend` has one weight for all experts: make {limits} equal")
        who = aims.parts.argmax(-1)  # [D, R]: the expert whose bounds hold
        alpha = logits.new_tensor(_grids(limits, step, count))[who]  # [D, R, K]
        tops = logits.new_tensor([high for _, high in limits])[who]  # [D, R]
        ladder = step if all(low == 0 for low, _ in limits) else None

    probs = logits.softmax(-1)
    kl = _divergences(alpha, _cumulants(logits, probs, aims.shifts, alpha, ladder=ladder))
    loss = _loss(kl, aims).masked_fill_(alpha > tops[..., None] + step / 1000, torch.inf)
    best = loss.argmin(-1, keepdim=True)
    points = torch.stack([x.gather(-1, best)[..., 0] for x in (loss, alpha, *kl)])  # [4, D, R]
    if rule == "exact":
        low = torch.maximum(points[1] - step, alpha[..., 0])
        high = torch.minimum(points[1] + step, tops)
        finer = _refine(logits, probs, aims, points[1], low, high)
        points = torch.where(finer[0] < points[0], finer, points)
    winner = points[0].argmin(0, keepdim=True)  # [1, R]
    at = torch.arange(directions, device=winner.device)[:, None] == winner  # [D, R]
    alphas = points[1] * at
    for one, shift in zip(alphas, aims.shifts, strict=True):
        logits = torch.addcmul(logits, one[:, None], shift)
    weights = (alphas[..., None] * aims.parts).sum(0)
    loss, _, f, g = points.gather(1, winner.expand(4, 1, rows))[:, 0]
    return Fused(logits, weights, loss, torch.stack([f, g], -1))


def _check(name: str, value: str, valid: Any) -> None:
    if value not in get_args(valid):
        raise ValueError(f"unknown {name} {value!r}: use {', '.join(get_args(valid))}")


def _grids(bounds: Bounds, step: float, count: int) -> list[list[float]]:
    """The candidates of each expert, T lists of the longest one's length."""
    if len(bounds) != count:
        raise ValueError(f"`bounds` has {len(bounds)} entries: give one for each of {count}")
    if not step > 0:
        raise ValueError(f"`step` is {step}: give the distance of two candidates, above 0")
    for low, high in bounds:
        if not low <= high:
            raise ValueError(f"bounds [{low}, {high}] are empty: give low <= high")
    length = max(int((high - low) / step + 1e-6) for low, high in bounds) + 1
    return [[low + step * k for k in range(length)] for low, _ in bounds]


def _mix(shifts: Tensor, parts: Tensor) -> Tensor:
    """sum_t parts_t shift_t of shifts [T, R, V] and parts [R, T], [1, R, V]."""
    mixed = parts[:, :1] * shifts[0]
    for part, shift in zip(parts.T[1:], shifts[1:], strict=True):
        mixed.addcmul_(part[:, None], shift)
    return mixed[None]


def _divergences(alpha: Tensor, cumulants: Tensor) -> Tensor:
    """KL(P~ || P) and KL(P || P~) at each alpha [D, R, K], [2, D, R, K]."""
    log_sum, mean = cumulants[:2]
    return torch.stack([alpha * mean - log_sum, log_sum])


def _loss(kl: Tensor, aims: Aims) -> Tensor:
    """The loss [D, R, K] of the two KLs [2, D, R, K]."""
    miss = (kl - aims.target[:, None, :, None]).square().sum(0)
    return miss.mul_(aims.experts).add_(aims.spread[:, None])


def _cumulants(
    logits: Tensor,  # [R, V]
    probs: Tensor,  # [R, V], their softmax
    shifts: Tensor,  # [D, R, V]
    alpha: Tensor,  # [D, R, K]
    *,
    order: int = 2,
    ladder: float | None = None,
) -> Tensor:
    """A(a), A'(a), ... of the centred shifts at each alpha, [order, D, R, K].

    If `ladder` is given, alpha is its multiples 0, 1, 2, ... everywhere.
    """
    directions, rows, length = alpha.shape
    # what is live should stay in the cache of a core; a GPU only has to have the room
    fit = 2 ** (28 if shifts.is_cuda else 20) // ((length + order) * shifts.shape[-1])
    deep, high = max(1, min(fit, directions)), max(1, fit // directions)
    sums = shifts.new_empty(directions, rows, order, length)
    moments = shifts.new_empty(directions, rows, order)
    reach = shifts.new_empty(2, directions, rows)
    blocks = [
        (slice(i, i + deep), slice(j, j + high))
        for j in range(0, rows, high)
        for i in range(0, directions, deep)
    ]
    for at in blocks:
        p, shift = probs[at[1]], shifts[at]
        d = shift - (p * shift).sum(-1, keepdim=True)
        powers = d.new_empty(*d.shape[:2], order, d.shape[-1])  # p, p d, p d^2, ...
        powers[:, :, 0] = p
        for n in range(1, order):
            torch.mul(powers[:, :, n - 1], d, out=powers[:, :, n])
        sums[at] = _product(powers, _tilt(d, alpha[at], ladder))
        moments[at] = powers.sum(-1)
        reach[0][at], reach[1][at] = d.amax(-1), d.amin(-1)
    mean = moments[:, :, 1, None]  # what centring left by rounding
    raw = (sums + moments[..., None]).div_(1 + sums[:, :, :1])
    out = _centred(sums[:, :, 0].log1p() - alpha * mean, raw)
    out[1] -= mean
    # beyond exp(60) the tilt may overflow, or lift tokens whose probability has underflowed
    wide = torch.maximum(alpha.amax(-1) * reach[0], alpha.amin(-1) * reach[1]) > 60
    if wide.any():
        i, j = wide.nonzero(as_tuple=True)
        out[:, i, j] = _wide_cumulants(logits[j], shifts[i, j], alpha[i, j], order)
    return out


def _wide_cumulants(
    logits: Tensor,  # [N, V]
    shift: Tensor,  # [N, V]
    alpha: Tensor,  # [N, K]
    order: int,
) -> Tensor:
    """`_cumulants` [order, N, K] for shifts of any size, slower; float32 has no digits to spare."""
    logprobs, shift = logits.double().log_softmax(-1), shift.double()
    d = shift - (logprobs.exp() * shift).sum(-1, keepdim=True)
    x = logprobs[:, None] + alpha[..., None] * d[:, None]  # [N, K, V]
    log_sum = x.logsumexp(-1)
    tilted = x.sub_(log_sum[..., None]).exp_()
    powers = torch.stack([d**n for n in range(order)], 1)
    return _centred(log_sum, powers @ tilted.mT).float()


def _centred(log_sum: Tensor, raw: Tensor) -> Tensor:
    """Cumulants [order, ..., K] from raw moments [..., order, K], of which there are 2 or 4."""
    _, mean, *higher = raw.unbind(-2)
    if not higher:
        return torch.stack([log_sum, mean])
    second, third = higher
    variance = second - mean**2
    return torch.stack([log_sum, mean, variance, third - mean * (3 * variance + mean**2)])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[..., M, V] times [..., K, V] summed over V, [..., M, K]; a long sum in one piece, as a CPU
    would do it, loses a digit."""
    pieces = zip(torch.split(left, 8192, -1), torch.split(right, 8192, -1), strict=True)
    return torch.stack([one @ other.mT for one, other in pieces]).sum(0)


def _tilt(d: Tensor, alpha: Tensor, ladder: float | None) -> Tensor:
    """exp(alpha d) - 1 for d [D, R, V] and alpha [D, R, K], [D, R, K, V].

    Without the -1 the sums would lose their digits wherever expert and base nearly agree. On a
    ladder one exponential is enough: with `E_k` the value at its k-th rung,
    `E_{k+n} = E_k (1 + E_n) + E_n`, where all terms have one sign, so that no digits cancel.
    """
    if ladder is None:
        return (alpha[..., None] * d[:, :, None]).expm1_()
    length = alpha.shape[-1]
    tilt = d.new_empty(*alpha.shape, d.shape[-1])
    tilt[:, :, 0] = 0
    done, rung = 1, (ladder * d).expm1_()[:, :, None]
    while done < length:
        more, factor = min(done, length - done), rung + 1
        torch.addcmul(rung, tilt[:, :, :more], factor, out=tilt[:, :, done : done + more])
        done, rung = 2 * done, torch.addcmul(rung, rung, factor)
    return tilt


def _refine(
    logits: Tensor,  # [R, V]
    probs: Tensor,  # [R, V]
    aims: Aims,
    alpha: Tensor,  # [D, R]
    low: Tensor,  # [D, R]
    high: Tensor,  # [D, R]
) -> Tensor:
    """The minimum of the loss near alpha, within low and high: loss, alpha and KLs, [4, D, R].

    Newton's method on the slope of the loss, kept in the interval where its sign changes; from a
    tenth, four steps reach the precision of float32.
    """
    for _ in range(4):
        cumulants = _cumulants(logits, probs, aims.shifts, alpha[..., None], order=4)[..., 0]
        _, first, second, third = cumulants
        f, g = _divergences(alpha, cumulants) - aims.target[:, None]
        slope = f * alpha * second + g * first
        curvature = (alpha * second) ** 2 + first**2 + f * (second + alpha * third) + g * second
        low, high = torch.where(slope > 0, low, alpha), torch.where(slope > 0, alpha, high)
        newton = torch.clamp(alpha - slope / curvature, low, high)
        alpha = torch.where(curvature > 0, newton, (low + high) / 2)
    column = alpha[..., None]
    kl = _divergences(column, _cumulants(logits, probs, aims.shifts, column))
    return torch.stack([_loss(kl, aims)[..., 0], alpha, *kl[..., 0]])
