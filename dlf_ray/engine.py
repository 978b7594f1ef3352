"""The engine over Ray: one actor per model, one coordinator, in a placement group.

Ray places, starts and watches the actors; their loops then talk over `transport` without it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any, Unpack

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dlf_ray.config import LARGE, EngineConfig, Family, ModelSpec
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
)
from dlf_ray.messages import (
    Abort,
    AskTimings,
    Chunk,
    Chunks,
    Description,
    Limits,
    Request,
    SamplingParams,
    Stop,
    Timings,
)
from dlf_ray.transport import ClientLink, Connection, Hub, WorkerLink
from dlf_ray.worker import ModelWorker, check_vocabularies

COORDINATOR = "coordinator"
IDLE_WAIT_S = 1.0
START_TIMEOUT_S = 60.0  # for loaded workers to connect
STOP_TIMEOUT_S = 5.0  # for loops to end by themselves


class WorkerActor:
    """A worker whose loop is reached over sockets."""

    def __init__(self, worker: type[ModelWorker], spec: ModelSpec, engine: EngineConfig) -> None:
        self.worker = worker(spec, engine)

    def load(self) -> Description:
        return self.worker.load()

    def tokenizer(self) -> Any:
        return self.worker.tokenizer()

    def serve(self, connection: Connection, name: str) -> None:
        self.worker.run(WorkerLink(connection, name))


class CoordinatorActor:
    """The coordinator's loop with its hub; requests and chunks pass through the hub as well."""

    def open(
        self, models: Sequence[str], limits: Limits, tokenizer: Any, engine: EngineConfig
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
        )
        self.coordinator = Coordinator(
            self.hub,
            limits=limits,
            decode=decoder(tokenizer),
            engine=engine,
            device="cuda" if engine.num_gpus else "cpu",
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
                if isinstance(message, Abort):
                    self.coordinator.abort(message.id, client)
                elif isinstance(message, AskTimings):
                    self.hub.publish(client, self.coordinator.timings)
                else:
                    self._add(message, client)
            if self.coordinator.has_work:
                news: dict[str, list[Chunk]] = {}
                for client, chunk in self.coordinator.step():
                    news.setdefault(client, []).append(chunk)
                for client, chunks in news.items():
                    self.hub.publish(client, Chunks(tuple(chunks)))

    def _add(self, request: Request, client: str) -> None:
        try:
            self.coordinator.add(request, client)
        except ValueError as error:
            chunk = Chunk(id=request.id, finish_reason="error", error=str(error))
            self.hub.publish(client, Chunks((chunk,)))


class Engine(BaseEngine):
    """Generates with one family whose models are Ray actors.

    Joins the Ray cluster that runs (`RAY_ADDRESS`, or one on this machine), else starts one here.
    Ready when the constructor returns; `close`, or the end of a `with`, frees every actor.
    """

    def __init__(self, family: Family, worker: type[ModelWorker] = ModelWorker) -> None:
        """Raises `ValueError` where the file or the cluster has to change, `EngineError` else.

        `worker` is what every model's actor runs.
        """
        super().__init__(family)
        self._worker = worker
        self._group: PlacementGroup | None = None
        self._link: ClientLink | None = None
        self._actors: dict[str, Any] = {}
        self._loops: dict[str, ray.ObjectRef[None]] = {}
        self._failure: EngineError | None = None
        self._timings: queue.SimpleQueue[Timings] = queue.SimpleQueue()
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
        needs = resources(family)
        check_cluster(needs)
        # Everything at once or nothing: half a family would only hold what others wait for.
        group = self._group = placement_group(
            list(needs.values()), strategy=family.engine.placement_strategy
        )
        wait_for(group, family, needs)
        names = list(needs)

        def actor(cls: type, name: str, *args: object) -> Any:
            remote: Any = ray.remote(cls)
            return remote.options(
                num_cpus=needs[name]["CPU"],
                num_gpus=needs[name].get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=names.index(name)
                ),
            ).remote(*args)

        self._actors = {
            name: actor(WorkerActor, name, self._worker, spec, family.engine)
            for name, spec in family.models.items()
        }
        coordinator = self._actors[COORDINATOR] = actor(CoordinatorActor, COORDINATOR)
        workers = {name: self._actors[name] for name in family.models}
        descriptions = self._all({name: each.load.remote() for name, each in workers.items()})
        check_vocabularies(
            family,
            descriptions,
            lambda name: ray.get(workers[name].tokenizer.remote()).get_vocab(),
        )
        self.tokenizer = ray.get(workers[LARGE].tokenizer.remote())
        self.limits = limits_of(family, descriptions)
        connections = ray.get(
            coordinator.open.remote(list(workers), self.limits, self.tokenizer, family.engine)
        )
        self._loops = {
            name: each.serve.remote(connections[name], name) for name, each in workers.items()
        }
        ready = {COORDINATOR: coordinator.ready.remote(START_TIMEOUT_S)}
        self.shares_memory = self._all(ready, watch=self._loops)[COORDINATOR]
        self._loops[COORDINATOR] = coordinator.run.remote()
        self._link = ClientLink(connections[None], self._receive)
        threading.Thread(target=self._watch, name="dlf-watch", daemon=True).start()

    def close(self) -> None:
        """Ends the loops, then frees every actor and the placement group."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._link:
            self._link.send(Stop())
            self._link.close()
            if self._failure is None:
                self._wait_for(list(self._loops.values()))
                # Each ends its own process; to be killed in that, as below, would leave a trace.
                ended = [each.__ray_terminate__.remote() for each in self._actors.values()]
                self._wait_for(ended)
        self._actors = {}
        if self._group:
            remove_placement_group(self._group)  # ends whatever still runs in it
        if self._started_ray:
            ray.shutdown()

    @staticmethod
    def _wait_for(refs: list[Any]) -> None:
        ray.wait(refs, num_returns=len(refs), timeout=STOP_TIMEOUT_S)

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
            output.add(chunk, requests[0].fusion.experts)
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
            yield Output().add(chunk, requests[0].fusion.experts)

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
        if self._failure or not self._link or self._closing.is_set():
            raise self._failure or EngineError("the engine is closed")
        self._link.send(request)

    def _abort(self, id: int) -> None:
        if self._link and not self._closing.is_set():
            self._link.send(Abort(id))

    def timings(self) -> Timings:
        """Where the coordinator's time has gone so far."""
        if self._failure or not self._link or self._closing.is_set():
            raise self._failure or EngineError("the engine is closed")
        self._link.send(AskTimings())
        return self._timings.get(timeout=self.family.engine.step_timeout_s)

    def _receive(self, message: Chunks | Timings) -> None:
        if isinstance(message, Timings):
            self._timings.put(message)
        else:
            for chunk in message.chunks:
                self._dispatch(chunk)

    def _watch(self) -> None:
        """Waits for the first loop to end, and tells everybody unless that was wanted."""
        names = {ref: name for name, ref in self._loops.items()}
        done: list[ray.ObjectRef[None]] = []
        while not done and not self._closing.is_set():
            done, _ = ray.wait(list(names), num_returns=1, timeout=1.0)
        if self._closing.is_set():
            return
        name = names[done[0]]
        try:
            ray.get(done[0])
            cause = "its loop ended"
        except Exception as error:
            cause = str(error)
        self._failure = EngineError(f"{self._title(name)} died: {cause}")
        for id in list(self._deliver):
            if deliver := self._deliver.pop(id, None):
                deliver(self._failure)

    def _title(self, name: str) -> str:
        spec = self.family.models.get(name)
        return f"model {name!r} ({spec.model})" if spec else f"the {name}"

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
                kind = ValueError if isinstance(error.cause, ValueError | OSError) else EngineError
                raise kind(f"{self._title(names[done])}: {error.cause}") from error
            except ray.exceptions.RayError as error:
                raise EngineError(f"{self._title(names[done])} did not start: {error}") from error
        return {name: ray.get(ref) for name, ref in refs.items()}


def resources(family: Family) -> dict[str, dict[str, float]]:
    """What each actor of the family asks of the cluster, the coordinator first."""
    specs: dict[str, ModelSpec | EngineConfig] = {COORDINATOR: family.engine, **family.models}
    return {
        name: {"CPU": spec.num_cpus, **({"GPU": spec.num_gpus} if spec.num_gpus else {})}
        for name, spec in specs.items()
    }


def check_cluster(needs: dict[str, dict[str, float]]) -> None:
    """Raises `ValueError`, with what is needed and what there is, if the cluster is too small."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    problems = []
    for kind in ("CPU", "GPU"):
        total = sum(node.get(kind, 0) for node in nodes)
        largest = max((node.get(kind, 0) for node in nodes), default=0)
        wanted = sum(need.get(kind, 0) for need in needs.values())
        if wanted > total:
            problems.append(f"{wanted:g} {kind}s are needed, the cluster has {total:g}")
        for name, need in needs.items():
            if need.get(kind, 0) > largest:
                problems.append(
                    f"{name} needs {need[kind]:g} {kind}s on one node, the largest has {largest:g}"
                )
    if problems:
        rows = [f"  {name}: {_amounts(need)}" for name, need in needs.items()]
        raise ValueError(
            "the cluster is too small for the family: " + "; ".join(problems) + ". Its actors ask "
            "for\n" + "\n".join(rows) + "\nAdd nodes, or lower `num_cpus` and `num_gpus` in the "
            "family file (fractions share a CPU or a GPU)."
        )


def wait_for(group: PlacementGroup, family: Family, needs: dict[str, dict[str, float]]) -> None:
    """Until the group is placed. Raises `EngineError` if others hold its room for too long."""
    config = family.engine
    if not group.wait(config.placement_timeout_s):
        available = ray.available_resources()
        wanted = {kind: sum(n.get(kind, 0) for n in needs.values()) for kind in ("CPU", "GPU")}
        free = {kind: available.get(kind, 0) for kind in wanted}
        raise EngineError(
            f"no room in the cluster within {config.placement_timeout_s:g} s: the family needs "
            f"{_amounts(wanted)}, free are {_amounts(free)} (placement "
            f"{config.placement_strategy}). Stop what holds the rest, or raise "
            "`engine.placement_timeout_s`."
        )


def _amounts(need: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in need.items())
