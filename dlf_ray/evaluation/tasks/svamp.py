"""SVAMP (Patel et al. 2021): elementary word problems, scored on the last number of the output.

The harness has no such task; the prompt is that of GSM8K. The published file holds 1000 problems,
all of them for testing; the hub's copy splits them into 700 to train on and 300 to test on.
"""

from __future__ import annotations

from dlf_ray.evaluation.tasks.common import Item, Task, last_number_of, number_match
from dlf_ray.evaluation.tasks.data import Row, Source
from dlf_ray.evaluation.tasks.numbers import last_number

CORRECTED = {"chal-680": "5"}
"""Published answers that contradict their own equation: 4 - 2 + 3 is not 1. A model that solves
the problem is right here; it moves the score by at most one item."""


def build(row: Row) -> Item:
    """Body and question read on, as in Kojima et al. 2022."""
    id, published = row.text("ID"), f"{float(row['Answer']):.15g}"
    answer = CORRECTED.get(id, published)
    if not last_number(answer):
        raise ValueError(f"the answer must be a number, not {row['Answer']!r}")
    return Item(
        id=id,
        prompt=f"Question: {row.text('Body').strip()} {row.text('Question').strip()}\nAnswer:",
        target=f" {answer}",
        answers=(answer,),
    )


SVAMP = Task(
    name="svamp",
    version="2",
    kind="generate",
    metrics=("number_match",),
    source=Source(
        folder="svamp",
        files={"test": ["SVAMP.json"], "train": []},
        hub="ChilleD/SVAMP",
        splits={"test": "test", "train": "train"},
    ),
    build=build,
    score=number_match,
    extract=last_number_of,
    max_tokens=256,
    stop=("Question:",),
)
