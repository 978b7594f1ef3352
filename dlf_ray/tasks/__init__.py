"""The benchmarks of the evaluation, by name, and tasks on a user's own data."""

from __future__ import annotations

from collections.abc import Mapping

from dlf_ray.tasks.common import (
    Averages,
    Choice,
    Item,
    Loaded,
    Response,
    Scores,
    Task,
    averages,
)
from dlf_ray.tasks.gsm8k import GSM8K
from dlf_ray.tasks.own import METRICS, own_task
from dlf_ray.tasks.truthfulqa import TRUTHFULQA, TRUTHFULQA_LETTERS

__all__ = [
    "METRICS",
    "TASKS",
    "Averages",
    "Choice",
    "Item",
    "Loaded",
    "Response",
    "Scores",
    "Task",
    "averages",
    "get_task",
    "own_task",
]

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        GSM8K,
        TRUTHFULQA,
        TRUTHFULQA_LETTERS,
    )
}


def get_task(name: str) -> Task:
    """Raises `ValueError`, listing the tasks, for a name that is none."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]
