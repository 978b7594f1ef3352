"""The benchmarks of the evaluation, by name, and tasks on a user's own data."""

from __future__ import annotations

from collections.abc import Mapping

from dlf_ray.evaluation.tasks.arc import ARC_CHALLENGE, ARC_EASY
from dlf_ray.evaluation.tasks.cnn_dailymail import CNN_DAILYMAIL
from dlf_ray.evaluation.tasks.common import (
    Choice,
    Item,
    Loaded,
    Response,
    Scores,
    Task,
)
from dlf_ray.evaluation.tasks.commonsenseqa import COMMONSENSEQA
from dlf_ray.evaluation.tasks.gsm8k import GSM8K
from dlf_ray.evaluation.tasks.mmlu import MMLU
from dlf_ray.evaluation.tasks.own import METRICS, own_task
from dlf_ray.evaluation.tasks.svamp import SVAMP
from dlf_ray.evaluation.tasks.triviaqa import TRIVIAQA
from dlf_ray.evaluation.tasks.truthfulqa import TRUTHFULQA, TRUTHFULQA_LETTERS

__all__ = [
    "METRICS",
    "TASKS",
    "Choice",
    "Item",
    "Loaded",
    "Response",
    "Scores",
    "Task",
    "get_task",
    "own_task",
]

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        GSM8K,
        TRUTHFULQA,
        TRUTHFULQA_LETTERS,
        TRIVIAQA,
        CNN_DAILYMAIL,
        MMLU,
        ARC_EASY,
        ARC_CHALLENGE,
        SVAMP,
        COMMONSENSEQA,
    )
}


def get_task(name: str) -> Task:
    """Raises `ValueError`, listing the tasks, for a name that is none."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]
