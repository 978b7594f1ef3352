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
from pathlib import Path
from typing import Any, Self, TypeAlias

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
            self.done.update(zip(keys_of(table), table["prompt_hash"].to_pylist(), strict=True))
        self._rows: list[pa.RecordBatch] = []
        self._flushed = time.monotonic()

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes one row; columns that it does not name are null.

        Raises `ValueError`, with nothing added, where the row does not fit `SCHEMA`, its per-token
        columns differ in length, a score is not finite, or its key is there already.
        """
        batch = _checked(row)
        (key,) = keys_of(batch)
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
    for index, key in enumerate(keys_of(table)):
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


def keys_of(rows: pa.Table | pa.RecordBatch) -> Iterable[Key]:
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
