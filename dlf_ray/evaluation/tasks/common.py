"""What all benchmarks share: items, tasks, loading with examples, and the usual scores.

A task turns rows of data into items and an engine's answers into scores; it knows no engine.
Prompts and scores follow lm-evaluation-harness 0.4.13 (Gao et al. 2024), called "the harness" in
this folder, where it has the benchmark.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from dlf_ray.evaluation.tasks.data import Row, Source, Split, Values
from dlf_ray.evaluation.tasks.numbers import last_number, value_of

Scores: TypeAlias = "dict[str, float]"
"""A value from 0 to 1 for each metric of a task."""


@dataclass(frozen=True)
class Item:
    """One question of a benchmark."""

    id: str
    """The data's own, or file and row; stable across runs and unique within a task."""
    prompt: str
    """The whole zero-shot prompt; a benchmark's ends without white space."""
    preamble: str = ""
    """What `prompt` begins with that is said once, before any examples."""
    examples: tuple[tuple[str, str], ...] = ()
    """Solved ones, each as what is asked and its `target`; not part of `prompt`, since they may be
    for one of the models only."""
    target: str = ""
    """The right continuation of `prompt`, as examples show it, with the space that begins it."""
    answers: tuple[str, ...] = ()
    """For generation: all that count as right."""
    choices: tuple[str, ...] = ()
    """For likelihood: continuations of the prompt, each with the space that begins it, if any."""
    correct: tuple[int, ...] = ()
    """Indices of the right choices."""
    group: str = ""
    """A part of the benchmark with a figure of its own, such as an MMLU subject."""

    @property
    def shots(self) -> str:
        """The examples as text, with the separator that ends each."""
        return "".join(f"{asked}{target}\n\n" for asked, target in self.examples)

    @property
    def body(self) -> str:
        """The prompt without its preamble."""
        return self.prompt[len(self.preamble) :]

    @property
    def full_prompt(self) -> str:
        """Preamble, examples, and the question."""
        return self.preamble + self.shots + self.body


@dataclass(frozen=True)
class Choice:
    """What a model thinks of one choice."""

    logprob: float
    """Of all its tokens together, in nats."""
    greedy: bool = False
    """Whether every token is the most probable one."""
    tokens: int = 0


@dataclass(frozen=True)
class Response:
    """What came back for one item: a text, or a judgement on each of its choices."""

    text: str = ""
    finish_reason: str | None = None
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """The items of a file or data set, and what had to be left out."""

    items: list[Item]
    skipped: list[tuple[str, str]]
    """File and line of each malformed record, and what is wrong with it."""


@dataclass(frozen=True)
class Task:
    """A benchmark: how its data become prompts, and how answers are scored."""

    name: str
    version: str
    """Changes whenever prompts or scores do; scores of different versions do not compare."""
    kind: Literal["generate", "likelihood"]
    metrics: tuple[str, ...]
    """The headline first."""
    source: Source
    build: Callable[[Row], Item]
    """Raises for a malformed row what such a row makes Python raise; `ValueError` to say why."""
    score: Callable[[Item, Response], Scores]
    extract: Callable[[Item, Response], str]
    """What was taken as the answer, for people to read."""
    max_tokens: int = 0
    stop: tuple[str, ...] = ()

    def load(
        self,
        path: str | Path | None = None,
        *,
        split: Split = "test",
        shots: int = 0,
        limit: int | None = None,
    ) -> Loaded:
        """Items of a local file or folder or of a data set on the hub (by default the usual one).

        Before each item stand the first `shots` examples of the train split, of the item's own
        group, without the item itself. `limit` takes the first items; of a benchmark in groups,
        the first of each group in turn. Malformed rows are left out and reported.
        Raises `ValueError`, saying what to do, where there are no items or too few examples.
        """
        if shots < 0 or (limit is not None and limit < 1):
            raise ValueError(f"shots must be >= 0 and limit >= 1, not {shots} and {limit}")
        loaded = self._read(path, split, limit)
        items = spread(loaded.items, limit)
        if not shots:
            return Loaded(items, loaded.skipped)
        examples = self._read(path, "train", shots + 1)
        items = [with_shots(item, examples.items, shots) for item in items]
        return Loaded(items, loaded.skipped + (examples.skipped if split != "train" else []))

    def _read(self, path: str | Path | None, split: Split, limit: int | None) -> Loaded:
        """At least `limit` items with different prompts, if there are so many, and no more than
        have to be read for that."""
        items: dict[str, Item] = {}
        prompts: set[str] = set()
        skipped: list[tuple[str, str]] = []
        for row in self.source.rows(path, split):
            try:
                item = self._build(row)
                if item.id in items:
                    raise ValueError(f"the id {item.id!r} has been used before")
            except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
                skipped.append((row.where, _reason(error)))
                continue
            items[item.id] = item
            prompts.add(item.prompt)
            if limit and not item.group and len(prompts) >= limit:
                break
        if not items:
            what = path or self.source.hub
            if not skipped:
                raise ValueError(f"{what} holds no items; pass a file with at least one")
            where, reason = skipped[0]
            raise ValueError(
                f"none of the {len(skipped)} records in {what} is an item of {self.name}; "
                f"{where}: {reason}"
            )
        return Loaded(list(items.values()), skipped)

    def _build(self, row: Row) -> Item:
        if row.wrong:
            raise ValueError(row.wrong)
        return self.build(row)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no {error}"
    return str(error)


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first of each group, then the second of each, up to `limit`; in their old order."""
    seen: Counter[str] = Counter()
    turns = []
    for position, item in enumerate(items):
        turns.append((seen[item.group], position))
        seen[item.group] += 1
    return [items[position] for position in sorted(p for _, p in sorted(turns)[:limit])]


def with_shots(item: Item, examples: Iterable[Item], shots: int) -> Item:
    """The item after the first examples of its group that are not the item itself.

    Raises `ValueError` where there are fewer than `shots`.
    """
    own = (e for e in examples if e.group == item.group and e.prompt != item.prompt)
    chosen = list(itertools.islice(own, shots))
    if len(chosen) < shots:
        where = f" of {item.group}" if item.group else ""
        raise ValueError(f"{shots} shots asked for, but there are {len(chosen)} examples{where}")
    return replace(item, examples=tuple((each.body, each.target) for each in chosen))


# Likelihood


def best(values: Sequence[float]) -> int:
    """The index of the largest value, the first of equals (as numpy's argmax)."""
    return max(range(len(values)), key=values.__getitem__)


def accuracy(item: Item, response: Response) -> Scores:
    """Whether the likeliest choice is right, as it is and per character, as in the harness.

    `acc_norm` divides by the length of the choice without the space that begins it.
    """
    logprobs = logprobs_of(item, response)
    lengths = [max(1, len(choice.removeprefix(" "))) for choice in item.choices]
    per_character = [p / n for p, n in zip(logprobs, lengths, strict=True)]
    return {
        "acc": float(best(logprobs) in item.correct),
        "acc_norm": float(best(per_character) in item.correct),
    }


def acc_only(item: Item, response: Response) -> Scores:
    """`acc` alone, for choices that are letters, all of one length."""
    return {"acc": accuracy(item, response)["acc"]}


def logprobs_of(item: Item, response: Response) -> list[float]:
    """One log-probability for each choice. Raises `ValueError` for another number of them."""
    if len(response.choices) != len(item.choices):
        raise ValueError(
            f"item {item.id}: {len(item.choices)} choices, but {len(response.choices)} were judged"
        )
    return [choice.logprob for choice in response.choices]


def likeliest(item: Item, response: Response) -> str:
    """The text of the likeliest choice."""
    return item.choices[best(logprobs_of(item, response))].strip()


def labelled(values: Values) -> tuple[list[str], int]:
    """Choices and the right one's index, from ARC's and CommonsenseQA's `question.choices` and
    `answerKey`."""
    choices = values["question"]["choices"]
    labels = [choice["label"] for choice in choices]
    if values["answerKey"] not in labels:
        raise ValueError(f"answerKey {values['answerKey']!r} is none of {labels}")
    return [choice["text"] for choice in choices], labels.index(values["answerKey"])


def labelled_from_hub(values: Values) -> Values:
    """The hub has the choices as columns, and the question beside them."""
    pairs = zip(values["choices"]["label"], values["choices"]["text"], strict=True)
    choices = [{"label": label, "text": text} for label, text in pairs]
    return {
        "id": values["id"],
        "question": {"stem": values["question"], "choices": choices},
        "answerKey": values["answerKey"],
    }


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def lettered(choices: Sequence[str]) -> str:
    """A line `A. choice` for each."""
    return "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )


# Generation


def stripped(_: Item, response: Response) -> str:
    """The text as it came, for tasks that take all of it as the answer."""
    return response.text.strip()


def number_match(item: Item, response: Response) -> Scores:
    """Whether the last number of the output equals an answer's, in value: 18.00 is 18."""
    number = last_number(response.text)
    golds = {value_of(last_number(answer)) for answer in item.answers}
    return {"number_match": float(bool(number) and value_of(number) in golds)}


def last_number_of(_: Item, response: Response) -> str:
    """For display."""
    return last_number(response.text)


@cache
def _rouge() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def rouge(item: Item, response: Response) -> Scores:
    """F1 of ROUGE-2, ROUGE-1 and ROUGE-L (Lin 2004), each against the answer that fits it best.

    With the library rouge-score and its Porter stemmer, on text whose white space is single
    spaces, as the harness does for CNN/DailyMail.
    """
    text = " ".join(response.text.split())
    found = [_rouge().score(" ".join(answer.split()), text) for answer in item.answers]
    return {
        metric: max(float(each[metric].fmeasure) for each in found)
        for metric in ("rouge2", "rouge1", "rougeL")
    }
