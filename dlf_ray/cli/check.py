"""`dlf check`: what is wrong with a family, or may surprise, before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Annotated, Any

import msgspec
import typer
from rich import box
from rich.table import Table

from dlf_ray.cli.common import FamilyFile, console, errors
from dlf_ray.config import Family
from dlf_ray.engine import checks

BACKENDS = ("transformers", "vllm")
SHOWN = ("source", "where", "architecture", "backend", "tokens", "end_tokens", "context", "dtype")
"""Of a model's facts, what JSON has as it is."""
COLOURS = {"error": "red", "warning": "yellow"}


def check(
    family: FamilyFile,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead, for scripts.")
    ] = False,
) -> None:
    """Check a family before it starts; nothing is loaded or placed.

    For each model: whether it is there and whole, and which backend takes it. For the family:
    whether the models go together, what memory they need, and whether the Ray cluster that runs
    has room. Ends with 1 if something has to change.
    """
    with errors():
        try:
            loaded = Family.from_yaml(family)
        except (ValueError, FileNotFoundError) as error:
            if not as_json:
                raise
            problem = {"kind": "error", "model": None, "text": str(error)}
            _print_json({"ok": False, "problems": [problem]})
            raise typer.Exit(1) from None
        with redirect_stdout(sys.stderr):  # what libraries have to say is not the answer
            checked = checks.check(loaded)
    if as_json:
        _print_json(_plain(checked))
    else:
        _show(checked)
    raise typer.Exit(0 if checked.ok else 1)


def _print_json(value: object) -> None:
    print(msgspec.json.encode(value).decode())


def _plain(checked: checks.Checked) -> dict[str, Any]:
    models = {}
    for name, facts in checked.facts.items():
        backends = {backend: getattr(facts, backend) for backend in BACKENDS}
        models[name] = {
            **{field: getattr(facts, field) for field in SHOWN},
            "chat_template": facts.chat_template is not None,
            "adapter": facts.adapter,
            "weight_bytes": facts.weight_bytes,
            "cache_bytes_per_position": facts.position_bytes,
            "backends": {
                backend: {
                    "takes": verdict.takes,
                    "reasons": [problem.text for problem in verdict.problems],
                }
                for backend, verdict in backends.items()
            },
        }
    return {
        "ok": checked.ok,
        "models": models,
        "actors": checked.actors,
        "cluster": checked.place,
        "problems": [
            {"kind": each.kind, "model": each.model, "text": each.text} for each in checked.problems
        ],
    }


def _show(checked: checks.Checked) -> None:
    console.print(_models(checked))
    console.print(_actors(checked.actors))
    _line(f"cluster: {checked.place.text}")
    for reason, names in _notes(checked).items():
        _line(f"note: {', '.join(names)}: {reason}", "dim")
    for each in checked.problems:
        about = f"{each.model}: " if each.model else ""
        _line(f"{each.kind}: {about}{each.text}", COLOURS[each.kind])
    counts = [sum(each.kind == kind for each in checked.problems) for kind in COLOURS]
    if not any(counts):
        _line("nothing to say against it", "green")


def _line(text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _models(checked: checks.Checked) -> Table:
    table = Table(box=box.SIMPLE, caption="* would compute it", caption_justify="left")
    for title in ("model", "found", "architecture", *BACKENDS, "weights", "context"):
        table.add_column(title, overflow="fold")
    for title in ("tokens", "end\ntokens", "chat\ntemplate"):
        table.add_column(title)
    adapters = any(facts.adapter for facts in checked.facts.values())
    if adapters:
        table.add_column("adapter")
    for name, facts in checked.facts.items():
        lora = facts.adapter
        what = f"rank {lora.rank}: {' '.join(lora.targets)}" if lora else ""
        table.add_row(
            name,
            facts.where or "no",
            facts.architecture or "-",
            *(_answer(facts, backend) for backend in BACKENDS),
            _amount(facts.weight_bytes) + (f"\n{facts.dtype}" if facts.dtype else ""),
            str(facts.context or "-"),
            str(facts.tokens or "-"),
            " ".join(map(str, facts.end_tokens)) or "-",
            "-" if facts.tokens is None else "yes" if facts.chat_template else "no",
            *([what] if adapters else []),
        )
    return table


def _answer(facts: Any, backend: str) -> str:
    """Whether a backend takes a model."""
    if not facts.where:
        return "-"
    answer = {True: "yes", False: "no", None: "?"}[getattr(facts, backend).takes]
    return f"{answer} *" if backend == facts.backend else answer


def _amount(bytes: int | None) -> str:
    return "-" if bytes is None else checks.size(bytes)


def _actors(actors: Mapping[str, checks.Actor]) -> Table:
    table = Table(box=box.SIMPLE)
    for title in ("actor", "serves", "asks for", "weights", "cache, at most"):
        table.add_column(title)
    for name, each in actors.items():
        serves, sizes = " ".join(each.models) or "-", (each.weight_bytes, each.cache_bytes)
        table.add_row(name, serves, checks.listed(each.asks) or "-", *(map(_amount, sizes)))
    return table


def _notes(checked: checks.Checked) -> dict[str, list[str]]:
    """Why the backend that would not compute a model does not take it, and which models."""
    problems = {(each.model, each.text) for each in checked.problems}
    notes: dict[str, list[str]] = {}
    for name, facts in checked.facts.items():
        for backend in BACKENDS:
            for each in getattr(facts, backend).problems:
                if backend != facts.backend and (name, each.text) not in problems:
                    notes.setdefault(f"{backend}: {each.text}", []).append(name)
    return notes
