"""Rows of evaluation data: from local files in the published formats, or from the Hugging Face hub.

A row that cannot be read is passed on with the reason; what is done about it is up to the caller.
"""

from __future__ import annotations

import csv
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

Split: TypeAlias = Literal["test", "train"]
"""`test` is what is scored; `train` is where examples come from, for prompts and for training."""
Values: TypeAlias = Mapping[str, Any]
SURROGATE = re.compile("[\ud800-\udfff]")
"""Of a pair, which is no text by itself; also how Python keeps a byte that is not UTF-8."""


@dataclass(frozen=True)
class Row:
    """One record of a file or of a data set."""

    where: str
    """For people: file and line."""
    file: str
    """The file's name without its ending; on the hub, the split's."""
    number: int
    """Counts the records of the file from 0."""
    values: Values = field(default_factory=dict)
    wrong: str = ""
    """Why it could not be read, where it could not."""

    @property
    def name(self) -> str:
        """Says which record this is, the same in every run."""
        return f"{self.file}-{self.number}"

    def __getitem__(self, column: str) -> Any:
        """Raises `ValueError`, with the columns there are, for one that is missing or empty."""
        value = self.values.get(column)
        if value is None:
            what = "is empty in" if column in self.values else "is not in"
            raise ValueError(f"column {column!r} {what} {list(self.values)}")
        return value

    def text(self, column: str) -> str:
        """A column that has to hold text. Raises `ValueError` where it does not."""
        value = self[column]
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"column {column!r} must be text, not {value!r}")
        return value


def unchanged(values: Values) -> Values:
    """For data sets that have the published fields on the hub too."""
    return values


@dataclass(frozen=True)
class Source:
    """Where the rows of a data set are."""

    folder: str
    """Its place in a folder that holds all data sets."""
    files: Mapping[Split, Sequence[str]]
    """Glob patterns of the published files; the first that matches anything is read."""
    hub: str
    config: str | None = None
    splits: Mapping[Split, str] = field(default_factory=dict)
    """The splits' names on the hub."""
    published: Callable[[Values], Values] = unchanged
    """Turns the hub's fields into those of the published files."""
    columns: Sequence[str] = ()
    """Of CSV files without a header."""

    def rows(self, path: str | Path | None, split: Split) -> Iterator[Row]:
        """Rows of a local file or folder, or of a data set on the hub; without a path, of the one
        that the benchmark's authors or the hub's users keep there.

        Raises `ValueError`, saying what to pass, where there is nothing to read.
        """
        path = str(path or self.hub)
        if Path(path).exists():
            for file in self._find(Path(path), split):
                yield from read(file, self.columns)
            return
        if split not in self.splits:
            raise ValueError(self._lacks(split))
        try:
            yield from self._from_hub(path, split)
        except ConnectionError as error:
            wanted = (
                f"folder with {' or '.join(self.files[split])}" if self.files[split] else "file"
            )
            raise ValueError(
                f"{path} is no local file or folder, and no data set of that name could be loaded "
                f"from the Hugging Face hub ({error}); pass a {wanted}, or another data set's name"
            ) from None

    def _find(self, path: Path, split: Split) -> list[Path]:
        if path.is_file() and split == "test":
            return [path]
        # Training examples stand beside the file, or beside its folder.
        folders = [path.parent, path.parent.parent] if path.is_file() else [path]
        for folder in [*folders, path / self.folder]:
            for pattern in self.files[split]:
                if found := sorted(folder.glob(pattern)):
                    return found
        if not self.files[split]:
            raise ValueError(self._lacks(split))
        raise ValueError(
            f"{path} has nothing to read for the {split} split; it should hold "
            f"{' or '.join(self.files[split])}"
        )

    def _lacks(self, split: Split) -> str:
        return f"{self.folder} has no {split} split, so there are no examples to put into prompts"

    def _from_hub(self, name: str, split: Split) -> Iterator[Row]:
        """Raises `ConnectionError` for whatever kept the data set from being loaded."""
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or Path(name).suffix in READERS:
            raise ConnectionError("not a name that a data set can have")
        import datasets  # slow to import

        named = self.splits[split]
        try:
            data = datasets.load_dataset(name, self.config, split=named)
        except Exception as error:  # a dozen kinds, from offline to a missing split
            reason = (str(error).splitlines() or [""])[0]
            raise ConnectionError(f"{type(error).__name__}: {reason}") from None
        for number, values in enumerate(data):
            given, wrong = _converted(values, self.published)
            yield Row(f"{name}:{named}[{number}]", named, number, given, wrong)


def _converted(values: Values, published: Callable[[Values], Values]) -> tuple[Values, str]:
    """The published fields, or why they cannot be made of these."""
    try:
        return published(values), ""
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return {}, f"other fields than expected, {list(values)}: {error!r}"


def read(file: Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Every record of a file, by its ending; the unreadable ones too, with the reason.

    Raises `ValueError` for an ending that is not known and for a file that is none of its kind.
    """
    if file.suffix not in READERS:
        raise ValueError(f"{file}: can read {', '.join(READERS)}, not {file.suffix!r} files")
    try:
        for number, (where, values, wrong) in enumerate(READERS[file.suffix](file, columns)):
            if not wrong and not isinstance(values, dict):
                wrong = "not an object with named fields"
            if not wrong and (column := _unreadable(values)):
                wrong = f"column {column!r} is not UTF-8 text"
            given = {} if wrong else values
            yield Row(f"{file.name}:{where}", file.stem, number, given, wrong)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None


def _unreadable(values: Values) -> str | None:
    """A column whose text holds half a character, which nothing can be done with."""
    for column, value in values.items():
        text = (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        )
        if SURROGATE.search(text):
            return column
    return None


Record: TypeAlias = "tuple[int, Any, str]"
"""A line's (else a record's) number, its values, and why they could not be read."""


def _jsonl(file: Path, _: Sequence[str]) -> Iterator[Record]:
    # In bytes: one bad byte spoils one line, and only \n ends a line.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line.decode("utf-8-sig")), ""
                except (ValueError, RecursionError) as error:
                    yield number, None, f"not JSON: {error}"


def _json(file: Path, _: Sequence[str]) -> Iterator[Record]:
    try:
        records = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"{file} must hold a list of items")
    for number, record in enumerate(records, 1):
        yield number, record, ""


def _csv(file: Path, columns: Sequence[str]) -> Iterator[Record]:
    # The encoding drops the byte-order mark of files that come from spreadsheets. What is not UTF-8
    # is kept as it is, for `read` to find in its own record only.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        header, again, number = list(columns), deque[str](), 1
        while True:
            taken: list[str] = []
            record, wrong = _next_record(chain(_popped(again), lines), taken)
            if not taken:
                return
            start, number = number, number + len(taken)
            if wrong:  # a quote that was never closed may have taken all lines after it
                again.extendleft(reversed(taken[1:]))
                number = start + 1
                yield start, None, wrong
            elif not header:
                header = record
            elif len(record) == len(header):
                yield start, dict(zip(header, record, strict=True)), ""
            elif record:
                yield start, None, f"{len(record)} columns instead of {len(header)}"


def _next_record(lines: Iterable[str], taken: list[str]) -> tuple[list[str], str]:
    """The next record, or what is wrong with it; `taken` gets its lines."""

    def noted() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line

    try:
        return next(csv.reader(noted(), strict=True), []), ""
    except csv.Error as error:
        return [], f"not CSV: {error}"


def _popped(lines: deque[str]) -> Iterator[str]:
    while lines:
        yield lines.popleft()


def _parquet(file: Path, _: Sequence[str]) -> Iterator[Record]:
    from pyarrow import ArrowInvalid, parquet

    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            for values in batch.to_pylist():
                yield 0, values, ""
    except ArrowInvalid as error:
        raise ValueError(f"{file} is not a Parquet file: {error}") from None


READERS: Mapping[str, Callable[[Path, Sequence[str]], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
