"""What an evaluation leaves behind: one run is one folder, and the folder is one Parquet data set.

A run of hours is killed sooner or later. So rows go to disk in small files that appear whole or not
at all, nothing is ever rewritten, and whoever opens the folder again sees what is done. Several
writers may share a folder. Reading needs nothing but this file: every row knows where it came from.

    folder/run-<hash>.json           settings that determine rows, of one run; together they agree
    folder/part-<time>-<id>.parquet  rows, complete; any other name is not part of the data
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        # What was asked
        pa.field("task", pa.string(), nullable=False),
        ("task_version", pa.string()),
        pa.field("method", pa.string(), nullable=False),
        pa.field("item", pa.string(), nullable=False),
        ("group", pa.string()),  # a part of the task, such as a subject; null if it has none
        ("shots", pa.int32()),
        ("shots_for", pa.string()),  # the models whose prompt holds the examples
        ("prompt_hash", pa.string()),  # of all that the item is: prompt, choices, right answers
        # What was answered
        ("text", pa.string()),
        ("pieces", pa.list_(pa.string())),  # the text of each token
        ("token_ids", pa.list_(pa.int32())),
        ("scores", pa.map_(pa.string(), pa.float64())),  # the task's main metric first
        ("finish_reason", pa.string()),
        ("error", pa.string()),  # null if there was none
        # How it was fused, per token
        ("expert_names", pa.list_(pa.string())),
        ("weights", pa.list_(pa.list_(pa.float32()))),  # [tokens, expert_names]
        ("experts", pa.list_(pa.string())),  # who carried it; null for the large model alone
        ("kl", pa.list_(pa.list_(pa.float32()))),
        # Likelihood items, per choice
        ("logprobs", pa.list_(pa.float64())),
        ("is_greedy", pa.list_(pa.bool_())),
        ("choice", pa.int32()),
        # What it cost
        ("seconds", pa.float64()),  # the item's share of the time on the clock
        ("tokens", pa.int32()),
        # Where it came from
        ("commit", pa.string()),
        ("family_digest", pa.string()),
        ("models", pa.string()),
        ("rule", pa.string()),
        ("seed", pa.int64()),
        ("dlf_version", pa.string()),
    ]
)
KEY = ["task", "method", "item"]
PER_TOKEN = ["pieces", "token_ids", "weights", "experts", "kl"]
"""Each of these is empty, or has an entry for every token."""
PROVENANCE = ["commit", "dlf_version", "family_digest", "models", "rule", "seed"]

FLUSH_ROWS = 256
FLUSH_SECONDS = 30.0

UPPER_BOUND = "upper-bound"
"""The method that others are measured against, such as the large model fully fine-tuned."""
RESAMPLES = 1000
SEED = 0

Key: TypeAlias = "tuple[str, str, str]"


class Results:
    """The folder of one run, open for writing, for one thread.

    `config` is everything that determines the rows, in nested mappings. What earlier runs of the
    folder have set has to be the same; what they have not, such as one more method, is added.
    Raises `ValueError`, naming each difference, where it is not, or where the folder cannot be
    written.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _claim(self.folder, config)
        except OSError as error:
            raise ValueError(f"cannot write results to {self.folder}: {error}") from error
        self.done: dict[Key, str | None] = {}
        """(task, method, item) of all rows, those not yet on disk too, and their `prompt_hash`. A
        row with an error is done as well: what should be tried again must not be added."""
        for path in _parts(self.folder):
            table = _load(path, [*KEY, "prompt_hash"])
            self.done.update(zip(_keys(table), table["prompt_hash"].to_pylist(), strict=True))
        self._rows: list[pa.RecordBatch] = []
        self._flushed = time.monotonic()

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes one row; columns that it does not name are null.

        Raises `ValueError`, with nothing added, where the row does not fit `SCHEMA`, its per-token
        columns differ in length, a score is not finite, or its key is there already.
        """
        batch = _checked(row)
        (key,) = _keys(batch)
        if key in self.done:
            raise ValueError(f"{self.folder} already has a row for {key}")
        self._rows.append(batch)
        self.done[key] = row.get("prompt_hash")
        if len(self._rows) >= FLUSH_ROWS or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Puts all rows so far on disk; they stay queued where that fails."""
        if self._rows:
            table = pa.Table.from_batches(self._rows, SCHEMA)
            # The time first, so that sorting by name is sorting by age.
            name = f"part-{time.time_ns():020d}-{uuid.uuid4().hex}.parquet"
            with Appearing(self.folder / name) as file:
                pq.write_table(table, file, compression="zstd")
            self._rows = []
        self._flushed = time.monotonic()

    def close(self) -> None:
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(folder: str | Path) -> pa.Table:
    """All rows of a run, sorted by task, method and item.

    There is exactly one row for each. Only two writers that work on the same item at the same time
    can leave two; then the one that reached the disk first counts.
    Raises `ValueError` where there is no row, or a file is not of this format.
    """
    paths = _parts(Path(folder))
    if not paths:
        raise ValueError(f"{folder} holds no results (no part-*.parquet)")
    table = pa.concat_tables([_load(path) for path in paths])
    first: dict[Key, int] = {}
    for index, key in enumerate(_keys(table)):
        first.setdefault(key, index)
    return table.take([first[key] for key in sorted(first)])


def read_config(folder: str | Path) -> dict[str, Any]:
    """The settings of all runs of a folder. Raises `ValueError` where it has none."""
    whole: dict[str, Any] = {}
    found = list(_settings(Path(folder)))
    for config in found:
        whole = _merged(whole, config)
    if not found:
        raise ValueError(f"{folder} has no run-*.json that says how it was made")
    return whole


# ---------------------------------------------------------------- what the rows amount to


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
    for index, (task, method, _) in enumerate(_keys(table)):
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


# ---------------------------------------------------------------- files


class Appearing:
    """A file that is there completely or not at all, whenever the machine stops."""

    def __init__(self, path: Path, publish: Callable[[Path, Path], object] = os.replace) -> None:
        self.path, self.publish = path, publish
        self.hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")

    def __enter__(self) -> Any:
        self.file = open(self.hidden, "xb")
        return self.file

    def __exit__(self, failed: object, *_: object) -> None:
        try:
            with self.file:
                if not failed:
                    self.file.flush()
                    os.fsync(self.file.fileno())
            if not failed:
                self.publish(self.hidden, self.path)
                _sync(self.path.parent)
        finally:
            self.hidden.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Makes the names in a folder outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _claim(folder: Path, config: Mapping[str, Any]) -> None:
    """Holds the settings against those that are there, and adds them."""
    try:
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"the settings of a run must be JSON: {error}") from None
    here = json.loads(text)
    if _parts(folder) and not any(folder.glob("run*.json")):
        raise ValueError(f"{folder} holds results but no run-*.json that says what they are")
    _check_settings(folder, here)
    path = folder / f"run-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    try:
        # Whether or not it is needed: a folder that cannot be written is found out at once.
        with Appearing(path, _create) as file:
            file.write(text.encode() + b"\n")
    except FileExistsError:
        return
    try:
        _check_settings(folder, here)  # another run may have come in between
    except ValueError:
        path.unlink(missing_ok=True)
        raise


def _check_settings(folder: Path, here: Mapping[str, Any]) -> None:
    """Raises `ValueError` with what differs from the settings of the folder."""
    lines = [line for there in _settings(folder) for line in _differences(there, here)]
    if lines:
        message = f"{folder} holds a run with other settings; take another folder:"
        raise ValueError("\n".join([message, *dict.fromkeys(lines)]))


def _settings(folder: Path) -> Iterator[dict[str, Any]]:
    """What the runs of a folder have set, in no order that matters."""
    for path in sorted(folder.glob("run*.json")):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the settings of the run, {path}: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path} is not a mapping")
        yield config


def _differences(there: Any, here: Any, where: str = "") -> Iterator[str]:
    """What both set, and not alike: a line each, with the dotted key."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() & here.keys()):
            yield from _differences(there[key], here[key], f"{where}.{key}" if where else key)
    elif there != here:
        old, new = (json.dumps(each, ensure_ascii=False) for each in (there, here))
        yield f"  {where}: {old} there, {new} now"


def _merged(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """All that either mapping sets."""
    whole = dict(one)
    for key, value in two.items():
        both = isinstance(value, dict) and isinstance(whole.get(key), dict)
        whole[key] = _merged(whole[key], value) if both else value
    return whole


def _create(hidden: Path, path: Path) -> None:
    """Gives a file its name, unless another writer was faster."""
    try:
        os.link(hidden, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, such as a mounted bucket
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(hidden, path)


def _parts(folder: Path) -> list[Path]:
    """The complete files, oldest first."""
    return sorted(folder.glob("part-*.parquet"))


def _load(path: Path, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
    try:
        table = pq.ParquetFile(path).read(columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    wanted = pa.schema([SCHEMA.field(name) for name in columns])
    if not table.schema.equals(wanted):
        raise ValueError(f"{path} was written by another version: its columns differ")
    return table


def _keys(rows: pa.Table | pa.RecordBatch) -> Iterable[Key]:
    return zip(*(rows[name].to_pylist() for name in KEY), strict=True)


def _checked(row: Mapping[str, Any]) -> pa.RecordBatch:
    """A row as Arrow holds it."""
    if unknown := row.keys() - set(SCHEMA.names):
        raise ValueError(f"unknown columns {sorted(unknown)}; there are {SCHEMA.names}")
    where = tuple(row.get(name) for name in KEY)
    if not all(isinstance(each, str) and each for each in where):
        raise ValueError(f"a row needs the strings {KEY}; it has {where}")
    lengths = {name: len(row[name]) for name in PER_TOKEN if row.get(name)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{where}: an entry per token each, but there are {lengths}")
    names = row.get("expert_names") or []
    if any(len(each) != len(names) for each in row.get("weights") or []):
        raise ValueError(f"{where}: every token needs a weight for each of {names}")
    scores = dict(row.get("scores") or {})
    for metric, value in scores.items():
        if value is None or not math.isfinite(value):
            raise ValueError(f"{where}: the score {metric} is {value}")
    try:
        return pa.RecordBatch.from_pylist([{**row, "scores": list(scores.items())}], SCHEMA)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
