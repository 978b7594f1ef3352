"""The engine over Ray: one actor per model, one coordinator, in a placement group.

Ray places, starts, watches and restarts the actors; their loops then talk over `transport` without
it. A worker whose process or node dies is started anew by Ray, on another node if need be, and its
loop with it: its hello tells the coordinator that this model has to catch up.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, TypeVar, Unpack

import msgspec
import ray
from ray.util.placement_group import PlacementGroup

from dlf_ray.config import LARGE, ExpertSpec, Family, converted
from dlf_ray.engine.actors import CoordinatorActor, WorkerActor
from dlf_ray.engine.checks import check_family, several_nodes
from dlf_ray.engine.frontend import BaseEngine, Prompts
from dlf_ray.engine.limits import by_model, chosen, limits_of, templates_of, workers_of
from dlf_ray.engine.options import FusionOptions, resolve
from dlf_ray.engine.output import EngineError, Output, raised
from dlf_ray.engine.placement import COORDINATOR, Placement, need_of, needs, settled, settled_expert
from dlf_ray.engine.transport import (
    ClientLink,
    Done,
    ToClient,
)
from dlf_ray.messages import (
    Abort,
    AddModel,
    AskTimings,
    Chunk,
    Chunks,
    Description,
    GiveUp,
    RemoveModel,
    Request,
    Stop,
    Timings,
)
from dlf_ray.models.vocabulary import agree
from dlf_ray.models.worker import ModelWorker
from dlf_ray.params import SamplingParams

LOAD_RETRIES = 2  # of a worker that is killed while it loads; more would only be killed as well
LOAD_WORD_S = 30.0  # how often it is said which models are still loading
CONNECT_TIMEOUT_S = 60.0  # for loaded workers to connect
STOP_TIMEOUT_S = 5.0  # for loops to end by themselves
MARGIN_S = 30.0  # beyond the longest step, before a silent coordinator counts as one that hangs


T = TypeVar("T")
log = logging.getLogger("dlf_ray")


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
        models: Collection[str] | None = None,
    ) -> None:
        """Raises `ValueError` where the file or the cluster has to change, `EngineError` else.

        `worker` is what every model's actor runs. `group` is a placement group of the caller's to
        run in, with the caller's own bundle first, then `placement.resources(family)`.
        `model_name` is the label of its metrics; the large model's name if not given.
        `models` are those of the family to load, all if not given; requests that need another one
        are refused.
        """
        super().__init__(family)
        self._models = chosen(family, models)
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
        self._questions = itertools.count()
        self._asked: dict[int, Future[Timings]] = {}
        """What the coordinator has not answered yet."""
        self._ping: tuple[float, Future[Timings]] | None = None
        """The last one of `check_health`, and when it was asked."""
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
        # Bundles that were made for it say already what each actor has.
        family = self.family.with_gpu_share if self._given else settled(self.family)
        self.family = family
        self._models = chosen(family, list(self._models))
        if self._worker is ModelWorker:
            check_family(family, self._models, elsewhere=several_nodes())
        _say_where_it_fuses(family)
        placement = Placement(needs(family, self._models), family.engine, self._given)
        self._placements[COORDINATOR] = placement
        placement.wait()
        served = workers_of(family, self._models)
        for name, models in served.items():
            self._actors[name] = self._start_worker(placement, name, family, models[1:])
        coordinator: Any = ray.remote(CoordinatorActor)
        coordinator = coordinator.options(**placement.options(COORDINATOR)).remote()
        workers, self._actors[COORDINATOR] = dict(self._actors), coordinator
        loaded = self._load(workers)
        self.chat_templates = templates_of(served, loaded)
        descriptions = by_model(family, served, loaded)
        unlike = agree(family, descriptions, self._tokenizer_of)
        self.tokenizers = {name: self._tokenizer_of(name) for name in unlike}
        first = next(iter(workers))
        large = () if first == LARGE else (family.large,)
        self.tokenizer = self._one(first, workers[first].tokenizer.remote(*large))
        self.limits = limits_of(family, descriptions, unlike)
        opened = coordinator.open.remote(
            served, self.limits, self.tokenizer, family.engine, self._model_name
        )
        connections = self._one(COORDINATOR, opened)
        self._descriptions = descriptions
        self._loops = {
            name: each.serve.remote(connections[name], name) for name, each in workers.items()
        }
        ready = {COORDINATOR: coordinator.ready.remote(CONNECT_TIMEOUT_S)}
        self.shares_memory = self._all(ready, watch=self._loops)[COORDINATOR]
        self._loops[COORDINATOR] = coordinator.run.remote()
        self._link = ClientLink(connections[None], self._receive, self._link_died)
        threading.Thread(target=self._watch, name="dlf-watch", daemon=True).start()

    def _start_worker(
        self, placement: Placement, name: str, family: Family, adapters: Sequence[str] = ()
    ) -> Any:
        """An actor for a model of the family, and for `adapters` over it."""
        spec = family.models[name]
        # A restarted worker is asked again for whatever it was to do: to load, or to serve.
        for_ever = {"max_restarts": -1, "max_task_retries": -1}
        remote: Any = ray.remote(WorkerActor)
        remote = remote.options(
            **placement.options(name), **for_ever, runtime_env=dict(spec.runtime_env) or None
        )
        sources = [family.models[adapter].source for adapter in adapters]
        return remote.remote(self._worker, spec, family.engine, sources)

    def _load(self, workers: Mapping[str, Any]) -> dict[str, Description]:
        """Loads models beside each other; errors as in `_all`.

        Ray would start a worker for ever that is killed for ever, for its memory say.
        """
        again = {"max_task_retries": LOAD_RETRIES}
        loading = {name: each.load.options(**again).remote() for name, each in workers.items()}
        died = f"was killed {1 + LOAD_RETRIES} times while it loaded, most likely for its memory"
        return self._all(loading, died=died)

    def _tokenizer_of(self, name: str) -> Any:
        owner = next(each for each, models in self.family.workers.items() if name in models)
        return self._one(owner, self._actors[owner].tokenizer.remote())

    def close(self) -> None:
        """Ends the loops, then frees every actor and the placement group."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._link:
            self._link.send(Stop())
            self._link.close()
        self._tell(EngineError("the engine is closed"))
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
            if spec.shares_base:
                raise ValueError(
                    f"{name!r}: an `adapter` is loaded with its base; to add it to a family that "
                    "runs, give it as `model`, which loads it merged"
                )
            spec = settled_expert(spec)
            experts = {**self.family.experts, name: spec}
            family = msgspec.structs.replace(self.family, experts=experts)
            resolve(family, {})  # with it, would requests without options be valid?
            asked = False
            try:
                placement = Placement({name: need_of(name, spec)}, family.engine)
                self._placements[name] = placement
                placement.wait()
                actor = self._actors[name] = self._start_worker(placement, name, family)
                (description,) = self._load({name: actor}).values()
                descriptions = {**self._descriptions, name: description}
                tokenizer = self._one(name, actor.tokenizer.remote())
                first = next(iter(self._descriptions))  # which, at work, has no time for questions
                two = {first: self._descriptions[first], name: description}
                known = {first: self.tokenizer, name: tokenizer}
                unlike = agree(family, two, known.__getitem__)
                limits = limits_of(family, descriptions, unlike)
                added = AddModel(
                    name,
                    limits.lengths[name],
                    vocab=description.vocab,
                    ends=limits.ends[name],
                    unlike=limits.unlike.get(name, ()),
                    positions=limits.positions.get(name),
                    pool=limits.pools.get(name),
                )
                asked = True
                self._check_open().send(added)
                connection = self._finished(name, "added").connection
                loop = actor.serve.remote(connection, name)
                self._finished(name, "joined", loop)
            except BaseException:
                if asked and not self.failure:
                    self._check_open().send(RemoveModel(name))
                    self._finished(name, "left")
                self._end([name], over=False)
                raise
            self._loops[name] = loop
            self._descriptions = descriptions
            self.limits = self.limits.adding(added)
            self.chat_templates |= templates_of({name: (name,)}, {name: description})
            if name in unlike:
                self.tokenizers[name] = tokenizer
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
            if family.experts[name].shares_base:
                raise ValueError(f"{name!r} is an adapter, which starts and ends with its base")
            loop = self._loops.pop(name, None)  # first, so that its end is not taken for a death
            weights = _without(family.fusion.weights, name)
            self.family = msgspec.structs.replace(
                family,
                experts=_without(family.experts, name),
                fusion=msgspec.structs.replace(family.fusion, weights=weights),
            )
            self.limits = limits.without(name)
            del self._descriptions[name]
            self.chat_templates.pop(name, None)
            self.tokenizers.pop(name, None)
            self._check_open().send(RemoveModel(name))
            try:
                self._finished(name, "left", loop)
            except (ValueError, EngineError) as error:  # it will not come back
                self._check_open().send(GiveUp(name, str(error)))
                self._finished(name, "left")
            self._wait_for([loop] if loop else [])
            self._end([name], over=True)

    def _finished(
        self,
        name: str,
        change: Literal["added", "joined", "left"],
        loop: ray.ObjectRef[None] | None = None,
    ) -> Done:
        """The coordinator's word on a change. Raises what ends the engine or the `loop` first."""
        while True:
            with contextlib.suppress(queue.Empty):
                done = self._done.get(timeout=1.0)
                if (done.name, done.change) == (name, change):
                    return done
                continue  # of an earlier change, that was given up before it was done
            self._check_open()
            if loop and ray.wait([loop], timeout=0)[0]:
                self._one(name, loop)

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
        (request,) = self._requests([prompt], sampling, fusion)
        return await self._whole(request)

    async def ascore(
        self,
        prompt: Prompts,
        continuation: str | Sequence[int],
        **fusion: Unpack[FusionOptions],
    ) -> Output:
        """Like `score`, for one prompt; many may be awaited together, and share the steps."""
        (request,) = self._requests([prompt], None, fusion, [continuation])
        return await self._whole(request)

    async def _whole(self, request: Request) -> Output:
        output = Output()
        async for chunk in self._chunks(request):
            output.add(chunk, request)
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
            yield Output().add(chunk, requests[0]).checked()

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
        """Where the coordinator's time has gone so far, and which losses it got over.

        Raises `EngineError` where it does not answer.
        """
        asked = self._ask()
        try:
            return asked.result(timeout=self._patience_s)
        except TimeoutError:
            raise self._silent(self._patience_s) from None

    def check_health(self) -> None:
        """Raises `EngineError` where the engine has failed, or its coordinator hangs.

        Returns at once: each call judges by the questions of those before, so call it regularly.
        """
        self._check_open()
        if self._ping is None or self._ping[1].done():
            self._ping = time.monotonic(), self._ask()
        waited = time.monotonic() - self._ping[0]
        if waited > self._patience_s:
            raise self._silent(waited)

    @property
    def _patience_s(self) -> float:
        """How long an answer may take: the coordinator gives it between two steps."""
        return self.family.engine.step_timeout_s + MARGIN_S

    @staticmethod
    def _silent(seconds: float) -> EngineError:
        return EngineError(f"the coordinator hangs: it has not answered for {seconds:.0f} s")

    def _ask(self) -> Future[Timings]:
        number = next(self._questions)
        asked = self._asked[number] = Future()
        self._check_open().send(AskTimings(number))
        return asked

    def _receive(self, message: ToClient) -> None:
        match message:
            case Timings():
                if asked := self._asked.pop(message.id, None):
                    asked.set_result(message)
            case Done():
                self._done.put(message)
            case Chunks():
                for chunk in message.chunks:
                    try:
                        self._dispatch(chunk)
                    except Exception:  # such as that of a task whose event loop has been closed
                        log.exception("a request is aborted: what it brings cannot be delivered")
                        self._deliver.pop(chunk.id, None)
                        self._abort(chunk.id)

    def _link_died(self, error: Exception) -> None:
        self._fail(EngineError(f"the link to the coordinator died: {error!r}"))

    def _watch(self) -> None:
        """Notices loops that have ended for good, and tells everybody where that was not wanted."""
        try:
            while not self._closing.is_set() and not self.failure:
                loops = dict(self._loops)
                done, _ = ray.wait(list(loops.values()), num_returns=1, timeout=1.0)
                for name, loop in loops.items():
                    if loop in done and self._loops.get(name) is loop:
                        self._ended(name, loop)
        except Exception as error:  # Ray itself has ended
            self._fail(EngineError(f"the engine has lost its actors: {error}"))

    def _ended(self, name: str, loop: ray.ObjectRef[None]) -> None:
        dropped = name in self.family.experts and self.family.engine.on_expert_loss == "drop"
        if self._closing.is_set() or self._loops.pop(name, None) is not loop:
            return  # as it was to
        try:
            ray.get(loop)
            cause = "its loop ended"
        except Exception as error:
            cause = str(error)
        failure = EngineError(f"{self._title(name)} died: {cause}")
        if dropped:
            log.error("%s; the family goes on without it", failure)
            self._check_open().send(GiveUp(name, str(failure)))
        else:
            self._fail(failure)

    def _fail(self, failure: EngineError) -> None:
        """Nothing can be served any more: whoever waits is told, and whoever comes."""
        if not self._closing.is_set():
            self.failure = self.failure or failure
            self._tell(failure)

    def _tell(self, error: EngineError) -> None:
        """Ends every wait for the coordinator with an error."""
        for id in list(self._deliver):
            if deliver := self._deliver.pop(id, None):
                try:
                    deliver(error)
                except Exception:
                    log.exception("a request cannot be told of the end: %s", error)
        for number in list(self._asked):
            if asked := self._asked.pop(number, None):
                asked.set_exception(error)

    def _title(self, name: str) -> str:
        if name == COORDINATOR:
            return f"the {name}"
        spec = self.family.models.get(name)
        return f"model {name!r}" + (f" ({spec.source})" if spec else "")

    def _one(self, name: str, ref: Any) -> Any:
        return self._all({name: ref})[name]

    def _all(
        self,
        refs: dict[str, Any],
        watch: dict[str, Any] | None = None,
        died: str = "did not start",
    ) -> dict[str, Any]:
        """All results; the first failure, also one of `watch`, is raised at once. `died` is what is
        said of an actor whose process has ended.

        Raises `ValueError` where the file has to change; `EngineError` else, also after
        `engine.start_timeout_s`.
        """
        names = {ref: name for name, ref in {**(watch or {}), **refs}.items()}
        waiting = set(names)
        began = time.monotonic()
        limit_s = self.family.engine.start_timeout_s
        while late := [self._title(name) for name, ref in refs.items() if ref in waiting]:
            left = began + limit_s - time.monotonic()
            if left <= 0:
                raise EngineError(
                    f"{', '.join(late)} did not start within {limit_s:g} s; raise "
                    "`engine.start_timeout_s` where that is not enough to load"
                )
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=min(left, LOAD_WORD_S))
            if not done:
                waited = time.monotonic() - began
                if waited < limit_s:
                    log.warning("starting, %.0f of %g s: %s", waited, limit_s, ", ".join(late))
                continue
            waiting.discard(done[0])
            self._raise_failure(self._title(names[done[0]]), done[0], died)
        return {name: ray.get(ref) for name, ref in refs.items()}

    @staticmethod
    def _raise_failure(title: str, ref: Any, died: str) -> None:
        try:
            ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            ours = isinstance(cause, ValueError | OSError) and not isinstance(cause, TimeoutError)
            kind = ValueError if ours else EngineError
            raise kind(f"{title}: {cause}") from error
        except ray.exceptions.RayError as error:
            raise EngineError(f"{title} {died}: {error}") from error


def _say_where_it_fuses(family: Family) -> None:
    share = family.engine.num_gpus
    if share:
        log.info("the coordinator fuses on a GPU, of which it has %g", share)
    elif any(spec.num_gpus for spec in family.models.values()):
        log.warning(
            "the coordinator fuses on a CPU, which is slow beside models on GPUs: give it a share "
            "of one (`engine: {num_gpus: 0.1}`)"
        )


def _without(mapping: Mapping[str, T], name: str) -> dict[str, T]:
    return {key: value for key, value in mapping.items() if key != name}
