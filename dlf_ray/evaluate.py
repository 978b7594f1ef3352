"""Methods side by side on one set of prompts with known answers, scored by strict exact match."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dlf_ray.config import BASE, Family, Select
from dlf_ray.frontend import BaseEngine, FusionOptions, Output
from dlf_ray.messages import SamplingParams

SELECTS: tuple[Select, ...] = ("paper", "strongest", "blend")
METHODS = "large, base, expert:NAME, static, static:WEIGHT, dynamic, " + ", ".join(
    f"dynamic:{select}" for select in SELECTS
)


@dataclass(frozen=True)
class Item:
    """A prompt and its one right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Score:
    """How often one method was right."""

    right: int
    items: int
    seconds: float = 0.0
    tokens: int = 0

    @property
    def percent(self) -> float:
        return 100 * self.right / self.items

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% confidence interval in percent (Wilson 1927), sound near 0 and 100 as well."""
        z, n, p = 1.959964, self.items, self.right / self.items
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def read_items(path: str | Path, limit: int | None = None) -> list[Item]:
    """Items of a JSONL file, a `prompt` and an `answer` a line.

    Raises `ValueError`, with the number of the line, where one has not both.
    """
    items = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                raw = json.loads(line)
                item = Item(raw["prompt"], raw["answer"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{path}, line {number}: not {{"prompt": ..., "answer": ...}} ({error!r})'
                ) from None
            if not isinstance(item.prompt, str) or not isinstance(item.answer, str):
                raise ValueError(f"{path}, line {number}: prompt and answer must be strings")
            items.append(item)
    if not items:
        raise ValueError(f"{path} holds no items")
    return items[:limit]


def method_options(
    method: str, family: Family, experts: Sequence[str] | None = None
) -> FusionOptions:
    """What a method's name stands for; `experts` are those that take part in fusion, else all.

    Raises `ValueError`, listing the methods, for a name that is none.
    """
    kind, _, detail = method.partition(":")
    names = list(family.experts if experts is None else experts)
    if kind == "large" and not detail:
        return {"experts": []}
    if kind == BASE and not detail:
        return {"alone": BASE}
    if kind == "expert" and detail in family.experts:
        return {"alone": detail}
    if kind == "static":
        try:
            weight = float(detail or 1.0)
        except ValueError:
            raise ValueError(f"{method!r}: the weight {detail!r} is not a number") from None
        return {"rule": "static", "experts": names, "weights": dict.fromkeys(names, weight)}
    if kind == "dynamic":
        rule = "grid" if family.fusion.rule == "static" else family.fusion.rule
        for select in SELECTS:
            if detail == select:
                return {"rule": rule, "select": select, "experts": names}
        if not detail:
            return {"rule": rule, "experts": names}
    raise ValueError(
        f"unknown method {method!r}; there are {METHODS}, with NAME one of {list(family.experts)}"
    )


def evaluate(
    engine: BaseEngine,
    items: Sequence[Item],
    options: FusionOptions,
    *,
    max_tokens: int = 32,
    progress: bool = False,
) -> Score:
    """Greedy answers to all items, by one method."""
    sampling = SamplingParams(max_tokens=max_tokens)
    began = time.perf_counter()
    outputs = engine.generate(
        [item.prompt for item in items], sampling, progress=progress, **options
    )
    seconds = time.perf_counter() - began
    for output in outputs:
        if output.error:
            raise RuntimeError(output.error)
    right = sum(exact_match(output, item) for output, item in zip(outputs, items, strict=True))
    return Score(right, len(items), seconds, sum(len(output.token_ids) for output in outputs))


def exact_match(output: Output, item: Item) -> bool:
    """Whether the whole output is the answer and ends there; only outer white space is free."""
    return output.finish_reason == "stop" and output.text.strip() == item.answer.strip()
