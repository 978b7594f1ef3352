"""`dlf generate`: text of a family, streamed, with who carried each token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from dlf_ray.cli.common import FamilyFile, Local, MaxTokens, console, engine_of, errors, names_of
from dlf_ray.config import Family
from dlf_ray.engine.options import FusionOptions
from dlf_ray.engine.output import Output
from dlf_ray.messages import SamplingParams
from dlf_ray.metrics import Span, chrome_trace
from dlf_ray.rules import Rule, Select

COLOURS = ("green", "magenta", "cyan", "yellow", "blue", "red")
"""Of the experts, in the order of the family; text of the large model stays as it is."""


def generate(
    family: FamilyFile,
    prompt: Annotated[list[str], typer.Option(help="What to go on from; may be repeated.")],
    max_tokens: MaxTokens = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the most probable tokens of this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep so many tokens; 0 keeps all.", min=0)] = 0,
    seed: Annotated[int | None, typer.Option(help="Of the draws at a temperature.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the text.")] = None,
    rule: Annotated[Rule | None, typer.Option(help="How weights are found.")] = None,
    select: Annotated[Select | None, typer.Option(help="Which of several experts speaks.")] = None,
    experts: Annotated[
        str | None, typer.Option(help="Which take part, by commas; all if not given.")
    ] = None,
    alone: Annotated[str | None, typer.Option(help="One model by itself, unfused.")] = None,
    show_weights: Annotated[
        bool, typer.Option("--show-weights", help="Colour each token by the expert it is due to.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write who did what when to this file, for https://ui.perfetto.dev."),
    ] = None,
    local: Local = False,
) -> None:
    """Generate with a family, streaming the text as it comes."""
    with errors():
        loaded = Family.from_yaml(family)
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=tuple(stop or ()),
        )
        options: FusionOptions = {"trace": trace is not None}
        spans: list[Span] = []
        if rule is not None:
            options["rule"] = rule
        if select is not None:
            options["select"] = select
        if alone is not None:
            options["alone"] = alone
        if experts is not None:
            options["experts"] = names_of(experts)
        colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(loaded.experts)}
        with engine_of(loaded, local) as engine:
            for each in prompt:
                whole: list[Output] = []
                console.print(each, end="", style="dim", markup=False, highlight=False)
                for piece in engine.stream(each, sampling, **options):
                    _show(piece, colours if show_weights else {})
                    whole.append(piece)
                    spans += piece.spans
                console.print()
                if show_weights:
                    _legend(whole, colours)
        if trace is not None:
            trace.write_text(json.dumps(chrome_trace(spans)))


def _show(piece: Output, colours: Mapping[str, str]) -> None:
    expert = piece.experts[-1] if piece.experts else None
    style = colours.get(expert or "")
    console.print(piece.text, end="", style=style, markup=False, highlight=False)


def _legend(pieces: Sequence[Output], colours: Mapping[str, str]) -> None:
    """Who carried how many tokens, and with which weight on average."""
    carried = [name for piece in pieces for name in piece.experts]
    weights = [weight for piece in pieces for weight in piece.weights]
    parts = [
        f"[{colour}]{name}[/{colour}] {carried.count(name)} tokens, mean weight "
        f"{sum(weight.get(name, 0.0) for weight in weights) / len(weights):.2f}"
        for name, colour in colours.items()
    ]
    console.print("; ".join([*parts, f"large model alone {carried.count(None)}"]), highlight=False)
