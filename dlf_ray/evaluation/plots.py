"""The pictures of a report: weights over the decoding steps, and how often an expert had which.

Everything but the marks is decided here, in the units of the drawing; the page's template
writes it down as SVG. Two kinds of plain charts do not warrant a plotting library in the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dlf_ray.evaluation.statistics import Steps, steps

POINTS = 80
"""At most, of a curve."""
REACHED = 0.05
"""Curves end where fewer of the answers go on."""

WIDTH, HEIGHT = 350, 200
LEFT, RIGHT, TOP, BOTTOM = 34, 268, 10, 166
"""The frame of the axes; expert names stand on its right."""
BAR_HEIGHT = 44
LABEL_GAP = 13


@dataclass(frozen=True)
class Curve:
    """One expert's mean weight over the positions, in the coordinates of the picture."""

    expert: str
    line: str
    band: str
    label_y: float


@dataclass(frozen=True)
class Bars:
    """How often one expert had which weight, leaving out 0."""

    expert: str
    note: str
    bars: list[tuple[float, float]]
    """Left edge and height."""
    width: float


@dataclass(frozen=True)
class Panel:
    """The weights of one method on one task, over the positions and as a whole."""

    method: str
    note: str
    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    bars: list[Bars]
    bar_ticks: list[tuple[float, str]]


def panels(parts: list[tuple[str, pa.Table]], experts: list[str]) -> tuple[list[Panel], list[str]]:
    """The pictures of one task, all to one scale, and the methods that need none, in words."""
    found: list[tuple[str, dict[str, Steps]]] = []
    constant = []
    for method, part in parts:
        own = steps(part)
        own = {name: own[name] for name in experts if name in own and len(own[name].weight)}
        if own and all(np.ptp(each.weight) == 0 for each in own.values()):
            words = ", ".join(f"{name} {each.weight[0]:g}" for name, each in own.items())
            constant.append(f"{method}: {words}")
        elif own:
            found.append((method, own))
    if not found:
        return [], constant
    weights = np.concatenate([each.weight for _, own in found for each in own.values()])
    span = min(0.0, float(weights.min())), max(0.1, float(weights.max()))
    means = [{name: _mean_by_position(each) for name, each in own.items()} for _, own in found]
    tops = [float(mean.high.max()) for each in means for mean in each.values()]
    y_span = span[0], 1.05 * max(0.1, *tops)
    pairs = zip(found, means, strict=True)
    return [_panel(method, own, mean, span, y_span) for (method, own), mean in pairs], constant


def _panel(
    method: str,
    own: dict[str, Steps],
    means: dict[str, Means],
    span: tuple[float, float],
    y_span: tuple[float, float],
) -> Panel:
    end = max(mean.end for mean in means.values())

    def x(position: np.ndarray | float) -> Any:
        return LEFT + (RIGHT - LEFT) * (position - 0.5) / end

    def y(weight: np.ndarray | float) -> Any:
        return BOTTOM - (BOTTOM - TOP) * _share(np.maximum(weight, y_span[0]), *y_span)

    labels = _apart({name: float(y(mean.mean[-1])) for name, mean in means.items()})
    curves = []
    for name, mean in means.items():
        band = [*zip(x(mean.position), y(mean.high), strict=True)]
        band += reversed([*zip(x(mean.position), y(mean.low), strict=True)])
        line = _points(zip(x(mean.position), y(mean.mean), strict=True))
        curves.append(Curve(name, line, _points(band), round(labels[name], 1)))
    first = next(iter(own.values()))
    return Panel(
        method=method,
        note=f"{(first.position == 0).sum():,} answers, {len(first.weight):,} tokens",
        curves=curves,
        x_ticks=[(round(x(t), 1), f"{t:g}") for t in _ticks(1, end, 5) if t == int(t)],
        y_ticks=[(round(y(t), 1), f"{t:g}") for t in _ticks(*y_span, 5)],
        bars=[_bars(name, each, *span) for name, each in own.items()],
        bar_ticks=[
            (round(LEFT + (RIGHT - LEFT) * _share(t, *span), 1), f"{t:g}") for t in _ticks(*span, 5)
        ],
    )


@dataclass(frozen=True)
class Means:
    """One expert's mean weight with the 95% interval of the mean, by position [points]."""

    position: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    end: int
    """How many positions the points cover."""


def _mean_by_position(of: Steps) -> Means:
    reached = np.bincount(of.position)
    end = int((reached >= REACHED * reached[0]).sum())
    width = math.ceil(end / POINTS)  # positions to a point
    inside = of.position < end
    point, weight = of.position[inside] // width, of.weight[inside].astype(np.float64)
    count = np.bincount(point)
    mean = np.bincount(point, weight) / count
    variance = np.maximum(np.bincount(point, weight**2) / count - mean**2, 0)
    # Neighbouring tokens of an answer are no independent witnesses: count the answers.
    half = 1.96 * np.sqrt(variance / np.maximum(count / width, 1))
    position = (np.arange(len(count)) + 0.5) * width + 0.5
    return Means(position, mean, mean - half, mean + half, end)


def _share(value: Any, low: float, high: float) -> Any:
    return (value - low) / (high - low or 1)


def _bars(name: str, of: Steps, low: float, high: float) -> Bars:
    """Weights other than 0, in bars of 0.1 or a multiple, around their middles."""
    width = 0.1 * max(1, math.ceil((high - low) / 0.1 / 40))
    loud = of.weight[of.weight != 0]
    index, counts = np.unique(np.round(loud / width).astype(int), return_counts=True)
    unit = (RIGHT - LEFT) * width / (high - low or 1)
    peak = counts.max() if len(counts) else 1
    bars = [
        (
            round(LEFT + (RIGHT - LEFT) * float(_share(i * width, low, high)) - unit / 2, 1),
            round(float(BAR_HEIGHT * n / peak), 1),
        )
        for i, n in zip(index, counts, strict=True)
    ]
    silent = 1 - len(loud) / len(of.weight)
    note = f"mean {of.weight.mean():.2f}, 0 at {silent:.0%}"
    return Bars(name, note, bars, round(max(unit - 1, 1), 1))


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`."""
    span = high - low or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _apart(places: dict[str, float]) -> dict[str, float]:
    """Labels moved so far that they do not overlap."""
    moved: dict[str, float] = {}
    last = TOP - LABEL_GAP + 4.0
    for name in sorted(places, key=lambda each: places[each]):
        moved[name] = last = max(places[name], last + LABEL_GAP)
    over = max(0.0, last - BOTTOM)
    return {name: place - over for name, place in moved.items()}


def _points(pairs: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)
