"""What is known of a model before it is loaded, and what is to be said against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Problem:
    """Something about a family: an `error` has to change, a `warning` is what may surprise."""

    kind: Literal["error", "warning"]
    text: str
    model: str | None = None
    """Its name in the family; None where it is about the whole."""
    here: bool = False
    """Whether it may be otherwise on another machine: a folder, or a library, that is not here."""


@dataclass(frozen=True)
class Verdict:
    """Whether a backend takes a model."""

    problems: tuple[Problem, ...] = ()
    """Errors are why not; warnings, why that cannot be said."""

    @property
    def takes(self) -> bool | None:
        """None if that cannot be said."""
        kinds = {each.kind for each in self.problems}
        return False if "error" in kinds else None if kinds else True


@dataclass(frozen=True)
class Lora:
    """What an adapter says of itself."""

    kind: str
    rank: int | None
    """The highest, where layers differ."""
    targets: tuple[str, ...]
    """The modules that it changes, or one pattern of their names."""
    over: str
    """The base that it was trained over, as it names it; empty if it does not."""


@dataclass(frozen=True)
class Facts:
    """One model, as far as it is known; None is what is not."""

    source: str
    where: Literal["folder", "file", "cache", "hub", ""] = ""
    """Where it was found: nowhere if empty."""
    architecture: str | None = None
    backend: str = "transformers"
    """Which one would compute it, in this process."""
    transformers: Verdict = Verdict()
    vllm: Verdict = Verdict()
    tokens: int | None = None
    """Of its tokenizer; an adapter over the family's base has the base's."""
    vocabulary: Mapping[str, int] | None = field(default=None, repr=False)
    split: tuple[int, ...] = field(default=(), repr=False)
    """How its tokenizer splits a sample of text."""
    chat_template: str | None = field(default=None, repr=False)
    end_tokens: tuple[int, ...] = ()
    context: int | None = None
    """Positions it was made for; None also where it does not say."""
    dtype: str | None = None
    """In which it is computed."""
    weight_bytes: int | None = None
    """In that type; of an adapter over the family's base, what comes to the base's."""
    position_bytes: int | None = None
    """Of one token's keys and values in all layers."""
    adapter: Lora | None = None
    problems: tuple[Problem, ...] = ()
    """With those of the backend that would compute it."""
