"""What runs on Ray: a worker per model, a coordinator over them, and what they need of a node.

Plain classes, which `engine` makes actors of. Each ends up in one long loop, which is reached over
`transport`: Ray places it, and starts it again in a new process where the one before has died.
"""

from __future__ import annotations

import contextlib
import logging
import os
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import psutil
import ray
import torch
from ray.util.metrics import Counter, Gauge, Histogram
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dlf_ray.config import EngineConfig, ModelSpec
from dlf_ray.decoding.coordinator import Coordinator
from dlf_ray.decoding.structured import Grammars
from dlf_ray.decoding.text import detokenizers
from dlf_ray.engine.capacity import this_node
from dlf_ray.engine.sharing import by_models
from dlf_ray.engine.transport import (
    Connection,
    Done,
    FromClient,
    Hub,
    WorkerLink,
)
from dlf_ray.messages import (
    Abort,
    AddModel,
    AskTimings,
    Chunk,
    Chunks,
    Description,
    GiveUp,
    Limits,
    Process,
    RemoveModel,
    Request,
    Stop,
)
from dlf_ray.metrics import METRICS, MODEL_NAME, PREFIX
from dlf_ray.models.worker import ModelWorker

log = logging.getLogger("dlf_ray")
IDLE_WAIT_S = 1.0


class WorkerActor:
    """A worker whose loop is reached over sockets."""

    def __init__(
        self,
        worker: type[ModelWorker],
        spec: ModelSpec,
        engine: EngineConfig,
        adapters: Sequence[str] = (),
    ) -> None:
        self.worker = worker(spec, engine, adapters) if adapters else worker(spec, engine)
        self.loaded = False

    def load(self) -> Description:
        keep_to_share(self.worker.spec.num_gpus)
        try:
            description = self.worker.load()
        except (ValueError, OSError) as error:
            if where := this_node():  # a folder may be there on one node and not on another
                raise ValueError(f"on {where}: {error}") from error
            raise
        self.loaded = True
        return description

    def tokenizer(self, spec: ModelSpec | None = None) -> Any:
        """The model's own, or another's, which this actor need not have loaded."""
        worker = type(self.worker)(spec, self.worker.engine) if spec else self.worker
        return worker.tokenizer()

    def serve(self, connection: Connection, name: str) -> None:
        """The loop. Ray calls it again in a new process where the one before has died."""
        if not self.loaded:
            self.load()
        try:
            self.worker.serve(partial(WorkerLink, connection, name, _this_process()))
        except Exception:
            # What no step can get over, such as an error of CUDA's that sticks, another process
            # can: Ray starts one, as where this one had died by itself.
            traceback.print_exc()
            os._exit(1)


def keep_to_share(num_gpus: float | None) -> None:
    """Holds this process to its share of a GPU, so that it cannot take what is its neighbours'."""
    if num_gpus and num_gpus < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(num_gpus)


def _this_process() -> Process:
    node = ray.get_runtime_context().get_node_id()
    return Process(node, os.getpid(), psutil.Process().create_time())


def _kill(process: Process) -> None:
    """Ends a process of this node, if it has not ended yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(process.pid)
        if found.create_time() == process.created:
            found.kill()


def _kill_anywhere(process: Process) -> None:
    """The same on any node, without waiting for it.

    By a signal on the spot, since a process that hangs does not listen to Ray either.
    """
    node = ray.get_runtime_context().get_node_id()
    if process.node == node:
        _kill(process)
    else:
        there = NodeAffinitySchedulingStrategy(process.node, soft=False)
        remote: Any = ray.remote(_kill)
        remote.options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(process)


class RayMetrics:
    """A sink in Ray's own metrics, which every node exports for Prometheus as `ray_dlf_...`."""

    def __init__(self, model_name: str) -> None:
        self._metrics: dict[str, Any] = {}
        for name, each in METRICS.items():
            kind = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}[each.kind]
            options = {"boundaries": list(each.buckets)} if each.kind == "histogram" else {}
            labels = (MODEL_NAME, *each.labels)
            made = kind(PREFIX + name, description=each.description, tag_keys=labels, **options)
            made.set_default_tags({MODEL_NAME: model_name})
            self._metrics[name] = made

    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        metric = self._metrics[name]
        if isinstance(metric, Counter):
            if value > 0:
                metric.inc(value, dict(labels))
        elif isinstance(metric, Gauge):
            metric.set(value, dict(labels))
        else:
            metric.observe(value, dict(labels))


class CoordinatorActor:
    """The coordinator's loop with its hub; requests and chunks pass through the hub as well."""

    def open(
        self,
        workers: Mapping[str, Sequence[str]],
        limits: Limits,
        tokenizer: Any,
        engine: EngineConfig,
        model_name: str,
    ) -> dict[str | None, Connection]:
        """Binds the hub; the connection of each worker, and under None that of clients.

        `workers`: the models that each serves, in its order.
        """
        torch.set_num_threads(max(1, int(engine.num_cpus or 1)))
        keep_to_share(engine.num_gpus)
        host = ray.util.get_node_ip_address()
        self.hub = Hub(
            host,
            list(workers),
            rows=engine.max_rows(limits.vocab) * max(map(len, workers.values())),
            vocab=limits.vocab,
            step_timeout_s=engine.step_timeout_s,
            kill=_kill_anywhere,
        )
        self._joining: dict[str, str] = {}
        self._leaving: dict[str, str] = {}
        """Which client is to hear of an expert once it is in, or out."""
        self.coordinator = Coordinator(
            by_models(self.hub, workers),
            limits=limits,
            detokenizer=detokenizers(tokenizer),
            grammars=Grammars(tokenizer, limits.every_end),
            engine=engine,
            device="cuda" if engine.num_gpus else "cpu",
            metrics=RayMetrics(model_name),
        )
        return {name: self.hub.connection(name) for name in (*workers, None)}

    def ready(self, timeout_s: float) -> dict[str, bool]:
        """Waits for all workers; whether each hands its logits over in shared memory."""
        return self.hub.wait_for_workers(timeout_s)

    def run(self) -> None:
        """Steps while there is work, until a client says stop."""
        while True:
            wait_s = 0 if self.coordinator.has_work else IDLE_WAIT_S
            for client, message in self.hub.requests(wait_s=wait_s):
                if isinstance(message, Stop):
                    self.hub.close()
                    return
                self._heed(client, message)
            self.coordinator.begin()
            # While the models compute, clients hear of the step before.
            self._publish(self.coordinator.news())
            self.coordinator.finish()
            self._tell_of_changes()

    def _heed(self, client: str, message: FromClient) -> None:
        match message:
            case Request():
                try:
                    self.coordinator.add(message, client)
                except Exception as error:  # of a request, which may hurt no other
                    refused = isinstance(error, ValueError)
                    if not refused:
                        log.exception("request %d cannot be taken", message.id)
                    chunk = Chunk(
                        id=message.id, finish_reason="error", error=str(error), refused=refused
                    )
                    self._publish([(client, chunk)])
            case Abort():
                self.coordinator.abort(message.id, client)
            case AskTimings():
                answer = msgspec.structs.replace(self.coordinator.timings, id=message.id)
                self.hub.publish(client, answer)
            case AddModel():
                self.coordinator.add_model(message)
                self._joining[message.name] = client
                room = self.hub.add(message.name)
                self.hub.publish(client, Done(message.name, "added", room))
            case RemoveModel():
                self._joining.pop(message.name, None)
                self._leaving[message.name] = client
            case GiveUp():
                self.coordinator.give_up(message.name, message.error)

    def _publish(self, chunks: list[tuple[str, Chunk]]) -> None:
        news: dict[str, list[Chunk]] = {}
        for client, chunk in chunks:
            news.setdefault(client, []).append(chunk)
        for client, each in news.items():
            self.hub.publish(client, Chunks(tuple(each)))

    def _tell_of_changes(self) -> None:
        for name in [name for name in self._joining if self.coordinator.is_ready(name)]:
            self.hub.publish(self._joining.pop(name), Done(name, "joined"))
        for name in [name for name in self._leaving if self.coordinator.remove_model(name)]:
            self.hub.remove(name)
            self.hub.publish(self._leaving.pop(name), Done(name, "left"))
