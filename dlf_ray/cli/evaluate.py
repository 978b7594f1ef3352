"""`dlf evaluate`: methods side by side on benchmarks or own data."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from dlf_ray.cli.common import Local, console, engine_of, errors, names_of
from dlf_ray.cli.tables import log, scores
from dlf_ray.config import read_yaml
from dlf_ray.evaluation.evaluate import run
from dlf_ray.evaluation.experiment import METHODS, Experiment, TaskSpec
from dlf_ray.evaluation.tasks import METRICS

ShotsFor = Literal["large", "all"]
Overflow = Literal["truncate", "skip"]


def evaluate(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(
            help="A family file, or an experiment file as jobs take it, which says all but "
            "--output and --local.",
            metavar="FAMILY.yaml|EXPERIMENT.yaml",
        ),
    ],
    task: Annotated[str | None, typer.Option(help="Benchmarks, by commas.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Local file or folder, or Hugging Face data set; own data may be several."
        ),
    ] = None,
    prompt_template: Annotated[
        str | None, typer.Option(help='For own data, over its columns: "Q: {question}\\nA:".')
    ] = None,
    metric: Annotated[str, typer.Option(help=f"For own data: {', '.join(METRICS)}.")] = (
        "exact_match"
    ),
    stop: Annotated[
        list[str] | None,
        typer.Option(help="For own data: a string that ends an answer; may be repeated."),
    ] = None,
    methods: Annotated[
        str, typer.Option(help=f"By commas: {METHODS}.")
    ] = "large,base,static,dynamic",
    shots: Annotated[int, typer.Option(help="Examples before each item.", min=0)] = 0,
    shots_for: Annotated[ShotsFor, typer.Option(help="Whose prompt holds them.")] = "all",
    limit: Annotated[int | None, typer.Option(help="Only so many items.", min=1)] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; the task's own if not given.", min=1)
    ] = None,
    upper_bound: Annotated[
        str | None, typer.Option(help="The large model, fine-tuned, to compare with.")
    ] = None,
    on_overflow: Annotated[
        Overflow, typer.Option(help="What happens to prompts longer than the context.")
    ] = "truncate",
    apply_chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="Put items as conversations, by chat template."),
    ] = False,
    system_instruction: Annotated[
        str | None, typer.Option(help="What the models are told first.")
    ] = None,
    fewshot_as_multiturn: Annotated[
        bool | None,
        typer.Option(
            "--fewshot-as-multiturn/--no-fewshot-as-multiturn",
            help="Examples as turns of a conversation; so with --apply-chat-template.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Keep the results in this folder, and go on from there.")
    ] = None,
    local: Local = False,
) -> None:
    """Compare methods on benchmarks or own data: one table, a row per method."""
    with errors(), tempfile.TemporaryDirectory() as unkept:
        if _is_experiment(file):
            _refuse_beside_experiment(context)
            experiment = Experiment.from_yaml(file).with_family()
            if output:
                experiment = msgspec.structs.replace(experiment, output=str(output))
        else:
            experiment = Experiment(
                family=str(file),
                tasks=tuple(
                    TaskSpec(
                        task=name,
                        data=source,
                        prompt_template=prompt_template and _line_breaks(prompt_template),
                        metric=metric,
                        shots=shots,
                        limit=limit,
                        max_tokens=max_tokens,
                        stop=tuple(map(_line_breaks, stop or ())),
                    )
                    for name, source in _sources(task, data)
                ),
                methods=tuple(names_of(methods)),
                output=str(output or unkept),
                shots_for=shots_for,
                upper_bound=upper_bound,
                on_overflow=on_overflow,
                apply_chat_template=apply_chat_template,
                system_instruction=system_instruction,
                fewshot_as_multiturn=fewshot_as_multiturn,
            )
        malformed = run(experiment, partial(engine_of, local=local), log=log)
        console.print(scores(experiment.output, experiment.methods, malformed))


def _line_breaks(text: str) -> str:
    """A shell passes a line break written as \\n on as two characters."""
    return text.replace("\\n", "\n")


def _sources(
    benchmarks: str | None, data: Sequence[str] | None
) -> list[tuple[str | None, str | None]]:
    """The name and the data of each task."""
    if benchmarks is None:
        return [(None, each) for each in data] if data else [(None, None)]
    if data and len(data) > 1:
        raise ValueError(
            "several --data are tasks of one's own; beside --task, give one that holds the data of "
            "all benchmarks"
        )
    return [(name, data[0] if data else None) for name in names_of(benchmarks)]


def _is_experiment(file: Path) -> bool:
    """Whether a file is an experiment's, and no family's."""
    raw = read_yaml(file)
    return isinstance(raw, dict) and bool({"family", "tasks"} & raw.keys())


def _refuse_beside_experiment(context: typer.Context) -> None:
    """Raises `ValueError` for options that the experiment file itself is to say."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [
        f"--{name.replace('_', '-')}"
        for name, source in sources.items()
        if name not in ("file", "output", "local") and source and source.name == "COMMANDLINE"
    ]
    if given:
        raise ValueError(
            f"an experiment file says what is compared: write {', '.join(given)} into it; beside "
            "it, only --output and --local can be given"
        )
