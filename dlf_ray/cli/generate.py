"""`dlf generate`: text of a family, streamed, with who carried each token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dlf_ray.cli.common import (
    Alone,
    ChatTemplate,
    Experts,
    FamilyFile,
    Local,
    MaxTokens,
    RuleName,
    Seed,
    SelectName,
    ShowWeights,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    console,
    engine_of,
    errors,
    fusion_of,
    sampling_of,
)
from dlf_ray.cli.shown import colours_of, legend, say, show
from dlf_ray.config import Family
from dlf_ray.engine.frontend import BaseEngine, Prompts
from dlf_ray.engine.options import FusionOptions
from dlf_ray.engine.output import Output
from dlf_ray.metrics import Span, chrome_trace
from dlf_ray.params import SamplingParams


def generate(
    family: FamilyFile,
    prompt: Annotated[list[str], typer.Option(help="What to go on from; may be repeated.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Each prompt is what a user says; the models answer.")
    ] = False,
    system: System = None,
    chat_template: ChatTemplate = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    rule: RuleName = None,
    select: SelectName = None,
    experts: Experts = None,
    alone: Alone = None,
    show_weights: ShowWeights = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write who did what when to this file, for https://ui.perfetto.dev."),
    ] = None,
    local: Local = False,
) -> None:
    """Generate with a family, streaming the text as it comes."""
    with errors():
        loaded = Family.from_yaml(family)
        if not chat and (system is not None or chat_template is not None):
            raise ValueError("--system and --chat-template are of a conversation: add --chat")
        given = sampling_of(max_tokens, temperature, top_p, top_k, seed, stop)
        options: FusionOptions = fusion_of(rule, select, experts, alone)
        options["trace"] = trace is not None
        colours = colours_of(loaded)
        spans: list[Span] = []
        with engine_of(loaded, local) as engine:
            sampling = engine.default_sampling(**given)
            for each in prompt:
                whole: list[Output] = []
                asked: tuple[Prompts, SamplingParams] = each, sampling
                if chat:
                    asked = _said(engine, each, system, chat_template, sampling)
                say(each, "dim", end="\n" if chat else "")
                for piece in engine.stream(*asked, **options):
                    show(piece, colours if show_weights else {})
                    whole.append(piece)
                    spans += piece.spans
                console.print()
                if show_weights:
                    legend(whole, colours)
        if trace is not None:
            trace.write_text(json.dumps(chrome_trace(spans)))


def _said(
    engine: BaseEngine,
    text: str,
    system: str | None,
    template: str | None,
    sampling: SamplingParams,
) -> tuple[Prompts, SamplingParams]:
    """The prompt of what a user says, and how its answer is drawn."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    made = engine.render([*messages, {"role": "user", "content": text}], chat_template=template)
    return made.prompt, made.ending(sampling)
