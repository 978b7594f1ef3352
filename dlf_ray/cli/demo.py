"""`dlf demo`: a tiny family, trained on the spot, by every method."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from dlf_ray.cli.common import Local, console, engine_of, errors
from dlf_ray.cli.tables import log, scores
from dlf_ray.evaluation.evaluate import run
from dlf_ray.evaluation.experiment import Experiment, TaskSpec

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


def demo(
    seed: Annotated[int, typer.Option(help="Of corpus and training.")] = 0,
    limit: Annotated[int, typer.Option(help="Items per task.", min=1)] = 300,
    output: Annotated[Path | None, typer.Option(help="Keep the results in this folder.")] = None,
    local: Local = False,
) -> None:
    """Train a tiny family (once, cached), decode fused over Ray, print what each method gets."""
    # It imports transformers, so only where it is used.
    from dlf_ray.training import corpus
    from dlf_ray.training import demo as family_demo

    with errors(), tempfile.TemporaryDirectory() as unkept:
        began = time.perf_counter()
        folder = family_demo.build(seed=seed)
        trained = time.perf_counter() - began
        experiment = Experiment(
            family=str(folder / "family.yaml"),
            tasks=tuple(
                TaskSpec(name=task, data=f"{folder}/{task}-test.jsonl", limit=limit, max_tokens=32)
                for task in corpus.TASKS
            ),
            methods=DEMO_METHODS,
            upper_bound="upper-{task}",
            output=str(output or unkept),
        )
        # The upper bounds are single models: they need no actors.
        malformed = run(
            experiment,
            lambda family, *, models: engine_of(family, local or not family.experts, models=models),
            log=log,
        )
        console.print(scores(experiment.output, DEMO_METHODS, malformed))
        decoded = time.perf_counter() - began - trained
        console.print(
            f"training {trained:.0f} s (cached in {folder}), decoding {decoded:.0f} s",
            highlight=False,
            soft_wrap=True,
        )
        prompt = corpus.items(corpus.TASKS[0], "test", seed)[0].prompt
        console.print(
            f"next: dlf generate {folder / 'family.yaml'} --show-weights "
            f"--prompt $'{prompt.encode('unicode_escape').decode()}'",
            highlight=False,
            soft_wrap=True,
        )
