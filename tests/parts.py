"""Parts of an engine by themselves, for tests of one or the other.

Sequences for a scheduler, a local fabric that loses models, a hub and the workers' ends of it.
"""

import dataclasses
import random
import threading

import numpy as np
import torch

from dlf_ray import SamplingParams
from dlf_ray.decoding.scheduler import Sequence
from dlf_ray.engine.local import LocalFabric
from dlf_ray.engine.transport import Hub, WorkerLink
from dlf_ray.messages import Lost, Ready, Request
from dlf_ray.params import FusionParams
from dlf_ray.plans import Logits, Plan

FUSION = FusionParams(
    rule="grid", select="paper", step=0.1, experts=("math",), bounds=((0.0, 2.0),)
)


LARGE_ALONE = FusionParams(rule="grid", select="paper", step=0.1, experts=(), bounds=())


def sequence(id, prompt, new=3, prompts=None, fusion=FUSION, continuation=()):
    request = Request(
        id=id,
        prompt=tuple(prompt),
        prompts=prompts or {},
        continuation=tuple(continuation),
        sampling=SamplingParams(max_tokens=new),
        fusion=fusion,
    )
    return Sequence(request, max_new_tokens=new)


class Flaky(LocalFabric):
    """Loses models at random: before they compute, after, or between two steps."""

    def __init__(self, workers, chance, seed=0):
        super().__init__(workers)
        self.random, self.chance = random.Random(seed), chance
        self.away = {}
        """For each model that is away, in how many steps it will be back."""
        self.losses = 0

    def lose(self, name):
        self.losses += 1
        self.away[name] = self.random.randrange(4)
        self._workers[name].runner.forget()
        return name, Lost("died")

    def receive(self, plans):
        assert not set(plans) & set(self.away), "a plan for a model that is away"
        for name, answer in super().receive(plans):
            if self.random.random() < self.chance:
                yield self.lose(name)
            else:
                yield name, answer

    def changes(self):
        for name in self._workers:
            if name not in self.away:
                if self.random.random() < self.chance / 2:
                    yield self.lose(name)
            elif self.away[name] > 0:
                self.away[name] -= 1
            else:
                del self.away[name]
                yield name, Ready()


def flaky(engine, **kwargs):
    """Makes an engine's models come and go."""
    engine.coordinator.fabric = Flaky(engine.coordinator.fabric._workers, **kwargs)
    return engine.coordinator.fabric


ROWS, VOCAB = 4, 50


def hub_of(
    step_timeout_s, kill=lambda process: None, names=("large", "base"), rows=ROWS, vocab=VOCAB
):
    return Hub(
        "127.0.0.1",
        names,
        rows=rows,
        vocab=vocab,
        step_timeout_s=step_timeout_s,
        kill=kill,
    )


def plan(step, rows=1):
    ones = np.ones(rows, dtype=np.int32)
    return Plan(step, np.arange(rows, dtype=np.int32), 0 * ones, ones, ones, 7 * ones)


def logits(step, rows=1, dtype=torch.float32, seed=0):
    values = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Logits(step, values, np.ones(rows, dtype=np.bool_), 0.25)


def start(hub, name, answer, memory=True, process=None):
    """A worker that answers each plan with `answer(link, plan)`, on a thread of its own."""
    connection = hub.connection(name)
    if not memory:
        connection = dataclasses.replace(connection, memory=None)

    def loop():
        link = WorkerLink(connection, name, process)
        for each in link.plans():
            answer(link, each)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    return thread


def answers(hub, plans):
    hub.send(plans)
    return [(name, type(answer)) for name, answer in hub.receive(plans)]
