"""What the rows of a run amount to: means, intervals, weights over the steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa

from dlf_ray.evaluation.results import KEY, UPPER_BOUND, keys_of

RESAMPLES = 1000


SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% confidence interval, and how that was found."""

    mean: float
    low: float
    high: float
    items: int
    interval: Literal["Wilson", "bootstrap"]


@dataclass(frozen=True)
class Row:
    """One method on one task."""

    task: str
    method: str
    items: int
    errors: int
    """Items that failed; those without a score are in no mean."""
    shots: str
    """The number of examples, and for whom: "5 (large)"; several are listed."""
    seconds: float
    tokens: int
    scores: dict[str, Estimate]
    """By metric; the task's main metric is the first."""
    groups: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    """By group and metric; empty where the task has no groups."""
    macro: dict[str, Estimate] = field(default_factory=dict)
    """The mean of the groups' means, whatever their sizes."""
    weights: dict[str, float] = field(default_factory=dict)
    """The mean weight of each expert over all tokens that it could have steered."""
    gap_closed: dict[str, float] = field(default_factory=dict)
    """The mean as a share of the upper bound's, by metric, where that was run."""

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    @property
    def items_per_second(self) -> float | None:
        """What counts for likelihoods and short answers."""
        return self.items / self.seconds if self.seconds else None


def summary(table: pa.Table) -> list[Row]:
    """One row per task and method, sorted.

    Intervals are Wilson's (1927) where all of a task's values of a metric are 0 or 1, else those of
    a bootstrap over the items (over those of each group for macro averages) with a fixed seed.
    """
    binary = _binary(table)
    rows = [_row(*each, binary) for each in by_method(table.select(_SUMMARISED))]
    bounds = {row.task: row.scores for row in rows if row.method == UPPER_BOUND}
    for row in rows:
        for metric, score in row.scores.items():
            bound = bounds.get(row.task, {}).get(metric)
            if bound and bound.mean:
                row.gap_closed[metric] = score.mean / bound.mean
    return rows


def by_method(table: pa.Table) -> Iterator[tuple[str, str, pa.Table]]:
    """The rows of each task and method, sorted by these, one after the other."""
    members: dict[tuple[str, str], list[int]] = {}
    for index, (task, method, _) in enumerate(keys_of(table)):
        members.setdefault((task, method), []).append(index)
    for task, method in sorted(members):
        yield task, method, table.take(members[task, method])


def wilson(values: np.ndarray) -> Estimate:
    """For values [n] that are 0 or 1; sound near both ends."""
    z, n, p = 1.959964, len(values), float(values.mean())
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n, "Wilson")


def bootstrap(groups: Sequence[np.ndarray]) -> Estimate:
    """For the mean of the groups' means: each group [n] is resampled by itself (percentiles)."""
    random = np.random.default_rng(SEED)
    means = np.mean([_resampled(values, random) for values in groups], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    mean = float(np.mean([values.mean() for values in groups]))
    return Estimate(mean, float(low), float(high), sum(map(len, groups)), "bootstrap")


def _resampled(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The means [RESAMPLES] of samples of values [n] with replacement."""
    n, block = len(values), max(1, 2**20 // len(values))
    sizes = [min(block, RESAMPLES - begin) for begin in range(0, RESAMPLES, block)]
    return np.concatenate([values[random.integers(0, n, (k, n))].mean(axis=1) for k in sizes])


@dataclass(frozen=True)
class Steps:
    """The weights that one expert had, a value per token."""

    weight: np.ndarray
    position: np.ndarray
    """Of the token in its answer, from 0."""


def steps(table: pa.Table) -> dict[str, Steps]:
    """All decoded tokens of a table, by the experts that could have steered them."""
    tokens = _joined(table, "weights")
    values = tokens.flatten()
    rows = tokens.value_parent_indices().to_numpy()
    token = values.value_parent_indices().to_numpy()
    names = _joined(table, "expert_names")
    codes = names.flatten().dictionary_encode()
    # The k-th weight of a token belongs to the k-th name of its row.
    name = codes.indices.to_numpy()[_starts(names)[rows[token]] + _rank(token)]
    weight, position = values.flatten().to_numpy(), _rank(rows)[token]
    return {
        expert: Steps(weight[name == code], position[name == code])
        for code, expert in enumerate(codes.dictionary.to_pylist())
    }


_SUMMARISED = [
    *KEY,
    "group",
    "shots",
    "shots_for",
    "scores",
    "error",
    "expert_names",
    "weights",
    "seconds",
    "tokens",
]


def _row(task: str, method: str, part: pa.Table, binary: set[tuple[str, str]]) -> Row:
    def estimate(metric: str, values: np.ndarray) -> Estimate:
        return wilson(values) if (task, metric) in binary else bootstrap([values])

    groups: dict[str, dict[str, Estimate]] = {}
    scores, macro = {}, {}
    for metric, (values, labels) in _values(part).items():
        scores[metric] = estimate(metric, values)
        members = {str(label): values[labels == label] for label in np.unique(labels) if label}
        for label, own in members.items():
            groups.setdefault(label, {})[metric] = estimate(metric, own)
        if members:
            macro[metric] = bootstrap(list(members.values()))
    return Row(
        task=task,
        method=method,
        items=len(part),
        errors=len(part) - part["error"].null_count,
        shots=_shots(part),
        seconds=sum(each or 0.0 for each in part["seconds"].to_pylist()),
        tokens=sum(each or 0 for each in part["tokens"].to_pylist()),
        scores=scores,
        groups=groups,
        macro=macro,
        weights={name: float(s.weight.mean()) for name, s in steps(part).items() if len(s.weight)},
    )


def _values(part: pa.Table) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By metric: the values and, beside them, the groups ("" for none)."""
    found: dict[str, tuple[list[float], list[str]]] = {}
    for scores, group in zip(part["scores"].to_pylist(), part["group"].to_pylist(), strict=True):
        for metric, value in scores or []:
            values, labels = found.setdefault(metric, ([], []))
            values.append(value)
            labels.append(group or "")
    return {name: (np.array(values), np.array(labels)) for name, (values, labels) in found.items()}


def _binary(table: pa.Table) -> set[tuple[str, str]]:
    """The (task, metric) whose every value is 0 or 1, whatever the method."""
    ok: dict[tuple[str, str], bool] = {}
    for task, scores in zip(table["task"].to_pylist(), table["scores"].to_pylist(), strict=True):
        for metric, value in scores or []:
            ok[task, metric] = ok.get((task, metric), True) and value in (0.0, 1.0)
    return {key for key, all_so in ok.items() if all_so}


def _shots(part: pa.Table) -> str:
    pairs = set(zip(part["shots"].to_pylist(), part["shots_for"].to_pylist(), strict=True))
    words = [f"{n} ({who})" if n and who else str(n) for n, who in pairs if n is not None]
    return ", ".join(sorted(set(words)))


def _joined(table: pa.Table, column: str) -> pa.Array:
    """A column as one array."""
    return table[column].combine_chunks()


def _starts(lists: pa.Array) -> np.ndarray:
    """Where each list begins in the flattened array."""
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else lengths


def _rank(parents: np.ndarray) -> np.ndarray:
    """How many entries with the same parent come before each; parents are sorted."""
    index = np.arange(len(parents))
    first = np.r_[True, parents[1:] != parents[:-1]] if len(parents) else np.zeros(0, bool)
    return index - np.maximum.accumulate(np.where(first, index, 0)) if len(parents) else index
