"""ARC, easy and challenge (Clark et al. 2018): science questions, by the likelihood of each choice.

As in the harness, the choices are not in the prompt: each is scored as its continuation.
"""

from __future__ import annotations

from typing import Literal

from dlf_ray.evaluation.tasks.common import (
    Item,
    Task,
    accuracy,
    labelled,
    labelled_from_hub,
    likeliest,
)
from dlf_ray.evaluation.tasks.data import Row, Source


def build(row: Row) -> Item:
    """Labels are letters in most items and digits in some; nothing depends on that."""
    choices, right = labelled(row.values)
    texts = tuple(f" {choice}" for choice in choices)
    return Item(
        id=row.text("id"),
        prompt=f"Question: {row['question']['stem']}\nAnswer:",
        target=texts[right],
        choices=texts,
        correct=(right,),
    )


def arc(name: str, part: Literal["ARC-Easy", "ARC-Challenge"]) -> Task:
    """One of the two parts, which differ in nothing but their files."""
    return Task(
        name=name,
        version="1",
        kind="likelihood",
        metrics=("acc", "acc_norm"),
        source=Source(
            folder=f"arc/{part}",
            files={
                "test": [f"{part}-Test.jsonl", f"{part}/{part}-Test.jsonl"],
                "train": [
                    f"{part}{where}-{split}.jsonl"
                    for split in ("Train", "Dev")
                    for where in ("", f"/{part}")
                ],
            },
            hub="allenai/ai2_arc",
            config=part,
            splits={"test": "test", "train": "train"},
            published=labelled_from_hub,
        ),
        build=build,
        score=accuracy,
        extract=likeliest,
    )


ARC_EASY = arc("arc_easy", "ARC-Easy")
ARC_CHALLENGE = arc("arc_challenge", "ARC-Challenge")
