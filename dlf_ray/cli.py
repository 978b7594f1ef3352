"""The `dlf` command. Each subcommand is a thin shell around the package."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dlf_ray.config import LARGE, Family, ModelSpec, Rule, Select
from dlf_ray.evaluate import (
    METHODS,
    SELECTS,
    Item,
    Score,
    evaluate,
    method_options,
    read_items,
)
from dlf_ray.frontend import BaseEngine, EngineError, FusionOptions, Output
from dlf_ray.messages import SamplingParams

app = typer.Typer(
    help="Dynamic Logits Fusion: steer a large language model with small fine-tuned experts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()
COLOURS = ("green", "magenta", "cyan", "yellow", "blue", "red")
"""Of the experts, in the order of the family; text of the large model stays as it is."""

FamilyFile = Annotated[
    Path, typer.Argument(help="The family file: which models, how fused.", metavar="FAMILY.yaml")
]
Local = Annotated[
    bool, typer.Option("--local", help="Run in this process, without Ray: small models, one GPU.")
]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]


@contextmanager
def _errors() -> Iterator[None]:
    """A wrong input ends with one line that says what to do; anything else is a bug and a trace."""
    try:
        yield
    except (ValueError, FileNotFoundError, EngineError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None


def _engine(family: Family, local: bool) -> BaseEngine:
    with console.status(f"starting {len(family.models)} models"):
        if local:
            from dlf_ray.local import LocalEngine

            return LocalEngine(family)
        from dlf_ray.engine import Engine

        return Engine(family)


@app.command()
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
    local: Local = False,
) -> None:
    """Generate with a family, streaming the text as it comes."""
    with _errors():
        loaded = Family.from_yaml(family)
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=tuple(stop or ()),
        )
        options: FusionOptions = {}
        if rule is not None:
            options["rule"] = rule
        if select is not None:
            options["select"] = select
        if alone is not None:
            options["alone"] = alone
        if experts is not None:
            options["experts"] = _names(experts)
        colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(loaded.experts)}
        with _engine(loaded, local) as engine:
            for each in prompt:
                whole: list[Output] = []
                console.print(each, end="", style="dim", markup=False, highlight=False)
                for piece in engine.stream(each, sampling, **options):
                    _show(piece, colours if show_weights else {})
                    whole.append(piece)
                console.print()
                if show_weights:
                    _legend(whole, colours)


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


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


@app.command("evaluate")
def evaluate_command(
    family: FamilyFile,
    data: Annotated[Path, typer.Argument(help='JSONL: {"prompt": ..., "answer": ...} a line.')],
    methods: Annotated[str, typer.Option(help=f"By commas, of: {METHODS}.")] = "large,base,dynamic",
    experts: Annotated[
        str | None, typer.Option(help="Which take part in fusion, by commas; all if not given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many items.", min=1)] = None,
    max_tokens: MaxTokens = 64,
    local: Local = False,
) -> None:
    """Compare methods on prompts with known answers, by strict exact match."""
    with _errors():
        loaded = Family.from_yaml(family)
        items = read_items(data, limit)
        named = None if experts is None else _names(experts)
        plans = {name: method_options(name, loaded, named) for name in _names(methods)}
        if not plans:
            raise ValueError(f"--methods names none; there are {METHODS}")
        table = Table("method", "exact match", "95% interval", "items", "tokens/s")
        with _engine(loaded, local) as engine:
            for name, options in plans.items():
                console.print(f"{name}:", style="dim")
                score = evaluate(engine, items, options, max_tokens=max_tokens, progress=True)
                table.add_row(
                    name,
                    f"{score.percent:.1f}",
                    _interval(score),
                    str(score.items),
                    f"{score.tokens / score.seconds:.0f}",
                )
        console.print(table)


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Of corpus and training.")] = 0,
    limit: Annotated[int, typer.Option(help="Items per task.", min=1)] = 300,
    local: Local = False,
) -> None:
    """Train a tiny family (once, cached), decode fused over Ray, print what each method gets."""
    from dlf_ray import demo as family_demo  # imports transformers, so only where it is used

    with _errors():
        began = time.perf_counter()
        folder = family_demo.build(seed=seed, progress=True)
        trained = time.perf_counter() - began
        family = Family.from_yaml(folder / "family.yaml")
        tasks = family_demo.TASKS
        items = {task: read_items(folder / f"{task}-test.jsonl", limit) for task in tasks}
        rows: list[tuple[str, Callable[[str], FusionOptions]]] = [
            ("large alone", lambda task: method_options("large", family)),
            ("base alone", lambda task: method_options("base", family)),
            ("expert alone", lambda task: method_options(f"expert:{task}", family)),
            ("static, the task's expert", lambda task: method_options("static", family, [task])),
            ("dynamic, the task's expert", lambda task: method_options("dynamic", family, [task])),
            *(
                (
                    f"dynamic, all experts: {select}",
                    lambda task, select=select: method_options(f"dynamic:{select}", family),
                )
                for select in SELECTS
            ),
        ]
        table = Table("method", *tasks, "average", title=f"exact match, {limit} items a task")
        with _engine(family, local) as engine, console.status("decoding") as status:
            for label, options in rows:
                status.update(f"decoding: {label}")
                scores = [evaluate(engine, items[task], options(task)) for task in tasks]
                table.add_row(label, *_cells(scores))
        with console.status("decoding: upper bound"):
            scores = [_upper_bound(family, folder / f"upper-{task}", items[task]) for task in tasks]
        table.add_section()
        table.add_row("large, fine-tuned", *_cells(scores))
        console.print(table)
        decoded = time.perf_counter() - began - trained
        console.print(
            f"training {trained:.0f} s (cached in {folder}), decoding {decoded:.0f} s; "
            "brackets: 95% Wilson intervals"
        )
        console.print(
            f"next: dlf generate {folder / 'family.yaml'} --show-weights "
            f"--prompt {items[tasks[0]][0].prompt!r}",
            highlight=False,
            soft_wrap=True,
        )


def _upper_bound(family: Family, folder: Path, items: Sequence[Item]) -> Score:
    """The large model after full fine-tuning on the task, by itself."""
    from dlf_ray.local import LocalEngine

    alone = Family(
        large=ModelSpec(model=str(folder)), base=family.base, experts={}, engine=family.engine
    )
    with LocalEngine(alone) as engine:
        return evaluate(engine, items, {"alone": LARGE})


def _cells(scores: Sequence[Score]) -> list[str]:
    average = sum(score.percent for score in scores) / len(scores)
    return [*(f"{s.percent:.1f} {_interval(s)}" for s in scores), f"{average:.1f}"]


def _interval(score: Score) -> str:
    low, high = score.interval
    return f"({low:.0f}-{high:.0f})"


@app.command("bench")
def bench_command(
    experts: Annotated[str, typer.Option(help="Numbers of experts, by commas.")] = "1,4",
    rows: Annotated[str, typer.Option(help="Sequences decoded together, by commas.")] = "1,32",
    vocab: Annotated[int, typer.Option(help="Size of the vocabulary.", min=2)] = 32000,
    steps: Annotated[int, typer.Option(help="Steps a round.", min=1)] = 200,
    rounds: Annotated[int, typer.Option(help="Rounds, of which the median counts.", min=1)] = 5,
) -> None:
    """What a step of the engine costs by itself: real actors, forward passes left out.

    Beside it, the same bytes between as many processes in one plain ZeroMQ round trip.
    """
    from dlf_ray.bench import bench

    table = Table(
        "experts",
        "rows",
        "exchange ms",
        "step ms",
        "of it fusion ms",
        "steps/s",
        "step / exchange",
        "without fusion",
        title=f"vocabulary {vocab}, medians of {rounds} rounds of {steps} steps",
    )
    with _errors():
        sizes = [[int(size) for size in _names(listed)] for listed in (experts, rows)]
        for r in bench(*sizes, vocab=vocab, steps=steps, rounds=rounds):
            table.add_row(
                str(r.experts),
                str(r.rows),
                f"{r.exchange:.2f}",
                f"{r.step:.2f}",
                f"{r.fusion:.2f}",
                f"{1000 / r.step:.0f}",
                f"{r.step / r.exchange:.2f}",
                f"{(r.step - r.fusion) / r.exchange:.2f}",
            )
            console.print(f"measured {r.experts} experts, {r.rows} rows", style="dim")
    console.print(table)
