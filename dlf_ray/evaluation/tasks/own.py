"""A user's own data as a task: JSON lines, CSV, Parquet, or a data set on the hub."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from dlf_ray.evaluation.tasks.common import (
    LETTERS,
    Item,
    Response,
    Scores,
    Task,
    accuracy,
    last_number_of,
    likeliest,
    number_match,
    rouge,
    stripped,
)
from dlf_ray.evaluation.tasks.data import Row, Source
from dlf_ray.evaluation.tasks.numbers import last_number

BOUNDARY = re.compile(r"(\s|<[|｜][^<>|｜]+[|｜]>)\Z")
"""What a choice follows without a space: white space, or a turn marker as chat templates write it
(`<|assistant|>`)."""


def trimmed(text: str) -> list[str]:
    """An output, its first line, and that up to its first period."""
    text = text.strip()
    line = text.partition("\n")[0].strip()
    return [text, line, line.partition(".")[0].strip()]


def exact_match(item: Item, response: Response) -> Scores:
    """Strict: the whole output is an answer and the model ends there; only outer white space is
    free. Trimmed: so it is when cut at its first line end or period. Normalised: the whole output
    is an answer once both are `normalised`, wherever the model ended."""
    answers = [answer.strip() for answer in item.answers]
    ended = response.finish_reason == "stop"
    return {
        "exact_match": float(ended and response.text.strip() in answers),
        "exact_match_trimmed": float(any(each in answers for each in trimmed(response.text))),
        "exact_match_normalised": float(normalised(response.text) in map(normalised, answers)),
    }


def normalised(text: str) -> str:
    """`normalize_answer` of SQuAD's evaluate-v2.0.py (Rajpurkar et al. 2016): lower case, without
    punctuation and articles, single spaces. What has nothing else stays as it is."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split()) or text.strip()


@dataclass(frozen=True)
class Metric:
    """A way to score own data."""

    kind: Literal["generate", "likelihood"]
    names: tuple[str, ...]
    score: Callable[[Item, Response], Scores]
    extract: Callable[[Item, Response], str]


METRICS: Mapping[str, Metric] = {
    "exact_match": Metric(
        "generate",
        ("exact_match", "exact_match_trimmed", "exact_match_normalised"),
        exact_match,
        stripped,
    ),
    "number_match": Metric("generate", ("number_match",), number_match, last_number_of),
    "multiple_choice": Metric("likelihood", ("acc", "acc_norm"), accuracy, likeliest),
    "rouge": Metric("generate", ("rouge2", "rouge1", "rougeL"), rouge, stripped),
}


def own_task(
    path: str | Path,
    prompt_template: str | None = None,
    metric: str = "exact_match",
    *,
    answer: str = "answer",
    choices: str = "choices",
    config: str | None = None,
    split: str = "test",
    max_tokens: int = 256,
    stop: tuple[str, ...] = (),
) -> Task:
    """A task on a .jsonl, .json, .csv or .parquet file, or on a split of a data set on the hub.

    `prompt_template` is filled in from the columns as by `str.format`, such as
    "Question: {question}\\nAnswer:"; without one, the column `prompt` is taken as it is. `answer`
    and `choices` name columns. An answer may be a list of all that count as right. For
    `multiple_choice`, the choices are a list (in CSV, one in JSON), and the answer is one of them,
    its letter, or its index from 0; a space joins a choice to its prompt, unless that ends in white
    space or a turn marker. Items are named by a column `id`, if there is one.
    Raises `ValueError` for an unknown metric and for a template that is none.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; there are {', '.join(METRICS)}")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; pass one file of it")
    _check(prompt_template)
    name, chosen = str(path), METRICS[metric]

    def build(row: Row) -> Item:
        prompt = row.text("prompt") if prompt_template is None else _filled(prompt_template, row)
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        id = str(row.values["id"]) if row.values.get("id") is not None else row.name
        if metric == "multiple_choice":
            listed = _listed(row[choices], choices)
            right = _index(row[answer], listed)
            space = "" if BOUNDARY.search(prompt) else " "
            texts = tuple(f"{space}{each}" for each in listed)
            return Item(id, prompt, target=texts[right], choices=texts, correct=(right,))
        golds = _golds(row[answer], answer)
        if metric == "number_match" and not all(last_number(gold) for gold in golds):
            raise ValueError(f"column {answer!r} holds no number: {row[answer]!r}")
        return Item(id, prompt, target=f" {golds[0]}", answers=golds)

    return Task(
        name=Path(name).stem if Path(name).exists() else name,
        version="3",
        kind=chosen.kind,
        metrics=chosen.names,
        source=Source(
            folder=name,
            files={"test": [], "train": []},
            hub=name,
            config=config,
            splits={"test": split},
        ),
        build=build,
        score=chosen.score,
        extract=chosen.extract,
        max_tokens=max_tokens if chosen.kind == "generate" else 0,
        stop=stop,
    )


def _check(template: str | None) -> None:
    try:
        fields = [name for _, name, _, _ in Formatter().parse(template or "{prompt}") if name]
    except ValueError as error:
        raise ValueError(f"prompt template {template!r}: {error}; write {{{{ for {{") from None
    if not fields:
        raise ValueError(f"prompt template {template!r} names no column; write e.g. {{question}}")


def _filled(template: str, row: Row) -> str:
    for _, name, _, _ in Formatter().parse(template):
        if name:
            row[re.split(r"[.\[]", name)[0]]  # says which columns there are, if not this one
    return template.format_map(row.values)


def _golds(value: Any, column: str) -> tuple[str, ...]:
    golds = _texts(value if isinstance(value, list) else [value], column)
    if not golds or not all(gold.strip() for gold in golds):
        raise ValueError(f"column {column!r} holds no answer: {value!r}")
    return golds


def _listed(value: Any, column: str) -> list[str]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"column {column!r} is not a JSON list: {value!r}") from None
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError(f"column {column!r} must be a list of at least two choices: {value!r}")
    texts = _texts(value, column)
    if not all(text.strip() for text in texts):
        raise ValueError(f"column {column!r} holds an empty choice: {value!r}")
    return [*texts]


def _texts(values: list[Any], column: str) -> tuple[str, ...]:
    """Texts, and numbers as text. Raises `ValueError` for what is neither."""
    if wrong := [each for each in values if not isinstance(each, str | int | float)]:
        raise ValueError(f"column {column!r} must hold text or numbers, not {wrong[0]!r}")
    return tuple(map(str, values))


def _index(answer: Any, choices: list[str]) -> int:
    """Text first, then a letter, then a number."""
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    letters = LETTERS[: len(choices)]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        return letters.index(answer)
    if str(answer).isdecimal() and int(answer) < len(choices):
        return int(answer)
    raise ValueError(f"the answer {answer!r} is none of {choices}, no letter and no index of them")
