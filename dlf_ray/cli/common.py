"""What several commands share: the console, options, engines, errors."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dlf_ray.config import Family
from dlf_ray.engine.frontend import BaseEngine
from dlf_ray.engine.output import EngineError

console = Console(width=None if sys.stdout.isatty() else 120)  # a log has room for a table
FamilyFile = Annotated[
    Path, typer.Argument(help="The family file: which models, how fused.", metavar="FAMILY.yaml")
]
Local = Annotated[
    bool, typer.Option("--local", help="Run in this process, without Ray: small models, one GPU.")
]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]


@contextmanager
def errors() -> Iterator[None]:
    """A wrong input ends with one line that says what to do; anything else is a bug and a trace."""
    try:
        yield
    except (ValueError, FileNotFoundError, EngineError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None


def engine_of(family: Family, local: bool, *, models: Collection[str] | None = None) -> BaseEngine:
    with console.status(f"starting {len(family.models if models is None else models)} models"):
        if local:
            from dlf_ray.engine.local import LocalEngine

            return LocalEngine(family, models=models)
        from dlf_ray.engine.engine import Engine

        return Engine(family, models=models)


def names_of(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]
