"""For a while, somebody kills random workers of a trained family while it is being used.

For `DLF_CHAOS_S` seconds (10 unless the environment says more), and until enough have died.
"""

import os
import random
import signal
import statistics
import threading
import time

import pytest
from processes import below

from dlf_ray import Engine, Family, SamplingParams
from dlf_ray.training import corpus, demo

KILLS_S, KILLS, PAUSE_S = float(os.environ.get("DLF_CHAOS_S", "10")), 4, (0.5, 3.0)
REQUESTS = 120
HOW = {"rule": "exact", "select": "blend"}
"""Weights that move as little as logits do where batches differ: no candidates could tie."""
SMALL = demo.Size(hidden=64, layers=2, heads=2, feed_forward=128, steps=100, lr=4e-3)
RECIPE = demo.Recipe(large=SMALL, base=SMALL, vocabulary=600, expert_steps=20, upper_steps=1)
"""Trained enough to be sure of most tokens, which is all that is asked of it here."""


def workers():
    """The processes of models that are at work on our own cluster, not those still loading."""
    return below("ray::WorkerActor.serve")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_answer_is_the_undisturbed_one(ray_cluster, tmp_path, figure):
    folder = demo.build(tmp_path / "family", recipe=RECIPE, progress=False)
    family = Family.from_yaml(folder / "family.yaml")
    items = [item for task in corpus.TASKS for item in corpus.items(task, "test", 0)[:REQUESTS]]
    items = random.Random(0).sample(items, REQUESTS)
    prompts = [item.prompt for item in items]
    sampling = [
        SamplingParams(max_tokens=24, temperature=float(n % 2), seed=n) for n in range(REQUESTS)
    ]
    kills, over = [], threading.Event()

    def kill(until):
        chance = random.Random(1)
        while not over.is_set() and (time.monotonic() < until or len(kills) < KILLS):
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
        try:
            while killer.is_alive() or not rounds:
                rounds.append(engine.generate(prompts, sampling, **HOW))
        finally:
            over.set()
            killer.join()
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
    assert len(kills) >= KILLS
    assert recoveries
    seconds = [each.seconds for each in recoveries]
    extra = took - len(rounds) * undisturbed
    figure(
        f"{len(kills)} kills, {len(recoveries)} recoveries, "
        f"median {statistics.median(seconds):.1f} s, "
        f"longest {max(seconds):.1f} s; {len(rounds) * REQUESTS} answers in {took:.0f} s, "
        f"{extra:.0f} s more than undisturbed; load {os.getloadavg()[0]:.0f}"
    )
