"""`dlf merge`: one model from several, in weight space."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from dlf_ray.cli.common import console, errors
from dlf_ray.training.merge import merge as merge_models
from dlf_ray.training.recipe import Recipe

COLUMNS = (
    TextColumn("{task.description:>8}"),
    BarColumn(),
    DownloadColumn(),
    TimeRemainingColumn(),
)


def merge(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="Which models, merged how, in mergekit's keys: merge_method, base_model, models, "
            "parameters, dtype.",
            metavar="MERGE.yaml",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The new model's folder; if not given, beside the recipe, named like it.",
            metavar="FOLDER",
        ),
    ] = None,
) -> None:
    """Merge models or LoRA adapters of one base into a new model.

    Methods: linear, task_arithmetic, ties, dare_linear, dare_ties, and `lines: {alpha, beta}` in
    `parameters` to scale with depth. What comes out can be an expert of a family.
    """
    with errors():
        read = Recipe.from_yaml(recipe)
        began = time.perf_counter()
        with Progress(*COLUMNS, console=console) as bars:
            shown: dict[str, TaskID] = {}

            def show(what: str, done: int, total: int) -> None:
                if what not in shown:
                    shown[what] = bars.add_task(what, total=total)
                bars.update(shown[what], completed=done)

            made = merge_models(read, output or recipe.with_suffix(""), show)
        console.print(
            f"{len(read.experts)} models merged by {read.merge_method} into {made.folder}: "
            f"{made.tensors} tensors, {made.bytes / 1e9:.2f} GB, "
            f"{time.perf_counter() - began:.1f} s",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
