"""Dynamic Logits Fusion: how far each step of a large model follows its small experts.

The method of "On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion" (Fan et
al., 2024, arXiv 2406.15480, sections 3.1-3.3): tensors in, tensors out. With `P` the large model's
distribution and `D` a shift (expert minus base logits), the fused distribution `P~_a` is
`softmax(large + a D)`, and its divergences from `P` are to match those of the expert from the base.
All divergences are in nats. They need no softmax per candidate: with the cumulants of `D` under `P`

    A(a) = log sum_v P_v exp(a D_v)      KL(P~_a || P) = a A'(a) - A(a)      KL(P || P~_a) = A(a)

for `D` centred, `sum_v P_v D_v = 0`. A candidate thus costs one exponential and two
multiply-adds per token of the vocabulary. On a CPU the exponentials are the floor: at V = 32000 a
core needs 40 us for one `expm1`, 6 us for a multiplication; so the candidates of the grid are
powers of each other here, and scanning all 21 costs as much as five exponentials. Bisection on the
monotone divergences would need eight to ten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Rule = Literal["grid", "exact", "static"]
Select = Literal["paper", "strongest", "blend"]
Bounds = Sequence[tuple[float, float]]


class Fused(NamedTuple):
    """What a step yields for each of R rows, all in float32."""

    logits: Tensor
    """[R, V]: the large model's plus the weighted shifts, not normalised."""
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
    shifts: tuple[Tensor, ...]
    """D directions to go from the large model, float32 [R, V] each."""
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
    spread = fused.weights.new_zeros(len(large), count)
    spread[:, chosen] = fused.weights
    return fused._replace(weights=spread)


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
    if rule not in ("grid", "exact", "static"):
        raise ValueError(f"unknown rule {rule!r}: use grid, exact or static")
    if select not in ("paper", "strongest", "blend"):
        raise ValueError(f"unknown select {select!r}: use paper, strongest or blend")
    if base.dim() != 2 or any(expert.shape != base.shape for expert in experts):
        shapes = [tuple(logits.shape) for logits in (base, *experts)]
        raise ValueError(f"base and experts are {shapes}: give each as [rows, vocabulary], alike")
    count, rows = len(experts), len(base)
    if weights is not None and len(weights) != count:
        raise ValueError(f"`weights` has {len(weights)} entries: give one for each of {count}")

    base = base.float()
    shifts = tuple(expert.float() - base for expert in experts)
    if not count:
        none = base.new_zeros(2, rows)
        return Aims("static", (), none[:0, :, None], none, 0, none[0])
    probs = _softmax(base)
    ones = base.new_ones(rows, 1)

    def distances(shift: Tensor) -> Tensor:  # [2, R]: KL(expert || base), KL(base || expert)
        return torch.stack(_divergences(ones, _cumulants(base, probs, shift, ones)))[..., 0]

    each = torch.stack([distances(shift) for shift in shifts])  # [T, 2, R]
    single = torch.eye(count, device=base.device)
    if select == "paper" or rule == "static":
        parts = single[:, None].expand(count, rows, count)
        target = each.mean(0)
        spread = ((each - target) ** 2).sum((0, 1))
        if rule == "static":
            parts = base.new_tensor([1.0] * count if weights is None else weights).expand(rows, -1)
            return Aims("static", (_mix(shifts, parts),), parts[None], target, count, spread)
        return Aims("paper", shifts, parts, target, count, spread)

    pull = each.sum(1).T  # [R, T]
    if select == "strongest":
        best = pull.argmax(-1)
        parts, target = single[best], each[best, :, torch.arange(rows, device=base.device)].T
        shift = _mix(shifts, parts)
    else:
        total = pull.sum(-1, keepdim=True)
        parts = torch.where(total > 0, pull / total, 1 / count)
        shift = _mix(shifts, parts)
        target = distances(shift)
    return Aims(select, (shift,), parts[None], target, 1, torch.zeros_like(target[0]))


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
    minimum in the reals, within one step and the bounds. `static` takes the weights of `aim`.

    Raises `ValueError` where `large` or `bounds` do not fit the aims.
    """
    rows, count = aims.parts.shape[1:]
    if large.dim() != 2 or len(large) != rows or any(large.shape != s.shape for s in aims.shifts):
        fit = [rows, *(aims.shifts[0].shape[1:] if aims.shifts else ["vocabulary"])]
        raise ValueError(f"large is {list(large.shape)}: give it as the small models' {fit}")
    logits = large.float()
    if not aims.shifts:
        none = logits.new_zeros(rows, 2)
        return Fused(logits, none[:, :0], none[:, 0], none)
    if (rule == "static") != (aims.select == "static"):
        raise ValueError(
            f"rule {rule!r} cannot weigh aims of {aims.select!r}: use one rule in both"
        )
    limits = [(0.0, 2.0)] * count if bounds is None else list(bounds)
    ladder = None  # the distance of candidates that are its multiples, 0 first
    if rule == "static":
        grids = logits.new_ones(count, 1)
        limits = [(1.0, 1.0)] * count
    else:
        grids = logits.new_tensor(_grids(limits, step, count))
        if aims.select == "blend" and len(set(limits)) > 1:
            raise ValueError(f"`blend` has one weight for all experts: make {limits} equal")
        ladder = step if all(low == 0 for low, _ in limits) else None
    tops = logits.new_tensor([high for _, high in limits])

    probs = _softmax(logits)
    found = []
    for shift, parts in zip(aims.shifts, aims.parts, strict=True):
        who = parts.argmax(-1)  # the expert whose bounds hold for this row
        alpha, top = grids[who], tops[who, None]  # [R, K], [R, 1]
        f, g = _divergences(alpha, _cumulants(logits, probs, shift, alpha, ladder=ladder))
        loss = _loss(f, g, aims)
        loss[alpha > top + step / 1000] = torch.inf
        best = loss.argmin(-1, keepdim=True)
        point = torch.stack([x.gather(-1, best)[:, 0] for x in (alpha, loss, f, g)])
        if rule == "exact":
            low = torch.maximum(point[0] - step, alpha[:, 0])
            high = torch.minimum(point[0] + step, top[:, 0])
            finer = _refine(logits, probs, shift, aims, point[0], low, high)
            point = torch.where(finer[1] < point[1], finer, point)
        found.append(point)
    points = torch.stack(found)  # [D, 4, R]
    best = points[:, 1].argmin(0)  # [R]
    alphas = points[:, 0] * (best == torch.arange(len(points), device=best.device)[:, None])
    for shift, alpha in zip(aims.shifts, alphas, strict=True):
        logits = torch.addcmul(logits, alpha[:, None], shift)
    weights = (alphas[..., None] * aims.parts).sum(0)
    _, loss, f, g = points[best, :, torch.arange(rows, device=best.device)].T
    return Fused(logits, weights, loss, torch.stack([f, g], -1))


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


def _mix(shifts: Sequence[Tensor], parts: Tensor) -> Tensor:
    """sum_t parts_t shift_t, [R, V]."""
    mixed = parts[:, :1] * shifts[0]
    for t in range(1, len(shifts)):
        mixed.addcmul_(parts[:, t : t + 1], shifts[t])
    return mixed


def _softmax(logits: Tensor) -> Tensor:
    """[R, V]; over a large vocabulary the sums inside torch's own are good to 1e-5 only."""
    probs: Tensor = logits.softmax(-1)
    probs /= probs.sum(-1, keepdim=True)
    return probs


def _divergences(alpha: Tensor, cumulants: Tensor) -> tuple[Tensor, Tensor]:
    """KL(P~ || P) and KL(P || P~) at each alpha."""
    log_sum, mean = cumulants[:2]
    return alpha * mean - log_sum, log_sum


def _loss(f: Tensor, g: Tensor, aims: Aims) -> Tensor:
    """The loss [R, K] of KL(fused || large) `f` and KL(large || fused) `g`."""
    f_aim, g_aim = aims.target[..., None]
    miss = (f - f_aim).square() + (g - g_aim).square()
    return miss.mul(aims.experts).add(aims.spread[:, None])


def _cumulants(
    logits: Tensor,  # [R, V]
    probs: Tensor,  # [R, V], their softmax
    shift: Tensor,  # [R, V]
    alpha: Tensor,  # [R, K]
    *,
    order: int = 2,
    ladder: float | None = None,
) -> Tensor:
    """A(a), A'(a), ... of the centred shift at each alpha, [order, R, K].

    If `ladder` is given, alpha is its multiples 0, 1, 2, ... in every row.
    """
    rows, vocab = shift.shape
    # what is live should stay in the cache of a core; a GPU only has to have the room
    size = max(1, 2 ** (28 if shift.is_cuda else 20) // (alpha.shape[-1] * vocab))
    out = shift.new_empty(order, *alpha.shape)
    for start in range(0, rows, size):
        at = slice(start, start + size)
        p, a = probs[at], alpha[at]
        d = shift[at] - (p * shift[at]).sum(-1, keepdim=True)
        low, high = d.aminmax(dim=-1)
        weights = [p]
        for _ in range(1, order):
            weights.append(weights[-1] * d)
        powers = torch.stack(weights, 1)  # [r, order, V]: p, p d, p d^2, ...
        # exp(x) - 1 and not exp(x): where expert and base nearly agree, the sums keep their digits
        tilt = (a[..., None] * d[:, None]).expm1_() if ladder is None else _climb(d, ladder, a)
        moments = powers.sum(-1, keepdim=True)
        sums = powers @ tilt.mT  # [r, order, K]
        raw = (sums + moments) / (1 + sums[:, :1])
        out[0, at] = sums[:, 0].log1p() - a * moments[:, 1]  # what centring left by rounding
        out[1, at] = raw[:, 1] - moments[:, 1]
        out[2:, at] = _central(raw)
        # beyond exp(60) the tilt may overflow, or lift tokens whose probability has underflowed
        wide = torch.maximum(a.amax(-1) * high, a.amin(-1) * low) > 60
        if wide.any():
            rare = wide.nonzero()[:, 0]
            out[:, start + rare] = _wide_cumulants(logits[at][rare], d[rare], a[rare], order)
    return out


def _climb(d: Tensor, step: float, alpha: Tensor) -> Tensor:
    """exp(k step d) - 1 for d [r, V] and k = 0 ... K-1, [r, K, V], from one exponential.

    With `E_k` that value, `E_{k+n} = E_k (1 + E_n) + E_n`; all terms have one sign, so that no
    digits cancel.
    """
    tilt = d.new_empty(len(d), alpha.shape[-1], d.shape[-1])
    tilt[:, 0] = 0
    done, rung = 1, (step * d).expm1_()[:, None]
    while (more := min(done, tilt.shape[1] - done)) > 0:
        torch.addcmul(rung, tilt[:, :more], rung + 1, out=tilt[:, done : done + more])
        done, rung = 2 * done, rung * (rung + 2)
    return tilt


def _wide_cumulants(logits: Tensor, d: Tensor, alpha: Tensor, order: int) -> Tensor:
    """`_cumulants` for any size of alpha d [r, V]: slower, and exact to 1e-6 nats at best."""
    x = logits.log_softmax(-1)[:, None] + alpha[..., None] * d[:, None]  # [r, K, V]
    log_sum = x.logsumexp(-1)
    tilted = x.sub_(log_sum[..., None]).exp_()
    powers = torch.stack([d**n for n in range(order)], 1)
    raw = powers @ tilted.mT
    return torch.cat([log_sum[None], raw[:, 1][None], _central(raw)])


def _central(raw: Tensor) -> Tensor:
    """The second and third cumulant, as far as moments [r, order, K] are given."""
    mean = raw[:, 1]
    second = [raw[:, n] - mean**2 for n in range(2, raw.shape[1])][:1]
    third = [raw[:, n] - 3 * mean * raw[:, 2] + 2 * mean**3 for n in range(3, raw.shape[1])]
    return torch.stack(second + third) if second else raw.new_empty(0, *mean.shape)


def _refine(
    logits: Tensor,  # [R, V]
    probs: Tensor,  # [R, V]
    shift: Tensor,  # [R, V]
    aims: Aims,
    alpha: Tensor,  # [R]
    low: Tensor,  # [R]
    high: Tensor,  # [R]
) -> Tensor:
    """The minimum of the loss near alpha, within low and high: alpha, loss and the two KLs, [4, R].

    Newton's method on the slope of the loss, kept in the interval where its sign changes; from a
    tenth, four steps reach the precision of float32.
    """
    f_aim, g_aim = aims.target
    for _ in range(4):
        a, cumulants = alpha, _cumulants(logits, probs, shift, alpha[:, None], order=4)[..., 0]
        _, first, second, third = cumulants
        f, g = _divergences(a, cumulants)
        slope = (f - f_aim) * a * second + (g - g_aim) * first
        curvature = (a * second) ** 2 + first**2
        curvature += (f - f_aim) * (second + a * third) + (g - g_aim) * second
        low, high = torch.where(slope > 0, low, a), torch.where(slope > 0, a, high)
        newton = torch.clamp(a - slope / curvature, low, high)
        alpha = torch.where(curvature > 0, newton, (low + high) / 2)
    column = alpha[:, None]
    f, g = _divergences(column, _cumulants(logits, probs, shift, column))
    return torch.cat([column, _loss(f, g, aims), f, g], -1).T
