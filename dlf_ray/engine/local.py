"""The whole family in this process, without Ray: for tests, notebooks and one-GPU experiments.

The same coordinator, scheduler and workers as over Ray; only the fabric is a function call.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from dlf_ray.config import LARGE, Family
from dlf_ray.decoding.coordinator import Coordinator
from dlf_ray.decoding.structured import Grammars
from dlf_ray.decoding.text import detokenizers
from dlf_ray.engine.checks import check_family
from dlf_ray.engine.frontend import BaseEngine
from dlf_ray.engine.limits import by_model, chosen, limits_of, templates_of, workers_of
from dlf_ray.engine.output import raised
from dlf_ray.engine.sharing import by_models
from dlf_ray.messages import Chunk, Failed, Lost, Ready, Request, Timings
from dlf_ray.metrics import Sink
from dlf_ray.models.vocabulary import agree
from dlf_ray.models.worker import ModelWorker, backend_of
from dlf_ray.plans import Logits, Plan


class LocalFabric:
    """Runs the models one after the other, the small ones first."""

    def __init__(self, workers: dict[str, ModelWorker]) -> None:
        self._workers = workers

    def send(self, plans: Mapping[str, Plan]) -> None:
        """Nothing travels: `receive` computes."""

    def receive(self, plans: Mapping[str, Plan]) -> Iterator[tuple[str, Logits | Failed]]:
        for name in reversed(self._workers):
            if name in plans:
                yield name, self._workers[name].answer(plans[name])

    def changes(self) -> Iterator[tuple[str, Lost | Ready]]:
        """None: models that are objects here come and go with this one."""
        return iter(())


def _worker(
    worker: Callable[..., ModelWorker], family: Family, name: str, adapters: Sequence[str]
) -> ModelWorker:
    more = ([family.models[each].source for each in adapters],) if adapters else ()
    return worker(family.models[name], family.engine, *more)


def _check_backends(family: Family, workers: Sequence[str]) -> None:
    """Raises `ValueError` for several models under vLLM, which has state that is the process's."""
    engine = family.engine
    found = [name for name in workers if backend_of(family.models[name], engine) == "vllm"]
    if len(found) > 1:
        raise ValueError(
            f"a process takes one model under vLLM, here are {found}: use `Engine`, whose models "
            "have processes of their own, or `backend: transformers`"
        )


class LocalEngine(BaseEngine):
    """Generates in this process; each wait for a chunk advances all running requests."""

    def __init__(
        self,
        family: Family,
        worker: Callable[..., ModelWorker] = ModelWorker,
        metrics: Sink | None = None,
        models: Collection[str] | None = None,
    ) -> None:
        """Loads all models, or those that are named. `worker` makes one of (spec, engine config).

        Requests that need a model that is not loaded are refused.
        """
        super().__init__(family)
        served = workers_of(family, chosen(family, models))
        _check_backends(family, list(served))
        if worker is ModelWorker:
            check_family(family, models)
        workers = {name: _worker(worker, family, name, own[1:]) for name, own in served.items()}
        loaded = {name: each.load() for name, each in workers.items()}
        descriptions = by_model(family, served, loaded)
        owners = {name: worker for worker, models in served.items() for name in models}

        def tokenizer_of(name: str) -> Any:
            return workers[owners[name]].tokenizer()

        unlike = agree(family, descriptions, tokenizer_of)
        self.tokenizers = {name: tokenizer_of(name) for name in unlike}
        self.tokenizer = (workers.get(LARGE) or worker(family.large, family.engine)).tokenizer()
        self.chat_templates = templates_of(served, loaded)
        self.limits = limits_of(family, descriptions, unlike)
        self.coordinator = Coordinator(
            by_models(LocalFabric(workers), served),
            limits=self.limits,
            detokenizer=detokenizers(self.tokenizer),
            grammars=Grammars(self.tokenizer, self.limits.every_end),
            engine=family.engine,
            device="cuda" if family.with_gpu_share.engine.num_gpus else "cpu",
            metrics=metrics,
        )

    def close(self) -> None:
        """Nothing outlives the object."""

    def timings(self) -> Timings:
        """Where the coordinator's time has gone so far, and which losses it got over."""
        return self.coordinator.timings

    def _send(self, request: Request) -> None:
        self.coordinator.add(request)

    def _abort(self, id: int) -> None:
        self.coordinator.abort(id)

    def _wait(self, mailbox: queue.SimpleQueue[Chunk | Exception]) -> Chunk:
        while mailbox.empty():
            for _, chunk in self.coordinator.step():
                self._dispatch(chunk)
        return raised(mailbox.get())
