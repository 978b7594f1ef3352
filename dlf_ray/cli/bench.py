"""`dlf bench`: what a step costs, as tables."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.table import Table

from dlf_ray.cli.common import console, errors, names_of

FAR_EXPERTS = 64
"""For how many the benchmark's costs are extrapolated."""


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
    from dlf_ray.training import corpus
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
    with errors():
        counts, sizes = ([int(size) for size in names_of(listed)] for listed in (experts, rows))
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
        asked = [item.prompt for item in corpus.items("spelling", "test", 0)][:items]
        first = corpus.items("spelling", "train", 0)[0]
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
