"""Workers that serve several models: their plans joined on the way out, their logits split again.

So a base and its adapters are rows of one batch over one copy of weights, and the coordinator knows
nothing of that. The slots of a worker's models lie side by side: of M models, model i has the slots
i, i + M, i + 2 M, ... of the worker, so that low slots stay low.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dlf_ray.decoding.coordinator import Fabric
from dlf_ray.messages import Failed, Lost, Ready
from dlf_ray.plans import ALL, Ints, Logits, Plan


def by_models(fabric: Fabric, workers: Mapping[str, Sequence[str]]) -> Fabric:
    """A fabric of models over one of workers; the same where each serves one."""
    shared = any(len(models) > 1 for models in workers.values())
    return SharedWorkers(fabric, workers) if shared else fabric


class SharedWorkers:
    """A fabric of models over a fabric of workers."""

    def __init__(self, fabric: Fabric, workers: Mapping[str, Sequence[str]]) -> None:
        """`workers`: the models that each worker serves, in the worker's order; any other model has
        a worker of its own, of its name."""
        self._fabric = fabric
        self._models = dict(workers)
        self._worker = {model: name for name, models in workers.items() for model in models}
        self._kept: dict[str, tuple[int, int]] = {}
        """What the last plan of each model keeps of its cache."""
        self._flight: dict[str, Plan] = {}
        """By worker."""

    def send(self, plans: Mapping[str, Plan]) -> None:
        self._flight = self._joined(plans)
        self._fabric.send(self._flight)

    def receive(
        self, plans: Mapping[str, Plan]
    ) -> Iterator[tuple[str, Logits | Failed | Lost | Ready]]:
        for worker, answer in self._fabric.receive(self._flight):
            models = self._models.get(worker, [worker])
            if isinstance(answer, Logits):
                yield from _split(
                    answer, {model: plans[model] for model in models if model in plans}
                )
            else:
                # Without memory, a worker forgets what all of them had computed. First those that
                # were computing: once others are lost, those no longer run who may be to blame.
                every = not isinstance(answer, Failed) or answer.out_of_memory
                for model in sorted(models, key=lambda model: model not in plans):
                    if every or model in plans:
                        yield model, answer

    def changes(self) -> Iterator[tuple[str, Lost | Ready]]:
        for worker, change in self._fabric.changes():
            for model in self._models.get(worker, [worker]):
                yield model, change

    def _joined(self, plans: Mapping[str, Plan]) -> dict[str, Plan]:
        """A plan for each worker that has something to compute."""
        self._kept |= {model: (plan.keep, plan.keep_length) for model, plan in plans.items()}
        workers = dict.fromkeys(self._worker.get(model, model) for model in plans)
        found: dict[str, Plan] = {}
        for worker in workers:
            models = self._models.get(worker, [worker])
            if len(models) == 1:
                found[worker] = plans[models[0]]
            else:
                own = {at: plans[model] for at, model in enumerate(models) if model in plans}
                kept = [self._kept[model] for model in models if model in self._kept]
                found[worker] = joined(own, len(models), kept)
        return found


def _split(answer: Logits, plans: Mapping[str, Plan]) -> Iterator[tuple[str, Logits]]:
    """The rows of each model, which lie one after the other."""
    begin = 0
    for model, plan in plans.items():
        rows = slice(begin, begin + plan.rows)
        begin += plan.rows
        yield (
            model,
            dataclasses.replace(answer, values=answer.values[rows], finite=answer.finite[rows]),
        )


def joined(plans: Mapping[int, Plan], count: int, kept: Sequence[tuple[int, int]]) -> Plan:
    """One plan of those of some of `count` models, by their places; `kept` is what all keep."""

    def column(name: str) -> Ints:
        return np.concatenate([getattr(plan, name) for plan in plans.values()])

    def slots(name: str) -> Ints:
        """Those of the worker; what is no slot stays -1."""
        parts = []
        for at, plan in plans.items():
            values = getattr(plan, name)
            if name == "sources" and not len(values):
                values = np.full(len(plan.slots), -1, np.int32)
            parts.append(np.where(values < 0, -1, values * count + at))
        return np.concatenate(parts).astype(np.int32)

    sources = slots("sources")
    keep, length = (max(each) for each in zip(*kept, strict=True))
    return Plan(
        step=next(iter(plans.values())).step,
        slots=slots("slots"),
        starts=column("starts"),
        lengths=column("lengths"),
        wants=column("wants"),
        tokens=column("tokens"),
        sources=sources if (sources >= 0).any() else np.empty(0, np.int32),
        keep=min(ALL, keep * count),
        keep_length=length,
        drops=slots("drops"),
        models=np.repeat(
            np.array(list(plans), np.int32), [len(plan.slots) for plan in plans.values()]
        ),
    )
