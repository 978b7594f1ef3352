"""CommonsenseQA (Talmor et al. 2019): five-way questions, scored by the letter's likelihood.

The prompt is the harness's. Scored on the dev split, since the test split has no public answers.
"""

from __future__ import annotations

from dlf_ray.evaluation.tasks.common import (
    LETTERS,
    Item,
    Task,
    acc_only,
    labelled,
    labelled_from_hub,
    lettered,
    likeliest,
)
from dlf_ray.evaluation.tasks.data import Row, Source


def build(row: Row) -> Item:
    """Letters are given by position; the data's are the same."""
    choices, right = labelled(row.values)
    stem = row["question"]["stem"].strip()
    letters = tuple(f" {letter}" for letter in LETTERS[: len(choices)])
    return Item(
        id=row.text("id"),
        prompt=f"Question: {stem}\n{lettered(choices)}\nAnswer:",
        target=letters[right],
        choices=letters,
        correct=(right,),
    )


COMMONSENSEQA = Task(
    name="commonsenseqa",
    version="1",
    kind="likelihood",
    metrics=("acc",),
    source=Source(
        folder="commonsenseqa",
        files={"test": ["dev_rand_split.jsonl"], "train": ["train_rand_split*.jsonl"]},
        hub="tau/commonsense_qa",
        splits={"test": "validation", "train": "train"},
        published=labelled_from_hub,
    ),
    build=build,
    score=acc_only,
    extract=likeliest,
)
