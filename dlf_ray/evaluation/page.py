"""What a page of a report shows, before it is written as Markdown or HTML."""

from __future__ import annotations

from dataclasses import dataclass

from dlf_ray.evaluation.plots import (
    Panel,
)


@dataclass(frozen=True)
class Whisker:
    """A mean and its interval, from 0 at the left end of the picture to 100 at the right."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    text: str
    small: str = ""
    notes: str = ""
    """What sets this cell apart from the others of its column."""
    whisker: Whisker | None = None


@dataclass(frozen=True)
class Table:
    head: list[Cell]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Token:
    text: str
    expert: str | None
    hover: str


@dataclass(frozen=True)
class Answer:
    """What one method said to one item."""

    method: str
    score: str
    good: bool | None
    """Whether a metric of 0 or 1 was 1."""
    notes: list[str]
    tokens: list[Token]
    cut: str


@dataclass(frozen=True)
class Item:
    name: str
    about: str
    answers: list[Answer]


@dataclass(frozen=True)
class Task:
    name: str
    about: str
    details: Table
    groups: Table | None
    panels: list[Panel]
    constant: list[str]
    """Methods whose weights never change, in words."""
    items: list[Item]


@dataclass(frozen=True)
class Page:
    title: str
    facts: list[tuple[str, str]]
    mixed: list[str]
    """What should be the same in all rows and is not."""
    config: str
    scores: Table
    closes_gap: bool
    experts: list[str]
    tasks: list[Task]
