"""The engine over Ray: one actor per model, one coordinator, in a placement group.

Ray places, starts, watches and restarts the actors; their loops then talk over `transport` without
it. A worker whose process or node dies is started anew by Ray, on another node if need be, and its
loop with it: its hello tells the coordinator that this model has to catch up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, TypeVar, Unpack

import msgspec
import psutil
import ray
import torch
from ray.util.metrics import Counter, Gauge, Histogram
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dlf_ray.capacity import this_node
from dlf_ray.config import LARGE, EngineConfig, ExpertSpec, Family, ModelSpec, converted
from dlf_ray.coordinator import Coordinator
from dlf_ray.frontend import (
    BaseEngine,
    EngineError,
    FusionOptions,
    Output,
    Prompts,
    decoder,
    limits_of,
    raised,
    resolve,
)
from dlf_ray.messages import (
    Abort,
    AddModel,
    AskTimings,
    Chunk,
    Chunks,
    Description,
    Gone,
    Limits,
    Process,
    RemoveModel,
    Request,
    SamplingParams,
    Stop,
    Timings,
)
from dlf_ray.metrics import METRICS, MODEL_NAME, PREFIX
from dlf_ray.placement import COORDINATOR, Placement, need_of, needs
from dlf_ray.transport import ClientLink, Connection, Done, FromClient, Hub, ToClient, WorkerLink
from dlf_ray.worker import ModelWorker, check_vocabularies

IDLE_WAIT_S = 1.0
START_TIMEOUT_S = 60.0  # for loaded workers to connect
STOP_TIMEOUT_S = 5.0  # for loops to end by themselves


T = TypeVar("T")
log = logging.getLogger("dlf_ray")


class WorkerActor:
    """A worker whose loop is reached over sockets."""

    def __init__(self, worker: type[ModelWorker], spec: ModelSpec, engine: EngineConfig) -> None:
        self.worker = worker(spec, engine)
        self.loaded = False

    def load(self) -> Description:
        try:
            description = self.worker.load()
        except (ValueError, OSError) as error:
            if where := this_node():  # a folder may be there on one node and not on another
                raise ValueError(f"on {where}: {error}") from error
            raise
        self.loaded = True
        return description

    def tokenizer(self) -> Any:
        return self.worker.tokenizer()

    def serve(self, connection: Connection, name: str) -> None:
        """The loop. Ray calls it again in a new process where the one before has died."""
        if not self.loaded:
            self.load()
        self.worker.run(WorkerLink(connection, name, _this_process()))


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
        models: Sequence[str],
        limits: Limits,
        tokenizer: Any,
        engine: EngineConfig,
        model_name: str,
    ) -> dict[str | None, Connection]:
        """Binds the hub; the connection of each worker, and under None that of clients."""
        torch.set_num_threads(max(1, int(engine.num_cpus)))
        host = ray.util.get_node_ip_address()
        self.hub = Hub(
            host,
            models,
            rows=engine.max_num_seqs,
            vocab=limits.vocab,
            step_timeout_s=engine.step_timeout_s,
            kill=_kill_anywhere,
        )
        self._joining: dict[str, str] = {}
        self._leaving: dict[str, str] = {}
        """Which client is to hear of an expert once it is in, or out."""
        self.coordinator = Coordinator(
            self.hub,
            limits=limits,
            decode=decoder(tokenizer),
            engine=engine,
            device="cuda" if engine.num_gpus else "cpu",
            metrics=RayMetrics(model_name),
        )
        return {name: self.hub.connection(name) for name in (*models, None)}

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
            self._publish(self.coordinator.step())
            self._tell_of_changes()

    def _heed(self, client: str, message: FromClient) -> None:
        match message:
            case Request():
                try:
                    self.coordinator.add(message, client)
                except ValueError as error:
                    chunk = Chunk(id=message.id, finish_reason="error", error=str(error))
                    self._publish([(client, chunk)])
            case Abort():
                self.coordinator.abort(message.id, client)
            case AskTimings():
                self.hub.publish(client, self.coordinator.timings)
            case AddModel():
                self.coordinator.add_model(message.name, message.length)
                self._joining[message.name] = client
                self.hub.publish(client, Done(message.name, self.hub.add(message.name)))
            case RemoveModel():
                self._joining.pop(message.name, None)
                self._leaving[message.name] = client
            case Gone():
                self._publish(self.coordinator.give_up(message.name, message.error))

    def _publish(self, chunks: list[tuple[str, Chunk]]) -> None:
        news: dict[str, list[Chunk]] = {}
        for client, chunk in chunks:
            news.setdefault(client, []).append(chunk)
        for client, each in news.items():
            self.hub.publish(client, Chunks(tuple(each)))

    def _tell_of_changes(self) -> None:
        for name in [name for name in self._joining if self.coordinator.is_ready(name)]:
            self.hub.publish(self._joining.pop(name), Done(name))
        for name in [name for name in self._leaving if self.coordinator.remove_model(name)]:
            self.hub.remove(name)
            self.hub.publish(self._leaving.pop(name), Done(name))


class Engine(BaseEngine):
    """Generates with one family whose models are Ray actors.

    Joins the Ray cluster that runs (`RAY_ADDRESS`, or one on this machine), else starts one here.
    Ready when the constructor returns; `close`, or the end of a `with`, frees every actor.
    """

    def __init__(
        self,
        family: Family,
        worker: type[ModelWorker] = ModelWorker,
        group: PlacementGroup | None = None,
        model_name: str | None = None,
    ) -> None:
        """Raises `ValueError` where the file or the cluster has to change, `EngineError` else.

        `worker` is what every model's actor runs. `group` is a placement group of the caller's to
        run in, with the caller's own bundle first, then `placement.resources(family)`.
        `model_name` is the label of its metrics; the large model's name if not given.
        """
        super().__init__(family)
        self._worker = worker
        self._given = group
        self._model_name = model_name or family.large.model
        self._placements: dict[str, Placement] = {}
        """The family's, and those of single experts that came later."""
        self._link: ClientLink | None = None
        self._actors: dict[str, Any] = {}
        self._loops: dict[str, ray.ObjectRef[None]] = {}
        self._descriptions: dict[str, Description] = {}
        self.failure: EngineError | None = None
        """Why it cannot serve any more, if so."""
        self._timings: queue.SimpleQueue[Timings] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._changing = threading.Lock()
        self._closing = threading.Event()
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            try:
                ray.init(logging_level=logging.WARNING, include_dashboard=False)
            except ConnectionError as error:
                raise EngineError(
                    f"{error}. If it has token authentication on (Ray does that by itself once "
                    "~/.ray/auth_token exists), set RAY_AUTH_MODE=token; else check RAY_ADDRESS."
                ) from error
        try:
            self._start()
        except BaseException:  # an interrupt too must leave no actor behind
            self.close()
            raise

    def _start(self) -> None:
        family = self.family
        placement = Placement(needs(family), family.engine, self._given)
        self._placements[COORDINATOR] = placement
        placement.wait()
        for name, spec in family.models.items():
            self._actors[name] = self._start_worker(placement, name, spec)
        coordinator: Any = ray.remote(CoordinatorActor)
        coordinator = coordinator.options(**placement.options(COORDINATOR)).remote()
        workers, self._actors[COORDINATOR] = dict(self._actors), coordinator
        descriptions = self._all({name: each.load.remote() for name, each in workers.items()})
        check_vocabularies(family, descriptions, self._vocabulary)
        self.tokenizer = ray.get(workers[LARGE].tokenizer.remote())
        self.limits = limits_of(family, descriptions)
        connections = ray.get(
            coordinator.open.remote(
                list(workers), self.limits, self.tokenizer, family.engine, self._model_name
            )
        )
        self._descriptions = descriptions
        self._loops = {
            name: each.serve.remote(connections[name], name) for name, each in workers.items()
        }
        ready = {COORDINATOR: coordinator.ready.remote(START_TIMEOUT_S)}
        self.shares_memory = self._all(ready, watch=self._loops)[COORDINATOR]
        self._loops[COORDINATOR] = coordinator.run.remote()
        self._link = ClientLink(connections[None], self._receive)
        threading.Thread(target=self._watch, name="dlf-watch", daemon=True).start()

    def _start_worker(self, placement: Placement, name: str, spec: ModelSpec) -> Any:
        # A restarted worker is asked again for whatever it was to do: to load, or to serve.
        for_ever = {"max_restarts": -1, "max_task_retries": -1}
        remote: Any = ray.remote(WorkerActor)
        remote = remote.options(**placement.options(name), **for_ever)
        return remote.remote(self._worker, spec, self.family.engine)

    def _vocabulary(self, name: str) -> Mapping[str, int]:
        # The large model's actor, once it serves, has no time for questions.
        known = self.tokenizer if name == LARGE else None
        tokenizer = known or ray.get(self._actors[name].tokenizer.remote())
        vocabulary: Mapping[str, int] = tokenizer.get_vocab()
        return vocabulary

    def close(self) -> None:
        """Ends the loops, then frees every actor and the placement group."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._link:
            self._link.send(Stop())
            self._link.close()
        loops = list(self._loops.values())
        over = self.failure is None and self._link is not None and self._wait_for(loops)
        self._end([*self._actors, *self._placements], over=over)
        if self._started_ray:
            ray.shutdown()

    def _end(self, names: Sequence[str], *, over: bool) -> None:
        """Ends actors, whose loops are `over` or never will be, and frees their room."""
        actors = [self._actors.pop(name) for name in names if name in self._actors]
        if over:  # each ends its own process; to be killed in that, as below, would leave a trace
            once = [actor.__ray_terminate__.options(max_task_retries=0) for actor in actors]
            self._wait_for([each.remote() for each in once])
        for actor in actors:
            ray.kill(actor)  # for good: with its room gone only, it would wait to be restarted
        for name in names:
            if name in self._placements:
                self._placements.pop(name).free()

    def add_expert(self, name: str, expert: ExpertSpec | Mapping[str, Any]) -> None:
        """Loads one more expert, on resources of its own, while requests go on; from then on it
        takes part in the requests that do not choose their experts.

        Raises `ValueError` where the name or the expert does not fit the family or the cluster,
        `EngineError` where it does not start; the family is as before then.
        """
        spec = expert if isinstance(expert, ExpertSpec) else converted(expert, ExpertSpec)
        with self._changing:
            self._check_open()
            if name in self.family.models:
                raise ValueError(f"the family has a model {name!r} already")
            experts = {**self.family.experts, name: spec}
            family = msgspec.structs.replace(self.family, experts=experts)
            resolve(family, {})  # with it, would requests without options be valid?
            asked = False
            try:
                placement = Placement({name: need_of(name, spec)}, family.engine)
                self._placements[name] = placement
                placement.wait()
                actor = self._actors[name] = self._start_worker(placement, name, spec)
                (description,) = self._all({name: actor.load.remote()}).values()
                descriptions = {**self._descriptions, name: description}
                check_vocabularies(family, descriptions, self._vocabulary)
                if description.vocab < self.limits.vocab:
                    raise ValueError(
                        f"model {name!r} ({spec.model}) gives {description.vocab} logits, the "
                        f"family has {self.limits.vocab}"
                    )
                length = limits_of(family, descriptions).lengths[name]
                asked = True
                self._check_open().send(AddModel(name, length))
                connection = self._finished(name).connection
                loop = actor.serve.remote(connection, name)
                self._finished(name, loop)
            except BaseException:
                if asked and not self.failure:
                    self._check_open().send(RemoveModel(name))
                    self._finished(name)
                self._end([name], over=False)
                raise
            self._loops[name] = loop
            self._descriptions = descriptions
            self.limits = self.limits.having({**self.limits.lengths, name: length})
            self.family = family

    def remove_expert(self, name: str) -> None:
        """Takes an expert out of the family: new requests cannot name it, those under way that use
        it end first. Returns once its actor has ended. What it was placed on is free for others if
        it came by `add_expert`, else with the end of the engine.

        Raises `ValueError` if there is no such expert.
        """
        with self._changing:
            self._check_open()
            family, limits = self.family, self.limits
            if name not in family.experts:
                raise ValueError(f"no expert {name!r} in the family; it has {list(family.experts)}")
            weights = _without(family.fusion.weights, name)
            self.family = msgspec.structs.replace(
                family,
                experts=_without(family.experts, name),
                fusion=msgspec.structs.replace(family.fusion, weights=weights),
            )
            self.limits = limits.having(_without(limits.lengths, name))
            del self._descriptions[name]
            loop = self._loops.pop(name, None)
            self._check_open().send(RemoveModel(name))
            self._finished(name, loop)
            self._wait_for([loop] if loop else [])
            self._end([name], over=True)

    def _finished(self, name: str, loop: ray.ObjectRef[None] | None = None) -> Done:
        """The coordinator's word on a change. Raises what ends the engine or the `loop` first."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._done.get(timeout=1.0)
            self._check_open()
            if loop and ray.wait([loop], timeout=0)[0]:
                self._all({name: loop})

    @staticmethod
    def _wait_for(refs: list[Any]) -> bool:
        """Whether all were done soon enough."""
        done = ray.wait(refs, num_returns=len(refs), timeout=STOP_TIMEOUT_S)[0] if refs else []
        return len(done) == len(refs)

    async def agenerate(
        self,
        prompt: Prompts,
        sampling: SamplingParams | None = None,
        **fusion: Unpack[FusionOptions],
    ) -> Output:
        """Generates for one prompt; many may be awaited together, and share the steps."""
        requests = self._requests([prompt], sampling, fusion)
        output = Output()
        async for chunk in self._chunks(requests[0]):
            output.add(chunk, requests[0])
        return output

    async def astream(
        self,
        prompt: Prompts,
        sampling: SamplingParams | None = None,
        **fusion: Unpack[FusionOptions],
    ) -> AsyncIterator[Output]:
        """Like `stream`. A task that is cancelled frees the request."""
        requests = self._requests([prompt], sampling, fusion)
        async for chunk in self._chunks(requests[0]):
            if chunk.error:
                raise RuntimeError(chunk.error)
            yield Output().add(chunk, requests[0])

    async def _chunks(self, request: Request) -> AsyncIterator[Chunk]:
        loop = asyncio.get_running_loop()
        mailbox: asyncio.Queue[Chunk | Exception] = asyncio.Queue()

        def deliver(message: Chunk | Exception) -> None:
            loop.call_soon_threadsafe(mailbox.put_nowait, message)

        with self._open([request], deliver):
            while True:
                chunk = raised(await mailbox.get())
                yield chunk
                if chunk.finish_reason:
                    return

    def _send(self, request: Request) -> None:
        self._check_open().send(request)

    def _check_open(self) -> ClientLink:
        """The way to the coordinator. Raises `EngineError` where there is none any more."""
        if self.failure or not self._link or self._closing.is_set():
            raise self.failure or EngineError("the engine is closed")
        return self._link

    def _abort(self, id: int) -> None:
        if self._link and not self._closing.is_set():
            self._link.send(Abort(id))

    def timings(self) -> Timings:
        """Where the coordinator's time has gone so far, and which losses it got over."""
        self._check_open().send(AskTimings())
        return self._timings.get(timeout=self.family.engine.step_timeout_s)

    def _receive(self, message: ToClient) -> None:
        if isinstance(message, Timings):
            self._timings.put(message)
        elif isinstance(message, Done):
            self._done.put(message)
        else:
            for chunk in message.chunks:
                self._dispatch(chunk)

    def _watch(self) -> None:
        """Notices loops that have ended for good, and tells everybody where that was not wanted."""
        while not self._closing.is_set():
            loops = dict(self._loops)
            done, _ = ray.wait(list(loops.values()), num_returns=1, timeout=1.0)
            for name, loop in loops.items():
                if loop in done and self._loops.get(name) is loop and not self._closing.is_set():
                    self._ended(name, loop)
            if self.failure:
                return

    def _ended(self, name: str, loop: ray.ObjectRef[None]) -> None:
        try:
            ray.get(loop)
            cause = "its loop ended"
        except Exception as error:
            cause = str(error)
        self._loops.pop(name, None)
        failure = EngineError(f"{self._title(name)} died: {cause}")
        if name in self.family.experts and self.family.engine.on_expert_loss == "drop":
            log.error("%s; the family goes on without it", failure)
            if self._link:
                self._link.send(Gone(name, str(failure)))
            return
        self.failure = failure
        for id in list(self._deliver):
            if deliver := self._deliver.pop(id, None):
                deliver(failure)

    def _title(self, name: str) -> str:
        if name == COORDINATOR:
            return f"the {name}"
        spec = self.family.models.get(name)
        return f"model {name!r}" + (f" ({spec.model})" if spec else "")

    def _all(self, refs: dict[str, Any], watch: dict[str, Any] | None = None) -> dict[str, Any]:
        """All results; the first failure, also one of `watch`, is raised at once."""
        names = {ref: name for name, ref in {**(watch or {}), **refs}.items()}
        waiting = set(names)
        while waiting & set(refs.values()):
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            waiting.remove(done)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                ours = isinstance(cause, ValueError | OSError) and not isinstance(
                    cause, TimeoutError
                )
                kind = ValueError if ours else EngineError
                raise kind(f"{self._title(names[done])}: {cause}") from error
            except ray.exceptions.RayError as error:
                raise EngineError(f"{self._title(names[done])} did not start: {error}") from error
        return {name: ray.get(ref) for name, ref in refs.items()}


def _without(mapping: Mapping[str, T], name: str) -> dict[str, T]:
    return {key: value for key, value in mapping.items() if key != name}
