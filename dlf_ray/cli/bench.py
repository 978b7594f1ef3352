"""`dlf bench`: what a step costs, or what backends and adapters give, as tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    backend: Annotated[
        str, typer.Option(help="Measure backends instead, by commas: transformers, vllm.")
    ] = "",
    sequences: Annotated[
        str, typer.Option(help="With --backend: sequences decoded together, by commas.")
    ] = "1,8,32",
    tokens: Annotated[int, typer.Option(help="With --backend: new tokens of each.", min=1)] = 32,
    adapters: Annotated[
        str, typer.Option(help="Measure numbers of adapters over one base instead, by commas.")
    ] = "",
    shape: Annotated[
        str, typer.Option(help="With --backend or --adapters: of the models, `real` or `tiny`.")
    ] = "real",
    vllm_python: Annotated[
        str, typer.Option(help="The Python of an environment with vLLM, if this has none.")
    ] = "",
) -> None:
    """What a step of the engine costs by itself, and what batching and shared examples gain.

    Steps: real actors on the nodes of the cluster, forward passes left out; beside them, the same
    bytes between as many processes of this node in one plain ZeroMQ round trip. With several
    numbers of experts and of rows, a fit of what grows with what. Items: those of the demo family,
    in this process.

    With --backend: tokens/s of random models of real shapes, one alone and a fused family, beside
    vLLM's own where there is one. With --adapters: memory and steps of a base with adapters in one
    worker, beside as many separate models.
    """
    if adapters:
        _adapters(adapters, backend or "transformers", shape, rounds, vllm_python or None)
        return
    if backend:
        _backends(backend, sequences, shape, tokens, rounds, vllm_python or None)
        return
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
        counts, sizes = map(_numbers, (experts, rows))
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


def _numbers(listed: str) -> list[int]:
    return [int(number) for number in names_of(listed)]


def _backends(
    listed: str, sequences: str, shape: str, tokens: int, rounds: int, vllm_python: str | None
) -> None:
    from dlf_ray import bench_backends as measure

    backends = names_of(listed)
    table = Table(
        "what",
        "sequences",
        *(f"{backend}\ntokens/s" for backend in backends),
        f"{measure.PEER}\ntokens/s",
        *(f"{backend} /\n{measure.PEER}" for backend in backends),
        box=box.SIMPLE,
        title=f"medians of {rounds} rounds: {tokens} tokens after prompts of {measure.PROMPT}",
        caption=f"{measure.PEER}: LLM.generate of the large model, eager as under dlf_ray",
        caption_justify="left",
    )
    with errors(), _shown(table, vllm_python):
        found = measure.bench_backends(
            backends,
            _numbers(sequences),
            shape=shape,
            tokens=tokens,
            rounds=rounds,
            vllm_python=vllm_python,
        )
        for speed in found:
            peer = speed.peer if speed.what == measure.ALONE else None
            ratios = [speed.ratio(backend) for backend in backends]
            table.add_row(
                speed.what,
                str(speed.sequences),
                *(f"{speed.rates[backend]:.1f}" for backend in backends),
                f"{peer:.1f}" if peer else "",
                *(f"{ratio:.2f}" if ratio else "" for ratio in ratios),
            )
            console.print(f"measured {speed.what}, {speed.sequences} sequences", style="dim")


def _adapters(listed: str, backend: str, shape: str, rounds: int, vllm_python: str | None) -> None:
    from dlf_ray import bench_backends as measure

    table = Table(
        "backend",
        "adapters",
        "one worker\nMiB",
        "separate\nMiB",
        "separate /\none worker",
        "one worker\nms a step",
        "separate\nms a step",
        "separate /\none worker",
        "separate\nmeasured",
        box=box.SIMPLE,
        title=f"medians of {rounds} rounds of {measure.STEPS} steps of {measure.ROWS} sequences "
        "per model",
        caption="MiB are resident in processes, libraries that they share in each; ~ is "
        "extrapolated: memory from one separate model, time from those measured",
        caption_justify="left",
    )
    with errors(), _shown(table, vllm_python):
        found = measure.bench_adapters(
            _numbers(listed),
            names_of(backend),
            shape=shape,
            rounds=rounds,
            vllm_python=vllm_python,
        )
        for saving in found:
            sign = "~" if saving.extrapolated else ""
            table.add_row(
                saving.backend,
                str(saving.adapters),
                f"{saving.shared_bytes / 2**20:.0f}",
                f"{sign}{saving.separate_bytes / 2**20:.0f}",
                f"{sign}{saving.separate_bytes / saving.shared_bytes:.2f}",
                f"{saving.shared_ms:.1f}",
                f"{sign}{saving.separate_ms:.1f}",
                f"{sign}{saving.separate_ms / saving.shared_ms:.2f}",
                f"{saving.measured} of {saving.adapters + 1}",
            )
            console.print(f"measured {saving.backend}, {saving.adapters} adapters", style="dim")


@contextmanager
def _shown(table: Table, vllm_python: str | None) -> Iterator[None]:
    """Prints the table in the end, also with what there is of it where something ends it before."""
    from dlf_ray.bench_backends import about

    try:
        yield
    finally:
        if table.row_count:
            console.print(about(vllm_python), highlight=False, soft_wrap=True)
            console.print(table)
