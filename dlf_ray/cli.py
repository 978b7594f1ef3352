"""The `dlf` command. Each subcommand is a thin shell around the package."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

import msgspec
import typer
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from dlf_ray.config import Family, Rule, Select, read_yaml
from dlf_ray.engine.frontend import BaseEngine, EngineError, FusionOptions, Output
from dlf_ray.evaluation.evaluate import METHODS, Experiment, TaskSpec, run
from dlf_ray.evaluation.report import write_report
from dlf_ray.evaluation.results import UPPER_BOUND, Row, read, summary
from dlf_ray.evaluation.tasks import METRICS
from dlf_ray.messages import SamplingParams
from dlf_ray.metrics import Span, chrome_trace

app = typer.Typer(
    help="Dynamic Logits Fusion: steer a large language model with small fine-tuned experts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console(width=None if sys.stdout.isatty() else 120)  # a log has room for a table
COLOURS = ("green", "magenta", "cyan", "yellow", "blue", "red")
"""Of the experts, in the order of the family; text of the large model stays as it is."""

FamilyFile = Annotated[
    Path, typer.Argument(help="The family file: which models, how fused.", metavar="FAMILY.yaml")
]
Local = Annotated[
    bool, typer.Option("--local", help="Run in this process, without Ray: small models, one GPU.")
]
ShotsFor = Literal["large", "all"]
Overflow = Literal["truncate", "skip"]
DEMO_METHODS = (
    "large",
    "base",
    "expert:{task}",
    "static@{task}",
    "dynamic@{task}",
    "static",
    "dynamic:paper",
    "dynamic:strongest",
    "dynamic:blend",
)
"""One expert (the task's, `@`) or all of them, the task unknown."""
FAR_EXPERTS = 64
"""For how many the benchmark's costs are extrapolated."""
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]


@contextmanager
def _errors() -> Iterator[None]:
    """A wrong input ends with one line that says what to do; anything else is a bug and a trace."""
    try:
        yield
    except (ValueError, FileNotFoundError, EngineError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None


def _engine(family: Family, local: bool, *, models: Collection[str] | None = None) -> BaseEngine:
    with console.status(f"starting {len(family.models if models is None else models)} models"):
        if local:
            from dlf_ray.engine.local import LocalEngine

            return LocalEngine(family, models=models)
        from dlf_ray.engine.engine import Engine

        return Engine(family, models=models)


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
    trace: Annotated[
        Path | None,
        typer.Option(help="Write who did what when to this file, for https://ui.perfetto.dev."),
    ] = None,
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
        options: FusionOptions = {"trace": trace is not None}
        spans: list[Span] = []
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
                    spans += piece.spans
                console.print()
                if show_weights:
                    _legend(whole, colours)
        if trace is not None:
            trace.write_text(json.dumps(chrome_trace(spans)))


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


@app.command()
def serve(
    family: FamilyFile,
    host: Annotated[str, typer.Option(help="0.0.0.0 is for everybody.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where it listens.", min=1, max=65535)] = 8000,
    model_name: Annotated[
        str | None, typer.Option(help="What requests give as `model`; the file's name if not set.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A Jinja file, where the tokenizer has no chat template.")
    ] = None,
    max_queued: Annotated[int, typer.Option(help="Sequences that may wait for a slot.", min=0)] = (
        256
    ),
    allow_expert_updates: Annotated[
        bool, typer.Option("--allow-expert-updates", help="Let `dlf expert` change the family.")
    ] = False,
) -> None:
    """Serve a family behind OpenAI's API, until ctrl-C. For a cluster: `serve deploy`.

    The environment variable DLF_API_KEYS holds the keys, by commas, that requests have to bring.
    """
    from dlf_ray.serving.app import Settings, run_server
    from dlf_ray.serving.replica import Model

    with _errors():
        model = Model(family=str(family), chat_template=chat_template)
        settings = Settings(
            families={model_name or family.stem: model},
            max_queued=max_queued,
            allow_expert_updates=allow_expert_updates,
        )
        run_server(settings, host, port, say=partial(console.print, soft_wrap=True))


expert = typer.Typer(help="Experts of a family that is being served.", no_args_is_help=True)
app.add_typer(expert, name="expert")
Url = Annotated[str, typer.Option(help="Where the family is served.")]
ModelName = Annotated[str | None, typer.Option(help="Its name, where several are served.")]


@expert.command("add")
def expert_add(
    name: Annotated[str, typer.Argument(help="The new expert's.")],
    setting: Annotated[
        list[str], typer.Argument(help="As in a family file: model=./math num_gpus=0.3 ...")
    ],
    url: Url = "http://127.0.0.1:8000",
    model_name: ModelName = None,
) -> None:
    """Load one more expert; requests go on. Returns once it takes part in them."""
    with _errors():
        pairs = [each.partition("=") for each in setting]
        if wrong := [key for key, sign, _ in pairs if not sign]:
            raise ValueError(f"{wrong[0]!r} sets nothing; write it as {wrong[0]}=VALUE")
        spec = {key: yaml.safe_load(value) for key, _, value in pairs}
        if "model" in spec and Path(spec["model"]).is_dir():
            spec["model"] = str(Path(spec["model"]).resolve())
        _ask(url, "POST", "/v1/experts", {"model": model_name, "name": name, "expert": spec})
        _await_expert(url, model_name, name, "ready")


@expert.command("remove")
def expert_remove(
    name: Annotated[str, typer.Argument(help="Which one.")],
    url: Url = "http://127.0.0.1:8000",
    model_name: ModelName = None,
) -> None:
    """Take an expert out, once the requests that use it have ended."""
    with _errors():
        query = f"?{urlencode({'model': model_name})}" if model_name else ""
        _ask(url, "DELETE", f"/v1/experts/{quote(name)}{query}")
        _await_expert(url, model_name, name, None)


@expert.command("list")
def expert_list(url: Url = "http://127.0.0.1:8000", model_name: ModelName = None) -> None:
    """The experts and their states."""
    with _errors():
        for name, state in _expert_states(url, model_name).items():
            console.print(f"{name}: {state}", markup=False, highlight=False)


def _expert_states(url: str, model_name: str | None) -> dict[str, str]:
    query = f"?{urlencode({'model': model_name})}" if model_name else ""
    listed = _ask(url, "GET", f"/v1/experts{query}")
    return {each["id"]: each["state"] for each in listed["data"]}


def _await_expert(url: str, model_name: str | None, name: str, wanted: str | None) -> None:
    """Until the expert is in the wanted state. Raises `ValueError` if it could not join."""
    with console.status(f"waiting for {name}"):
        while (state := _expert_states(url, model_name).get(name)) != wanted:
            if state and state.startswith("failed: "):
                raise ValueError(state.removeprefix("failed: "))
            time.sleep(0.5)
    console.print(f"{name}: {wanted or 'gone'}", markup=False, highlight=False)


def _ask(url: str, method: str, path: str, body: object = None) -> Any:
    """A served family's answer. Raises `ValueError` with what it says where it refuses."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("DLF_API_KEYS", "").split(",")[0].strip():
        headers["Authorization"] = f"Bearer {key}"
    data = json.dumps(body).encode() if body is not None else None
    request = Request(url.rstrip("/") + path, data, headers, method=method)
    try:
        with urlopen(request, timeout=60) as answer:
            status, text = answer.status, answer.read().decode(errors="replace")
    except HTTPError as error:
        status, text = error.code, error.read().decode(errors="replace")
    except URLError as error:
        raise ValueError(f"nothing is served at {url} ({error.reason})") from None
    except (OSError, HTTPException) as error:
        raise ValueError(f"what is at {url} broke off ({error!r})") from None
    try:
        said = json.loads(text)
        refusal = None if status < 400 else str(said["error"]["message"])
    except (ValueError, KeyError, TypeError):  # not from us: a proxy on the way, say
        start = " ".join(text.split())[:200]
        raise ValueError(f"{url} answered with status {status}: {start}") from None
    if refusal is not None:
        raise ValueError(refusal)
    return said


@app.command()
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
    output: Annotated[
        Path | None, typer.Option(help="Keep the results in this folder, and go on from there.")
    ] = None,
    local: Local = False,
) -> None:
    """Compare methods on benchmarks or own data: one table, a row per method."""
    with _errors(), tempfile.TemporaryDirectory() as unkept:
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
                methods=tuple(_names(methods)),
                output=str(output or unkept),
                shots_for=shots_for,
                upper_bound=upper_bound,
                on_overflow=on_overflow,
            )
        malformed = run(experiment, partial(_engine, local=local), log=_log)
        console.print(_table(experiment.output, experiment.methods, malformed))


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
    return [(name, data[0] if data else None) for name in _names(benchmarks)]


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


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Of corpus and training.")] = 0,
    limit: Annotated[int, typer.Option(help="Items per task.", min=1)] = 300,
    output: Annotated[Path | None, typer.Option(help="Keep the results in this folder.")] = None,
    local: Local = False,
) -> None:
    """Train a tiny family (once, cached), decode fused over Ray, print what each method gets."""
    from dlf_ray.training import (
        demo as family_demo,  # imports transformers, so only where it is used
    )

    with _errors(), tempfile.TemporaryDirectory() as unkept:
        began = time.perf_counter()
        folder = family_demo.build(seed=seed)
        trained = time.perf_counter() - began
        experiment = Experiment(
            family=str(folder / "family.yaml"),
            tasks=tuple(
                TaskSpec(name=task, data=f"{folder}/{task}-test.jsonl", limit=limit, max_tokens=32)
                for task in family_demo.TASKS
            ),
            methods=DEMO_METHODS,
            upper_bound="upper-{task}",
            output=str(output or unkept),
        )
        # The upper bounds are single models: they need no actors.
        malformed = run(
            experiment,
            lambda family, *, models: _engine(family, local or not family.experts, models=models),
            log=_log,
        )
        console.print(_table(experiment.output, DEMO_METHODS, malformed))
        decoded = time.perf_counter() - began - trained
        console.print(
            f"training {trained:.0f} s (cached in {folder}), decoding {decoded:.0f} s",
            highlight=False,
            soft_wrap=True,
        )
        prompt = family_demo.items(family_demo.TASKS[0], "test", seed)[0].prompt
        console.print(
            f"next: dlf generate {folder / 'family.yaml'} --show-weights "
            f"--prompt $'{prompt.encode('unicode_escape').decode()}'",
            highlight=False,
            soft_wrap=True,
        )


def _log(line: str) -> None:
    console.print(line, style="dim", markup=False, highlight=False)


def _table(folder: str, methods: Sequence[str], malformed: Mapping[str, int]) -> Table:
    """All that a folder holds: a row per method, those that were asked for first, with the mean and
    95% interval of every task's first metric, and an average."""
    rows = {(row.task, row.method): row for row in summary(read(folder))}
    tasks = list(dict.fromkeys(task for task, _ in rows))
    metrics = {task: next(iter(row.scores)) for (task, _), row in rows.items() if row.scores}
    counts = {task: max(r.items for r in rows.values() if r.task == task) for task in tasks}
    table = Table(title="percent, 95% intervals", box=box.SIMPLE)
    table.add_column("method", no_wrap=True)
    for task in tasks:
        first = next(row for row in rows.values() if row.task == task)
        title = f"{task}\n{metrics.get(task, '')}\n{counts[task]} items, {first.shots}-shot"
        if left_out := malformed.get(task):
            title += f"\n{left_out} malformed left out"
        table.add_column(title, no_wrap=True)
    upper = _average([rows[task, UPPER_BOUND] for task in tasks if (task, UPPER_BOUND) in rows])
    # Beside several tasks there is no room for every expert's weight; `dlf report` has them.
    experts = list(dict.fromkeys(n for row in rows.values() for n in row.weights))
    experts = experts if len(tasks) == 1 else []
    for title in ("average", *(["gap closed"] if upper else []), "items/s", "tokens/s"):
        table.add_column(title)
    for expert in experts:
        table.add_column(f"{expert}\nmean weight")
    others = sorted({method for _, method in rows} - {*methods, UPPER_BOUND})
    for method in (*methods, *others, UPPER_BOUND):
        found = [rows.get((task, method)) for task in tasks]
        there = [row for row in found if row]
        if not there:
            continue
        cells = [_cell(row, counts[row.task]) if row else "-" for row in found]
        average, seconds = _average(there), sum(row.seconds for row in there)
        if len(there) < len(tasks):
            average = None  # it would be one of other tasks
        cells.append("-" if average is None else f"{average:.1f}")
        if upper:  # of the averages, as in the paper
            cells.append("-" if average is None else f"{100 * average / upper:.1f}")
        items, tokens = sum(row.items for row in there), sum(row.tokens for row in there)
        cells += [f"{items / seconds:.1f}", f"{tokens / seconds:.0f}"] if seconds else ["-", "-"]
        weights = there[0].weights
        cells += [f"{weights[name]:.2f}" if name in weights else "" for name in experts]
        table.add_row(method, *cells)
    return table


def _cell(row: Row, usual: int) -> str:
    """A score with its interval, and the number of items where it is another than usual."""
    few = f", {row.items} items" if row.items != usual else ""
    score = next(iter(row.scores.values()), None)
    if score is None:
        return f"-{few}"
    return f"{100 * score.mean:.1f} ({100 * score.low:.0f}-{100 * score.high:.0f}){few}"


def _average(rows: Sequence[Row]) -> float | None:
    """Of the tasks' headline scores, in percent."""
    scores = [100 * next(iter(row.scores.values())).mean for row in rows if row.scores]
    return sum(scores) / len(scores) if scores else None


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="The folder that an evaluation wrote.")],
) -> None:
    """Write Markdown and one HTML page about a run: scores, weights, coloured answers."""
    with _errors():
        for path in write_report(results):
            console.print(str(path), markup=False, highlight=False, soft_wrap=True)


@app.command()
def bench(
    experts: Annotated[str, typer.Option(help="Numbers of experts, by commas.")] = "1,4",
    rows: Annotated[str, typer.Option(help="Sequences decoded together, by commas.")] = "1,32",
    vocab: Annotated[int, typer.Option(help="Size of the vocabulary.", min=2)] = 32000,
    steps: Annotated[int, typer.Option(help="Steps a round.", min=1)] = 200,
    rounds: Annotated[int, typer.Option(help="Rounds, of which the median counts.", min=1)] = 5,
    forward_ms: Annotated[
        float, typer.Option(help="What each forward pass takes: a sleep.", min=0)
    ] = 0,
    items: Annotated[int, typer.Option(help="Items for the demo family; 0: none.", min=0)] = 200,
) -> None:
    """What a step of the engine costs by itself, and what batching and shared examples gain.

    Steps: real actors on the nodes of the cluster, forward passes left out; beside them, the same
    bytes between as many processes of this node in one plain ZeroMQ round trip. With several
    numbers of experts and of rows, a fit of what grows with what. Items: those of the demo family,
    in this process.
    """
    from dlf_ray import bench as measure
    from dlf_ray.training import demo as family_demo

    table = Table(
        "experts",
        "on other\nnodes",
        "rows",
        "exchange\nms",
        "step\nms",
        "forward\nin it, ms",
        "fusion\nin it, ms",
        "rest\nms",
        "steps/s",
        "step without\nforward / exchange",
        "rest /\nexchange",
        box=box.SIMPLE,
        title=f"vocabulary {vocab}, medians of {rounds} rounds of {steps} steps",
    )
    with _errors():
        counts, sizes = ([int(size) for size in _names(listed)] for listed in (experts, rows))
        results = []
        for r in measure.bench(
            counts, sizes, vocab=vocab, steps=steps, rounds=rounds, forward_ms=forward_ms
        ):
            results.append(r)
            table.add_row(
                str(r.experts),
                f"{r.remote} of {r.messages}",
                str(r.rows),
                f"{r.exchange:.2f}",
                f"{r.step:.2f}",
                f"{r.forward:.2f}",
                f"{r.fusion:.2f}",
                f"{r.rest:.2f}",
                f"{1000 / r.step:.1f}",
                f"{(r.step - r.forward) / r.exchange:.2f}",
                f"{r.rest / r.exchange:.2f}",
            )
            console.print(f"measured {r.experts} experts, {r.rows} rows", style="dim")
        console.print(table)
        if costs := measure.Costs.fit(results):
            console.print(
                f"rest = {costs.step:.2f} ms + {costs.message:.3f} ms x models "
                f"+ {costs.megabyte:.3f} ms x MB of logits; "
                f"fusion = {costs.row:.3f} ms x experts x rows",
                highlight=False,
                soft_wrap=True,
            )
            for size in sizes:
                far = costs.predict(FAR_EXPERTS, size, vocab)
                wires = " and ".join(f"{far.wire(g):.2f} ms at {g} Gb/s" for g in (100, 400))
                console.print(
                    f"extrapolated to {FAR_EXPERTS} experts, rows {size}: {far.megabytes:.1f} MB, "
                    f"rest {far.rest:.1f} ms, fusion {far.fusion:.1f} ms; "
                    f"a network alone would take {wires}",
                    highlight=False,
                    soft_wrap=True,
                )
        loop = measure.bench_loop(rounds)
        console.print(
            f"the coordinator's own work, without models:\n"
            f"  24 questions of 4 choices, 32 slots: {loop.steps[True]} steps with shared "
            f"prefixes, {loop.steps[False]} without\n"
            f"  8 prompts of 4096 tokens let in beside 56: {loop.admit:.1f} ms\n"
            "  a step of 64 sequences: "
            + ", ".join(f"{ms:.2f} ms with {n} queued" for n, ms in loop.queued.items())
            + f"\n  a token drawn from 32000: {loop.sample['none']:.2f} ms without a filter, "
            f"{loop.sample['top_p']:.2f} ms with top-p",
            highlight=False,
        )
        if not items:
            return
        folder = family_demo.build()
        asked = [item.prompt for item in family_demo.items("spelling", "test", 0)][:items]
        first = family_demo.items("spelling", "train", 0)[0]
        s = measure.bench_family(
            str(folder / "family.yaml"),
            asked,
            f"{first.prompt}{first.answer}\n",
            shots=5,
            max_tokens=16,
            rounds=min(rounds, 3),
        )
    console.print(
        f"{len(asked)} items of the demo family, dynamic with all experts:\n"
        f"  one at a time {s.one_at_a_time:.1f} items/s, together {s.together:.1f} items/s: "
        f"{s.together / s.one_at_a_time:.1f} times as many\n"
        f"  after {s.shots} examples, recomputed {s.recomputed:.1f} items/s, shared "
        f"{s.shared:.1f} items/s: {s.shared / s.recomputed:.2f} times as many",
        highlight=False,
    )
