"""TriviaQA without context (Joshi et al. 2017): trivia, scored by exact match with any alias.

The prompt is the harness's, with its second question mark. Three scores:

- `exact_match`: of the first line, both sides normalised as the authors' evaluation does,
- `exact_match_harness`: of what stands before the first line end, period or comma, without case
  and punctuation,
- `exact_match_proxy`: of the first line, without case; that of Liu et al. 2024 (proxy tuning), who
  allow 20 tokens.
"""

from __future__ import annotations

import re
import string

from dlf_ray.evaluation.tasks.common import Item, Response, Scores, Task
from dlf_ray.evaluation.tasks.data import Row, Source, Values

QUOTES = "‘’´`"


def build(row: Row) -> Item:
    """Every alias counts as right."""
    answers = row["answers"]
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise ValueError(f"column 'answers' must be a list of texts, not {answers!r}")
    return Item(
        id=row.text("question_id"),
        prompt=f"Question: {row.text('question')}?\nAnswer:",
        target=f" {answers[0]}",
        answers=tuple(answers),
    )


def normalised(answer: str) -> str:
    """`normalize_answer` of evaluation/triviaqa_evaluation.py in mandarjoshi90/triviaqa: lower
    case, punctuation to spaces, no articles, single spaces."""
    answer = answer.replace("_", " ").lower()
    answer = "".join(" " if c in string.punctuation + QUOTES else c for c in answer)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def until_mark(text: str) -> str:
    """What the harness takes (triviaqa/default.yaml, version 3): up to its stop strings,
    without outer white space."""
    return re.split(r"[\n.,]", text)[0].strip()


def bare(answer: str) -> str:
    """Without case and punctuation, as the harness compares."""
    return answer.lower().translate(str.maketrans("", "", string.punctuation))


def first_line(_: Item, response: Response) -> str:
    """Generation stops at a line end; this holds wherever it stopped."""
    return response.text.partition("\n")[0].strip()


def score(item: Item, response: Response) -> Scores:
    """All three."""
    line, cut = first_line(item, response), until_mark(response.text)
    return {
        "exact_match": float(normalised(line) in map(normalised, item.answers)),
        "exact_match_harness": float(bare(cut) in map(bare, item.answers)),
        "exact_match_proxy": float(line.lower() in [a.strip().lower() for a in item.answers]),
    }


def from_hub(values: Values) -> Values:
    """The hub keeps the answer's parts together; examples show its `value`."""
    value, aliases = values["answer"]["value"], values["answer"]["aliases"]
    return {
        "question": values["question"],
        "question_id": values["question_id"],
        "answers": [value, *(alias for alias in aliases if alias != value)],
    }


TRIVIAQA = Task(
    name="triviaqa",
    version="1",
    kind="generate",
    metrics=("exact_match", "exact_match_harness", "exact_match_proxy"),
    source=Source(
        folder="triviaqa",
        files={"test": ["dev.jsonl", "*dev.jsonl"], "train": ["train.jsonl", "*train.jsonl"]},
        hub="mandarjoshi/trivia_qa",
        config="rc.nocontext",
        splits={"test": "validation", "train": "train"},
        published=from_hub,
    ),
    build=build,
    score=score,
    extract=first_line,
    max_tokens=32,
    stop=("\n",),
)
