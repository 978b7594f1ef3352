"""CNN/DailyMail 3.0.0 (Hermann et al. 2015; See et al. 2017): news summaries, scored by ROUGE.

Prompt, limits and scores are the harness's; the headline is ROUGE-2, as in the paper.
"""

from __future__ import annotations

from dlf_ray.evaluation.tasks.common import Item, Task, rouge, stripped
from dlf_ray.evaluation.tasks.data import Row, Source


def build(row: Row) -> Item:
    """The highlights are sentences on lines of their own."""
    highlights = row.text("highlights")
    return Item(
        id=row.text("id"),
        prompt=f"Summarize the following article:\n\n{row.text('article')}\n\nSummary:",
        target=f" {highlights}",
        answers=(highlights,),
    )


CNN_DAILYMAIL = Task(
    name="cnn_dailymail",
    version="1",
    kind="generate",
    metrics=("rouge2", "rouge1", "rougeL"),
    source=Source(
        folder="cnn_dailymail",
        files={"test": ["test.csv", "validation.csv"], "train": ["train.csv", "train*.csv"]},
        hub="abisee/cnn_dailymail",
        config="3.0.0",
        splits={"test": "test", "train": "train"},
    ),
    build=build,
    score=rouge,
    extract=stripped,
    max_tokens=128,
    stop=("\n\n",),
)
