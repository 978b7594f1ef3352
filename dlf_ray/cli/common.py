"""What several commands share: the console, options, engines, errors."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dlf_ray.config import Family
from dlf_ray.engine.frontend import BaseEngine
from dlf_ray.engine.options import FusionOptions
from dlf_ray.engine.output import EngineError
from dlf_ray.params import SamplingParams
from dlf_ray.rules import Rule, Select

console = Console(width=None if sys.stdout.isatty() else 120)  # a log has room for a table
FamilyFile = Annotated[
    Path, typer.Argument(help="The family file: which models, how fused.", metavar="FAMILY.yaml")
]
Local = Annotated[
    bool, typer.Option("--local", help="Run in this process, without Ray: small models, one GPU.")
]

# How text is drawn
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", min=0)]
TopP = Annotated[float | None, typer.Option(help="Keep the most probable tokens of this mass.")]
TopK = Annotated[int | None, typer.Option(help="Keep so many tokens; 0 keeps all.", min=0)]
Seed = Annotated[int | None, typer.Option(help="Of the draws at a temperature.")]
Stop = Annotated[list[str] | None, typer.Option(help="A string that ends the text.")]

# How it is fused
RuleName = Annotated[Rule | None, typer.Option("--rule", help="How weights are found.")]
SelectName = Annotated[
    Select | None, typer.Option("--select", help="Which of several experts speaks.")
]
Experts = Annotated[str | None, typer.Option(help="Which take part, by commas; all if not given.")]
Alone = Annotated[str | None, typer.Option(help="One model by itself, unfused.")]
ShowWeights = Annotated[
    bool, typer.Option("--show-weights", help="Colour each token by the expert it is due to.")
]

# How a conversation is put
System = Annotated[str | None, typer.Option(help="What the models are told first.")]
ChatTemplate = Annotated[
    str | None, typer.Option(help="A Jinja file, where the large model has no chat template.")
]


@contextmanager
def errors() -> Iterator[None]:
    """A wrong input ends with one line that says what to do; anything else is a bug and a trace."""
    try:
        yield
    except (ValueError, FileNotFoundError, EngineError) as error:
        complain(str(error))
        raise typer.Exit(1) from None


def complain(error: str) -> None:
    """One red line."""
    Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)


def engine_of(family: Family, local: bool, *, models: Collection[str] | None = None) -> BaseEngine:
    with console.status(f"starting {len(family.models if models is None else models)} models"):
        if local:
            from dlf_ray.engine.local import LocalEngine

            return LocalEngine(family, models=models)
        from dlf_ray.engine.engine import Engine

        return Engine(family, models=models)


def sampling_of(
    max_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    stop: list[str] | None,
) -> dict[str, Any]:
    """What was given, for `default_sampling`. Raises `ValueError` for what cannot be."""
    asked: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    given = {name: value for name, value in asked.items() if value is not None}
    SamplingParams(**given)
    return given


def fusion_of(
    rule: Rule | None, select: Select | None, experts: str | None, alone: str | None
) -> FusionOptions:
    """What was given."""
    options: FusionOptions = {}
    if rule is not None:
        options["rule"] = rule
    if select is not None:
        options["select"] = select
    if alone is not None:
        options["alone"] = alone
    if experts is not None:
        options["experts"] = names_of(experts)
    return options


def names_of(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]
