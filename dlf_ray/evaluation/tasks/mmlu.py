"""MMLU (Hendrycks et al. 2021): four-way questions on 57 subjects, scored by likelihood.

Prompts are the harness's; examples come from the dev split of the same subject, the first ones, as
there. Subjects are groups: `results` gives the figure over all questions, by subject, and the mean
of the subjects.
"""

from __future__ import annotations

import re

from dlf_ray.evaluation.tasks.common import LETTERS, Item, Task, acc_only, lettered, likeliest
from dlf_ray.evaluation.tasks.data import Row, Source, Values

CHOICES = LETTERS[:4]


def build(row: Row) -> Item:
    """The subject is in the file's name."""
    subject = row.values.get("subject") or re.sub(r"_(test|dev|val)$", "", row.file)
    answer = row["answer"]
    if answer not in list(CHOICES):
        raise ValueError(f"the answer must be one of {', '.join(CHOICES)}, not {answer!r}")
    preamble = (
        "The following are multiple choice questions (with answers) about "
        f"{subject.replace('_', ' ')}.\n\n"
    )
    listed = lettered([row[letter] for letter in CHOICES])
    return Item(
        id=row.name,
        prompt=f"{preamble}{row.text('question').strip()}\n{listed}\nAnswer:",
        preamble=preamble,
        target=f" {answer}",
        choices=tuple(f" {letter}" for letter in CHOICES),
        correct=(CHOICES.index(answer),),
        group=subject,
    )


def from_hub(values: Values) -> Values:
    """The hub has the choices as a list and the answer as an index."""
    return {
        "question": values["question"],
        **dict(zip(CHOICES, values["choices"], strict=True)),
        "answer": CHOICES[values["answer"]],
        "subject": values["subject"],
    }


MMLU = Task(
    name="mmlu",
    version="1",
    kind="likelihood",
    metrics=("acc",),
    source=Source(
        folder="mmlu",
        files={
            "test": ["test/*_test.csv", "*_test.csv"],
            "train": ["dev/*_dev.csv", "*_dev.csv"],
        },
        hub="cais/mmlu",
        config="all",
        splits={"test": "test", "train": "dev"},
        published=from_hub,
        columns=["question", *CHOICES, "answer"],
    ),
    build=build,
    score=acc_only,
    extract=likeliest,
)
