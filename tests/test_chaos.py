"""For a minute, somebody kills random workers of the demo family while it is being used."""

import contextlib
import os
import random
import signal
import statistics
import threading
import time

import psutil
import pytest

from dlf_ray import Engine, Family, SamplingParams, demo

KILLS_S, PAUSE_S = 60, (1.0, 5.0)
REQUESTS = 200
HOW = {"rule": "exact", "select": "blend"}
"""Weights that move as little as logits do where batches differ: no candidates could tie."""


def workers():
    """The processes of models that are at work on our own cluster, not those still loading."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::WorkerActor.serve" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_answer_is_the_undisturbed_one(ray_cluster, capsys):
    family = Family.from_yaml(demo.build() / "family.yaml")
    items = [item for task in demo.TASKS for item in demo.items(task, "test", 0)[:REQUESTS]]
    items = random.Random(0).sample(items, REQUESTS)
    prompts = [item.prompt for item in items]
    sampling = [
        SamplingParams(max_tokens=24, temperature=float(n % 2), seed=n) for n in range(REQUESTS)
    ]
    kills = []

    def kill(until):
        chance = random.Random(1)
        while time.monotonic() < until:
            time.sleep(chance.uniform(*PAUSE_S))
            if found := workers():
                chance.choice(found).send_signal(signal.SIGKILL)
                kills.append(time.monotonic())

    with Engine(family) as engine:
        began = time.monotonic()
        expected = engine.generate(prompts, sampling, **HOW)
        undisturbed = time.monotonic() - began
        began = time.monotonic()
        killer = threading.Thread(target=kill, args=(began + KILLS_S,))
        killer.start()
        rounds = []
        while killer.is_alive() or not rounds:
            rounds.append(engine.generate(prompts, sampling, **HOW))
        took = time.monotonic() - began
        recoveries = engine.timings().recoveries
    for outputs in rounds:
        assert [o.error for o in outputs] == [None] * REQUESTS
        different = [
            (prompt, one.text, other.text)
            for prompt, one, other in zip(prompts, outputs, expected, strict=True)
            if one.token_ids != other.token_ids
        ]
        assert not different
    assert len(kills) >= 5
    assert recoveries
    seconds = [each.seconds for each in recoveries]
    extra = took - len(rounds) * undisturbed
    with capsys.disabled():
        print(
            f"\n{len(kills)} kills, {len(recoveries)} recoveries, "
            f"median {statistics.median(seconds):.1f} s, "
            f"longest {max(seconds):.1f} s; {len(rounds) * REQUESTS} answers in {took:.0f} s, "
            f"{extra:.0f} s more than undisturbed; load {os.getloadavg()[0]:.0f}"
        )
