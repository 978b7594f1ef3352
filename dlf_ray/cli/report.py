"""`dlf report`: pages about what an evaluation left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlf_ray.cli.common import console, errors
from dlf_ray.evaluation.report import write_report


def report(
    results: Annotated[Path, typer.Argument(help="The folder that an evaluation wrote.")],
) -> None:
    """Write Markdown and one HTML page about a run: scores, weights, coloured answers."""
    with errors():
        for path in write_report(results):
            console.print(str(path), markup=False, highlight=False, soft_wrap=True)
