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

Every row has a grid of its own, and how it is computed depends on that row alone, so that its
answer is the same whatever else is in the batch. Sums over the vocabulary are in float32, what
little is made of them in float64. For finite inputs the fused logits are finite as long as logits
stay below 1e35 in size and weights and bounds within 100 (the loss, a square of nats, as long as
logits stay below 1e16); beyond, float32 overflows, in that row alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlf_ray.rules import RULES, SELECTS, Aims, Rule, Select, Small, chosen, fixed

Bounds = Sequence[tuple[float, float]]

LADDER = 32
"""Candidates that are made at once, which bounds the memory of a fine grid."""
STEEPEST = 60.0
"""The largest exponent that float32 is trusted with: beyond, the sums may overflow, or lift tokens
whose probability has underflowed."""
CANCELLING = 256.0
"""Shifts of this size leave float32 too few digits to tell the best tokens apart."""


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


class Candidates(NamedTuple):
    """What is tried of R rows and T experts, in float64 on the CPU."""

    limits: Tensor
    """[R, T, 2]: low and high."""
    steps: Tensor
    """[R]"""
    grids: Tensor
    """[R, T, K]: the candidates; of rows that have fewer, the last is repeated."""
    beyond: Tensor
    """[R, T, K]: which of them are beyond the bounds."""
    alike: list[tuple[slice | Tensor, int, bool]]
    """Which rows may be computed together: those of equal length, and whether their candidates are
    steps up from a start at 0 or above."""


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
    some = list(range(count)) if only is None else list(only)
    if len(set(some)) < len(some) or not set(some) <= set(range(count)):
        raise ValueError(f"`only` is {some}: name experts by different indices below {count}")
    for name, given in (("bounds", bounds), ("weights", weights)):
        if given is not None and len(given) != count:
            raise ValueError(f"`{name}` has {len(given)} entries: give one for each of {count}")
    aims = aim(
        base,
        [experts[t] for t in some],
        rule=rule,
        select=select,
        weights=None if weights is None else [weights[t] for t in some],
    )
    own = None if bounds is None else [bounds[t] for t in some]
    fused = weigh(large, aims, rule=rule, step=step, bounds=own)
    every = fused.weights.new_zeros(len(large), count)
    every[:, some] = fused.weights
    return fused._replace(weights=every)


def aim(
    base: Tensor,  # [R, V]
    experts: Sequence[Tensor] | Tensor,  # T of [R, V]
    *,
    rule: Rule,
    select: Select,
    weights: Tensor | Sequence[float] | None = None,  # [R, T], or T for all rows
) -> Aims:
    """The directions in which the small models pull, and how far their experts are from the base.

    `select` says which directions compete, see `rules.SELECTS`. A rule that gives the weights of
    all experts leaves one direction, the sum of the shifts times these, and nothing to select;
    rule `static` takes them from `weights` (1.0 each by default, proxy tuning).

    Raises `ValueError` where shapes differ or a name is unknown.
    """
    _check("rule", rule, RULES)
    _check("select", select, SELECTS)
    if base.dim() != 2 or any(expert.shape != base.shape for expert in experts):
        shapes = [tuple(logits.shape) for logits in (base, *experts)]
        raise ValueError(f"base and experts are {shapes}: give each as [rows, vocabulary], alike")
    count, rows = len(experts), len(base)
    factors = torch.ones(count) if weights is None else torch.as_tensor(weights)
    if factors.shape not in ((count,), (rows, count)):
        raise ValueError(
            f"`weights` is of {list(factors.shape)}: give one for each of {count} experts, or for "
            f"each of {rows} rows and {count} experts"
        )

    shifts = base.new_empty(count, *base.shape, dtype=torch.float32)
    # the difference in the digits of the inputs: what is equal there must leave nothing
    exact = torch.float32
    for logits in (base, *experts):
        exact = torch.promote_types(exact, logits.dtype)
    peak, start = base.argmax(-1, keepdim=True), base.to(exact)
    for shift, expert in zip(shifts, experts, strict=True):
        difference = expert.to(exact) - start
        # a constant shift becomes zero exactly; at a probable token this costs no digits
        torch.sub(difference, difference.gather(-1, peak), out=shift)
    if not count:
        none = shifts.new_zeros(2, rows, dtype=torch.float64)
        return Aims(shifts, shifts.new_zeros(0, rows, 0), none, 0, none[0])
    base = base.float()
    probs = base.softmax(-1)

    def distances(shifts: Tensor) -> Tensor:  # [2, D, R]: KL(expert || base), KL(base || expert)
        alpha = base.new_ones(*shifts.shape[:2], 1, dtype=torch.float64)
        return _divergences(alpha, _cumulants(base, probs, shifts, alpha))[..., 0]

    given = factors.to(base).expand(rows, -1)
    small = Small(list(experts), shifts, distances(shifts), given, distances)
    return SELECTS[select].aims(small) if RULES[rule].searches else fixed(small, rule)


def weigh(
    large: Tensor,  # [R, V]
    aims: Aims,
    *,
    rule: Rule = "grid",
    step: Tensor | float = 0.1,  # [R], or one for all rows
    bounds: Tensor | Bounds | None = None,  # [R, T, 2] or T for all rows: (low, high)
) -> Fused:
    """Weighs the experts at this step and adds their shifts to the large model's logits.

    Rule `grid` tries low, low + step, ... up to high (the paper: 0.0, 0.1, ... 2.0; the first
    minimum wins, in the order of the experts, then of the grid). `exact` goes on from there to the
    minimum in the reals, within one step and the bounds. A rule that does not search takes the
    weights of `aim`, which know no bounds.

    Tensors of steps and bounds best are float64 (a step of float32 misses the last candidate of a
    long grid) and on the CPU: how many candidates there are has to be known there.

    Raises `ValueError` where `large`, `rule`, `step` or `bounds` do not fit the aims.
    """
    _check("rule", rule, RULES)
    _, rows, count = aims.parts.shape
    if large.shape != aims.shifts.shape[1:]:
        fit = list(aims.shifts.shape[1:])
        raise ValueError(f"large is {list(large.shape)}: give it as the small models' {fit}")
    logits = large.float()
    if not count:
        none = logits.new_zeros(rows, 2)
        return Fused(logits, none[:, :0], none[:, 0], none)
    if RULES[rule].searches != aims.searched:
        raise ValueError(f"rule {rule!r} cannot weigh aims of another rule: use one in both")
    probs = logits.softmax(-1)
    if not aims.searched:
        alpha = logits.new_ones(1, rows, 1, dtype=torch.float64)
        kl = _divergences(alpha, _cumulants(logits, probs, aims.shifts, alpha))
        loss = _loss(kl, aims)
    else:
        limits, steps, grids, beyond, alike = _candidates(bounds, step, rows, count)
        if aims.joint and not (limits == limits[:, :1]).all():
            raise ValueError("`blend` has one weight for all experts: make their bounds equal")
        limits, steps, grids, beyond = (x.to(logits.device) for x in (limits, steps, grids, beyond))
        who = aims.parts.argmax(-1)  # [D, R]: the expert whose bounds hold
        row = torch.arange(rows, device=who.device)
        alpha = grids[row, who]  # [D, R, K]
        kl = alpha.new_zeros(2, *alpha.shape)
        for at, length, is_ladder in alike:
            own = alpha[:, at, :length]
            ladder = steps[at] if is_ladder else None
            sums = _cumulants(logits[at], probs[at], aims.shifts[:, at], own, ladder=ladder)
            kl[:, :, at, :length] = _divergences(own, sums)
        loss = _loss(kl, aims).masked_fill_(beyond[row, who], torch.inf)

    best = loss.argmin(-1, keepdim=True)
    points = torch.stack([x.gather(-1, best)[..., 0] for x in (loss, alpha, *kl)])  # [4, D, R]
    if RULES[rule].refine:
        low = torch.maximum(points[1] - steps, limits[row, who, 0])
        high = torch.minimum(points[1] + steps, limits[row, who, 1])
        finer = _refine(logits, probs, aims, points[1], low, high, RULES[rule].refine)
        points = torch.where(finer[0] < points[0], finer, points)
    winner = points[0].argmin(0)  # [R]
    loss, weight, f, g = points.gather(1, winner.expand(4, 1, rows))[:, 0]
    row = torch.arange(rows, device=winner.device)
    weights = weight[:, None] * aims.parts[winner, row]
    fused = _shifted(logits, weight, chosen(aims.shifts, winner))
    return Fused(fused, weights.float(), loss.float(), torch.stack([f, g], -1).float())


def widened(fused: Fused, large: Tensor, shared: Tensor) -> Fused:
    """A fusion over the ids `shared` [S] in the whole vocabulary of `large` [R, V].

    Elsewhere, where models do not mean the same, the large one speaks alone: these tokens keep the
    probabilities that it gives them, so that constants added to anyone's logits change nothing.
    """
    logits = large.float().clone()
    own = logits[:, shared]
    total = own.logsumexp(-1)
    share = (total - logits.logsumexp(-1)).exp()
    logits[:, shared] = fused.logits + (total - fused.logits.logsumexp(-1))[:, None]
    return fused._replace(logits=logits, kl=fused.kl * share[:, None])


def _check(name: str, value: str, valid: Collection[str]) -> None:
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}: use {', '.join(valid)}")


def _candidates(
    bounds: Tensor | Bounds | None, step: Tensor | float, rows: int, count: int
) -> Candidates:
    """Of all rows; those of rows that are alike are remembered, as most steps ask for the same."""
    if isinstance(bounds, Tensor) or isinstance(step, Tensor):
        limits, steps = _limits(bounds, step, rows, count)
        return Candidates(limits, steps, *_grids(limits, steps))
    return _remembered(bounds and tuple(map(tuple, bounds)), step, rows, count)


@lru_cache(maxsize=64)
def _remembered(bounds: tuple[Any, ...] | None, step: float, rows: int, count: int) -> Candidates:
    limits, steps = _limits(bounds, step, rows, count)
    return Candidates(limits, steps, *_grids(limits, steps))


def _limits(
    bounds: Tensor | Bounds | None, step: Tensor | float, rows: int, count: int
) -> tuple[Tensor, Tensor]:
    """Bounds [R, T, 2] and steps [R], checked, in float64 on the CPU."""
    given = [(0.0, 2.0)] * count if bounds is None else bounds
    if isinstance(given, Tensor):
        if given.shape != (rows, count, 2):
            raise ValueError(
                f"`bounds` is {list(given.shape)}: give (low, high) for each of {rows} rows and "
                f"{count} experts"
            )
    elif len(given) != count:
        raise ValueError(f"`bounds` has {len(given)} entries: give one for each of {count}")
    limits = torch.as_tensor(given, dtype=torch.float64, device="cpu").expand(rows, count, 2)
    steps = torch.as_tensor(step, dtype=torch.float64, device="cpu")
    if steps.shape not in ((), (rows,)):
        raise ValueError(f"`step` is {list(steps.shape)}: give one, or one for each of {rows} rows")
    if not (steps > 0).all():
        raise ValueError(f"`step` is {step}: give the distance of two candidates, above 0")
    for low, high in limits[~(limits[..., 0] <= limits[..., 1])].tolist():
        raise ValueError(f"bounds [{low}, {high}] are empty: give low <= high")
    return limits, steps.expand(rows)


def _grids(
    limits: Tensor,  # [R, T, 2]
    steps: Tensor,  # [R]
) -> tuple[Tensor, Tensor, list[tuple[slice | Tensor, int, bool]]]:
    """The candidates of each row and expert [R, T, K], and which of them are beyond its bounds.

    K is the longest row's; the last list says which rows may be computed together: those of equal
    length, and whether their candidates are steps up from a start at 0 or above.
    """
    low, high = limits.unbind(-1)
    counts = ((high - low) / steps[:, None] + 1e-6).floor() + 1  # [R, T]
    if not (counts < 2**20).all():
        raise ValueError(f"the bounds hold {counts.max():.3g} candidates: give a larger `step`")
    lengths = counts.amax(-1).long().tolist()
    at = torch.arange(max(lengths, default=1))
    last = counts[..., None] - 1
    grids = low[..., None] + torch.minimum(at, last) * steps[:, None, None]
    groups: dict[tuple[int, bool], list[int]] = {}
    for row, key in enumerate(zip(lengths, (low >= 0).all(-1).tolist(), strict=True)):
        groups.setdefault(key, []).append(row)
    alike = [
        (slice(None) if len(groups) == 1 else torch.tensor(rows), *key)
        for key, rows in groups.items()
    ]
    return grids, at > last, alike


def _shifted(logits: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    """logits + weight * shift, [R, V] from [R, V], [R] and [R, V]; where that is large, less its
    maximum, in float64 until then."""
    fused = torch.addcmul(logits, weight[:, None].float(), shift)
    large = weight.abs() * torch.maximum(-shift.amin(-1), shift.amax(-1)) > CANCELLING
    if large.any():
        at = large.nonzero()[:, 0]
        sums = torch.addcmul(logits[at].double(), weight[at, None], shift[at].double())
        fused[at] = sums.sub_(sums.amax(-1, keepdim=True)).float()
    return fused


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
    alpha: Tensor,  # [D, R, K], float64
    *,
    order: int = 2,
    ladder: Tensor | None = None,  # [R]
) -> Tensor:
    """A(a), A'(a), ... of the centred shifts at each alpha, [order, D, R, K], float64.

    If `ladder` is given, alpha grows by it from one candidate to the next, from 0 or above.
    """
    directions, rows, length = alpha.shape
    vocab = shifts.shape[-1]
    # what is live should stay in the cache of a core; a GPU only has to have the room
    room = 2 ** (28 if shifts.is_cuda else 20) // (min(length, LADDER) + order)
    piece = max(1, room // 8192) * 8192
    fit = room // min(piece, vocab)
    deep, high = max(1, min(fit, directions)), max(1, fit // directions)
    sums = alpha.new_zeros(directions, rows, order, length)
    moments = alpha.new_zeros(directions, rows, order)
    reach = shifts.new_empty(2, directions, rows)
    blocks = [
        (slice(i, i + deep), slice(j, j + high))
        for j in range(0, rows, high)
        for i in range(0, directions, deep)
    ]
    weights, ladder = alpha.float(), None if ladder is None else ladder.float()
    for at in blocks:
        shift, prob = shifts[at], probs[at[1]]
        centred = shift - (prob * shift).sum(-1, keepdim=True)
        reach[0][at], reach[1][at] = centred.amax(-1), centred.amin(-1)
        steps = None if ladder is None else ladder[at[1]]
        for p, d in zip(torch.split(prob, piece, -1), torch.split(centred, piece, -1), strict=True):
            powers = d.new_empty(*d.shape[:2], order, d.shape[-1])  # p, p d, p d^2, ...
            powers[:, :, 0] = p
            for n in range(1, order):
                torch.mul(powers[:, :, n - 1], d, out=powers[:, :, n])
            moments[at] += powers.sum(-1)
            parts = [_product(powers, tilt) for tilt in _tilts(d, weights[at], steps)]
            sums[at] += torch.cat(parts, -1)
    mean = moments[:, :, 1, None]  # what centring left by rounding
    raw = (sums + moments[..., None]).div_(1 + sums[:, :, :1])
    out = _centred(sums[:, :, 0].log1p() - alpha * mean, raw)
    out[1] -= mean
    wide = torch.maximum(alpha * reach[0][..., None], alpha * reach[1][..., None]) > STEEPEST
    if wide.any():
        _rescale(out, wide, logits, shifts, alpha)
    return out


def _rescale(
    out: Tensor,  # [order, D, R, K]
    wide: Tensor,  # [D, R, K]
    logits: Tensor,  # [R, V]
    shifts: Tensor,  # [D, R, V]
    alpha: Tensor,  # [D, R, K]
) -> None:
    """Puts the cumulants of the candidates that are `wide` into `out`, for shifts of any size.

    In float64, of which the exponents need the digits, relative to each candidate's largest one;
    few tokens are near enough to that to have a part.
    """
    room = 2 ** (26 if shifts.is_cuda else 19) // shifts.shape[-1]
    directions, rows = wide.any(-1).nonzero(as_tuple=True)
    high = max(1, room // wide.shape[-1])
    for i, j in zip(torch.split(directions, high), torch.split(rows, high), strict=True):
        x, shift = logits[j].double(), shifts[i, j].double()
        x -= x.logsumexp(-1, keepdim=True)
        d = shift - (x.exp() * shift).sum(-1, keepdim=True)
        columns = wide[i, j].any(0).nonzero()[:, 0]
        for k in torch.split(columns, max(1, room // len(i))):
            a = alpha[i, j][:, k]
            tilted = torch.addcmul(x[:, None], a[..., None], d[:, None])
            peak = tilted.amax(-1, keepdim=True)
            tilted -= peak
            near = tilted.amax((0, 1)) > -STEEPEST
            tilted, close = tilted[..., near].exp_(), d[:, near]
            total = tilted.sum(-1)
            powers = torch.stack([close**n for n in range(len(out))], 1)
            raw = (powers @ tilted.mT) / total[:, None]
            found = _centred(peak[..., 0] + total.log(), raw)
            at = i[:, None], j[:, None], k
            out[:, *at] = torch.where(wide[at], found, out[:, *at])


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
    return torch.stack([one @ other.mT for one, other in pieces]).sum(0, dtype=torch.float64)


def _tilts(d: Tensor, alpha: Tensor, step: Tensor | None) -> Iterator[Tensor]:
    """exp(alpha d) - 1 for d [D, R, V] and alpha [D, R, K], as [D, R, <= LADDER, V] in turn; each
    is valid until the next.

    Without the -1 the sums would lose their digits wherever expert and base nearly agree. On a
    ladder, where alpha grows by `step` [R], one exponential for its start and one for its step are
    enough: with `E_k` the value at its k-th rung, `E_{k+n} = E_k (1 + E_n) + E_n`, where all terms
    have one sign as long as the start is 0 or above, so that no digits cancel.
    """
    if step is None:
        for part in torch.split(alpha, LADDER, -1):
            yield (part[..., None] * d[:, :, None]).expm1_()
        return
    length = alpha.shape[-1]
    size = min(length, LADDER)
    tilt = d.new_empty(*d.shape[:2], size, d.shape[-1])
    start = alpha[..., :1]
    if start.is_cuda or start.any():
        torch.expm1(start * d, out=tilt[:, :, 0])
    else:
        tilt[:, :, 0] = 0  # the same, without an exponential
    done, rung = 1, (step[:, None] * d).expm1_()[:, :, None]
    while done < size:
        more, factor = min(done, size - done), rung + 1
        torch.addcmul(rung, tilt[:, :, :more], factor, out=tilt[:, :, done : done + more])
        done, rung = 2 * done, torch.addcmul(rung, rung, factor)
    yield tilt
    for left in range(length - size, 0, -size):
        torch.addcmul(rung, tilt, rung + 1, out=tilt)
        yield tilt[:, :, :left]


def _refine(
    logits: Tensor,  # [R, V]
    probs: Tensor,  # [R, V]
    aims: Aims,
    alpha: Tensor,  # [D, R], float64
    low: Tensor,  # [D, R]
    high: Tensor,  # [D, R]
    steps: int,
) -> Tensor:
    """The minimum of the loss near alpha, within low and high: loss, alpha and KLs, [4, D, R].

    Newton's method on the slope of the loss, kept in the interval where its sign changes; from a
    tenth, four steps reach the precision of float32.
    """
    for _ in range(steps):
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
