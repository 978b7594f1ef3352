"""The continuous-batching loop over all models: plan, run, weigh, fuse, sample, commit.

A plain class: over Ray it runs inside an actor and its fabric is sockets and shared memory, in a
notebook or a test its fabric is a few function calls in the same process.

A step is three calls, so that what nobody waits for can be done while the models compute: `begin`
plans and sends, `finish` receives and decides the tokens, `news` finds the text of what the step
before decided. A stop string is found there, when one more token may be on its way: that is thrown
away.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from dlf_ray.config import BASE, LARGE, EngineConfig, Rule, Select
from dlf_ray.decoding.fusion import Aims, Fused, aim, weigh
from dlf_ray.decoding.losses import Deaths, Losses, Suspects
from dlf_ray.decoding.sampling import Penalties, penalised, sample, top_logprobs, uniform
from dlf_ray.decoding.scheduler import Scheduler, Step
from dlf_ray.decoding.stream import Stream
from dlf_ray.decoding.telemetry import Telemetry
from dlf_ray.decoding.text import Detokenizer, TextStream
from dlf_ray.errors import is_out_of_memory, sticks
from dlf_ray.messages import (
    Chunk,
    Failed,
    FinishReason,
    FusionParams,
    Limits,
    Logits,
    Lost,
    Plan,
    Ready,
    Request,
    Timings,
)
from dlf_ray.metrics import Clock, Sink

log = logging.getLogger("dlf_ray")


class Fabric(Protocol):
    """How plans reach the models and logits come back."""

    def send(self, plans: Mapping[str, Plan]) -> None:
        """Gives every model its plan and returns at once."""

    def receive(
        self, plans: Mapping[str, Plan]
    ) -> Iterator[tuple[str, Logits | Failed | Lost | Ready]]:
        """Each model's answer in the order of their arrival: logits, its error, or that it is lost;
        and whatever else changes meanwhile. A tensor is valid until the next `send`.
        """

    def changes(self) -> Iterator[tuple[str, Lost | Ready]]:
        """Models that were lost or have become ready since the last step."""


class Kind(NamedTuple):
    """What the rows of one pass have in common; step, bounds and weights are each row's own."""

    rule: Rule
    select: Select
    experts: tuple[str, ...]
    alone: str | None

    @classmethod
    def of(cls, fusion: FusionParams) -> Kind:
        if not fusion.experts:  # nothing to weigh
            return cls("grid", "paper", (), fusion.alone)
        # Fixed weights leave nothing to select.
        select = "paper" if fusion.rule == "static" else fusion.select
        return cls(fusion.rule, select, fusion.experts, None)


@dataclass
class Group:
    """The rows of a step that are fused in one pass, [R] of them."""

    kind: Kind
    owners: list[Stream] = field(default_factory=list)
    """[R]: whose each row is."""
    logits: dict[str, torch.Tensor] = field(default_factory=dict)
    """[R, V] of each model, as they arrive."""
    aims: Aims | None = None
    error: str | None = None
    """Why its rows cannot be fused."""

    @property
    def models(self) -> tuple[str, ...]:
        if self.kind.alone:
            return (self.kind.alone,)
        return (LARGE, BASE, *self.kind.experts) if self.kind.experts else (LARGE,)

    @property
    def sequences(self) -> dict[Stream, None]:
        return dict.fromkeys(self.owners)

    def take(self, model: str, logits: torch.Tensor) -> None:
        """One model's rows; the last small model's settle what the large one is to aim at."""
        self.logits[model] = logits
        small = self.models[1:]
        if model in small and all(name in self.logits for name in small):
            try:
                self._aim()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self.aims = None  # `fuse` tries fewer rows at once

    def _aim(self) -> None:
        self.aims = aim(
            self.logits[BASE],
            [self.logits[name] for name in self.kind.experts],
            rule=self.kind.rule,
            select=self.kind.select,
            weights=self._numbers("weights") if self.kind.rule == "static" else None,
        )

    def fuse(self) -> Fused:
        """Where there is no memory for all rows at once, for one half after the other."""
        logits = self.logits[self.models[0]]
        if not self.kind.experts:  # one model alone: nothing to fuse
            logits = logits.float()
            none = logits.new_zeros(len(logits))
            return Fused(logits, none[:, None][:, :0], none, logits.new_zeros(len(logits), 2))
        try:
            if self.aims is None:
                self._aim()
            assert self.aims is not None
            steps, bounds = self._numbers("step"), self._numbers("bounds")
            return weigh(logits, self.aims, rule=self.kind.rule, step=steps, bounds=bounds)
        except Exception as error:
            if len(self.owners) == 1 or not is_out_of_memory(error):
                raise
            self.aims = None
        middle = len(self.owners) // 2
        halves = [self._part(slice(middle)).fuse(), self._part(slice(middle, None)).fuse()]
        return Fused(*(torch.cat(parts) for parts in zip(*halves, strict=True)))

    def _part(self, rows: slice) -> Group:
        logits = {model: each[rows] for model, each in self.logits.items()}
        return Group(self.kind, self.owners[rows], logits)

    def _numbers(self, name: str) -> Any:
        """A number of each row's fusion, [R, ...]; the bare one where all are equal."""
        values = [getattr(owner.fusion, name) for owner in self.owners]
        if all(value == values[0] for value in values):
            return values[0]
        return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Decided:
    """What a step decided for the rows of a group."""

    tokens: list[int]
    weights: list[list[float]]
    kl: list[list[float]]
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What a step decided for a sequence; its text is still to be found."""

    decided: Decided
    rows: slice
    experts: tuple[str, ...]
    """Whose weights there are; the request's others are lost."""
    given: int
    """The first so many tokens are of the continuation."""
    count: int
    """The tokens that are generated by now."""
    reason: FinishReason | None
    stop: int | None
    """The stop token that ended it."""


class Coordinator:
    """Serves requests over the models behind `fabric`."""

    def __init__(
        self,
        fabric: Fabric,
        *,
        limits: Limits,
        detokenizer: Callable[[Sequence[int]], Detokenizer],
        engine: EngineConfig,
        device: torch.device | str = "cpu",
        metrics: Sink | None = None,
    ) -> None:
        self.fabric = fabric
        self.limits = limits
        self.detokenizer = detokenizer
        self.device = torch.device(device)
        self.telemetry = Telemetry(metrics)
        self.scheduler = Scheduler(
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_rows=engine.max_rows(limits.vocab),
            enable_prefix_caching=engine.enable_prefix_caching,
            drop_experts=engine.on_expert_loss == "drop",
            positions=limits.positions,
        )
        self.losses = Losses(self.telemetry.recovered)
        self.sequences: dict[tuple[str, int], Stream] = {}
        self.steps = 0
        self._gone: dict[str, str] = {}
        """Experts that will not come back, and why."""
        self._flight: tuple[Step, list[Group]] | None = None
        """What the models compute now."""
        self._clock = self._over = Clock()
        """Of the step that has begun, and of the one whose news are still to be told."""
        self._news: list[tuple[Stream, Outcome | Chunk]] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would advance anything: not while all that is asked waits for models."""
        return bool(self._flight or self._news or self.scheduler.has_work)

    @property
    def timings(self) -> Timings:
        seconds = dict(self.telemetry.seconds)
        return Timings(self.steps, seconds, tuple(self.losses.recoveries))

    def add(self, request: Request, client: str = "") -> None:
        """Queues a request. Raises `ValueError` where it cannot be served."""
        self.limits.check(request)
        if error := self._gone.get(request.fusion.alone or ""):
            raise ValueError(error)
        if (client, request.id) in self.sequences:
            raise ValueError(f"a request of id {request.id} is under way already")
        seed = request.sampling.seed
        sequence = Stream(
            request,
            room=self.limits.room(request),
            client=client,
            seed=secrets.randbits(64) if seed is None else seed,
        )
        self.sequences[sequence.key] = sequence
        self.scheduler.add(sequence)

    def abort(self, id: int, client: str = "") -> None:
        """Forgets a request; one that has ended already is no error, the two may have crossed."""
        if sequence := self.sequences.get((client, id)):
            self._remove(sequence)
            self._news = [each for each in self._news if each[0] is not sequence]
            self.telemetry.ended(sequence, "abort")
            self._gauge()

    def step(self) -> list[tuple[str, Chunk]]:
        """Advances every sequence that can go on; returns what is new, each with its client."""
        self.begin()
        self.finish()
        return self.news()

    def begin(self) -> None:
        """Plans a step and sends it to the models."""
        self._clock = clock = Clock()
        for model, change in self.fabric.changes():
            self._change(model, change)
        if not self.scheduler.has_work:
            return
        with clock.stage("plan"):
            step = self.scheduler.plan()
            self.fabric.send(step.plans)
            self._flight = step, self._groups(step)
        self._started(step)

    def finish(self) -> None:
        """Takes the models' logits, and decides the tokens of the step that has begun."""
        if self._flight is None:
            return
        (step, groups), self._flight = self._flight, None
        clock = self._over = self._clock
        changes = self._collect(step, groups, clock)
        for group in groups:
            if group.error:
                continue
            if not set(group.models) <= set(group.logits):
                # A model of it raised, so its sequences have failed, or was lost.
                for sequence in filter(self._is_open, group.sequences):
                    self.scheduler.retract(sequence, step.ready[sequence])
            else:
                with self._guarded(group):
                    with clock.stage("weigh"):
                        fused = group.fuse()
                    with clock.stage("sample"):
                        decided = self._decide(group, fused)
                    with clock.stage("commit"):
                        self._commit(group, decided)
        for model, change in changes:
            self._change(model, change, step.plans.get(model))
        self.steps += 1

    def news(self) -> list[tuple[str, Chunk]]:
        """What the last step brought, each with its client; whatever ended has left its slot."""
        clock, self._over = self._over, Clock()
        news, self._news = self._news, []
        told: list[tuple[Stream, Chunk]] = []
        began = time.perf_counter()
        for sequence, each in news:
            try:
                chunk = each if isinstance(each, Chunk) else self._told(sequence, each)
            except Exception as error:
                log.exception("the text of a request cannot be found")
                if self._is_open(sequence):
                    self._remove(sequence, failed=True)
                chunk = _failure(sequence, f"its text cannot be found: {error!r}")
            told.append((sequence, chunk))
        if news:
            self.telemetry.stage("text", time.perf_counter() - began)
        if news or clock.stages:
            self._gauge()
        return self.telemetry.step(clock, told)

    def _is_open(self, sequence: Stream) -> bool:
        """Whether it is still under way; one may end while models compute another step of it."""
        return self.sequences.get(sequence.key) is sequence

    def _started(self, step: Step) -> None:
        streams = [each for each in step.admitted if isinstance(each, Stream)]
        for sequence in streams:
            if sequence.text is None:
                request = sequence.request
                prompt = request.prompt_of(request.models[0]) + request.continuation
                stops = request.sampling.stop
                # The text goes on from the large model's prompt; a continuation is not part of it.
                begin = self.detokenizer(prompt)
                sequence.text = TextStream(begin, stops)
                sequence.penalties = Penalties.of(
                    request.sampling, prompt, self.limits.eos_token_ids, self.limits.vocab
                )
        self.telemetry.started(streams)

    def _groups(self, step: Step) -> list[Group]:
        groups: dict[Kind, Group] = {}
        for sequence, count in step.ready.items():
            assert isinstance(sequence, Stream)
            kind = Kind.of(sequence.fusion)
            groups.setdefault(kind, Group(kind)).owners += [sequence] * count
        return list(groups.values())

    def _collect(
        self, step: Step, groups: list[Group], clock: Clock
    ) -> list[tuple[str, Lost | Ready]]:
        """Hands the models' logits to their groups as they arrive; which models come or go."""
        changes: list[tuple[str, Lost | Ready]] = []
        answers = self.fabric.receive(step.plans)
        while True:
            with clock.stage("wait"):
                answered = next(answers, None)
            if answered is None:
                return changes
            model, answer = answered
            with clock.stage("aim"):
                if isinstance(answer, Lost | Ready):
                    changes.append((model, answer))
                elif isinstance(answer, Logits):
                    clock.forward(model, answer.began, answer.seconds)
                    self._take(step, groups, model, answer)
                elif answer.out_of_memory:
                    lost = Lost("out of memory", answer.error)
                    changes += [(model, lost), (model, Ready())]
                else:
                    self._raised(step.plans[model], model, answer.error)

    def _raised(self, plan: Plan, model: str, error: str) -> None:
        """A model's forward pass raised: what was in it fails, and is in no cache for sure."""
        slots = set(plan.slots.tolist())
        for slot in slots:
            self.scheduler.slots.forget(slot)
        for sequence in self._streams(slots):
            if model in sequence.computed:
                self._fail(sequence, f"model {model!r} failed: {error}")

    def _take(self, step: Step, groups: list[Group], model: str, answer: Logits) -> None:
        """Hands one model's rows to their groups, and fails the sequences that it fails."""
        if len(answer.values):
            self.losses.computed(model)
        values = answer.values[:, : self.limits.vocab].to(self.device)
        if not answer.finite.all():
            # Rows are independent, but nothing may trip over a row that is lost already.
            finite = torch.from_numpy(answer.finite.copy()).to(self.device)
            values = torch.where(finite[:, None], values, torch.zeros_like(values))
        for group in groups:
            if group.error or model not in group.models:
                continue
            if len(groups) == 1:  # then its rows are all that there are
                rows, own = list(range(len(values))), values
            else:
                rows = step.rows(model, group.sequences)
                own = values[rows]
            for row, sequence in zip(rows, group.owners, strict=True):
                if not answer.finite[row]:
                    self._fail(sequence, f"model {model!r} returned NaN or infinite logits")
            with self._guarded(group):
                group.take(model, own)

    @contextmanager
    def _guarded(self, group: Group) -> Iterator[None]:
        """Whatever is raised inside fails the sequences of one group, and nobody else; unless it
        leaves this process of no more use."""
        try:
            yield
        except Exception as error:
            if sticks(error):  # then no later step can be served either
                raise
            log.exception("a step failed for %d sequences", len(group.sequences))
            group.error = f"it could not be fused or sampled: {type(error).__name__}: {error}"
            for sequence in group.sequences:
                self._fail(sequence, group.error)

    def _decide(self, group: Group, fused: Fused) -> Decided:
        """The token of each row, drawn or given, and what was asked to be known of it."""
        logits = self._finite(group, fused)
        owners = group.owners
        given: list[int] = []  # -1 where a token is to be drawn
        for sequence, rows in itertools.groupby(owners):
            count = len(list(rows))
            rest = sequence.rest(count)
            given += [*rest, *[-1] * (count - len(rest))]
        drawn = [row for row, token in enumerate(given) if token < 0]
        tokens = list(given)
        if drawn:
            chosen = [owners[row] for row in drawn]
            params = [sequence.request.sampling for sequence in chosen]
            draws = [
                uniform(s.seed, len(s.generated)) if s.request.sampling.temperature > 0 else 0.0
                for s in chosen
            ]
            own = logits if len(drawn) == len(given) else logits[drawn]
            own = penalised(own, [sequence.penalties for sequence in chosen])
            for row, token in zip(drawn, sample(own, params, draws), strict=True):
                tokens[row] = token
        decided = Decided(tokens, fused.weights.tolist(), fused.kl.tolist())
        asked = [s.asked(token >= 0) for s, token in zip(owners, given, strict=True)]
        if all(count is None for count in asked):
            return decided
        logprobs = logits.log_softmax(-1)
        at = torch.tensor(tokens, device=logprobs.device)[:, None]
        best = logprobs.argmax(-1).tolist()
        return dataclasses.replace(
            decided,
            logprobs=logprobs.gather(-1, at)[:, 0].tolist(),
            top_logprobs=top_logprobs(logprobs, [count or 0 for count in asked]),
            greedy=[top == token for top, token in zip(best, tokens, strict=True)],
        )

    def _finite(self, group: Group, fused: Fused) -> torch.Tensor:
        """The fused logits; rows in which numbers overflowed fail, and nothing trips over them."""
        fine = fused.logits.abs().amax(-1).isfinite()
        fine &= fused.weights.isfinite().all(-1) & fused.kl.isfinite().all(-1)
        if fine.all():
            return fused.logits
        for owner, good in zip(group.owners, fine.tolist(), strict=True):
            if not good:
                self._fail(owner, "its fused logits are not finite: use smaller weights or bounds")
        return torch.where(fine[:, None], fused.logits, 0.0)

    def _commit(self, group: Group, decided: Decided) -> None:
        """Takes over what a step decided for a group; whatever that ends leaves its slot."""
        end = 0
        for sequence, owned in itertools.groupby(group.owners):
            begin, end = end, end + len(list(owned))
            if not self._is_open(sequence):
                continue
            given = len(sequence.rest(end - begin))
            sequence.scored += given
            reason: FinishReason | None = None
            stop: int | None = None
            if end - begin > given:
                reason, stop = self._generated(sequence, decided.tokens[end - 1])
            elif not sequence.generates and sequence.scored == len(sequence.request.continuation):
                reason = "length"
            count, experts = len(sequence.generated), group.kind.experts
            rows = slice(begin, end)
            outcome = Outcome(decided, rows, experts, given, count, reason, stop)
            self._news.append((sequence, outcome))
            if reason:
                self._remove(sequence)

    def _generated(self, sequence: Stream, token: int) -> tuple[FinishReason | None, int | None]:
        """One more token; whether that ends the text, as far as tokens tell, and which one did."""
        sampling = sequence.request.sampling
        sequence.generated.append(token)
        if sequence.penalties:
            sequence.penalties.push(token)
        if len(sequence.generated) >= sampling.min_tokens:
            stop = token if token in sampling.stop_token_ids else None
            if stop is not None or (token in self.limits.eos_token_ids and not sampling.ignore_eos):
                return "stop", stop
        return ("length" if len(sequence.generated) >= sequence.room else None), None

    def _told(self, sequence: Stream, outcome: Outcome) -> Chunk:
        """What a step means for a client: with the text that is final now, up to a stop string."""
        decided, rows, request = outcome.decided, outcome.rows, sequence.request
        reason, stop = outcome.reason, outcome.stop
        text, met = "", None
        tokens = tuple(decided.tokens[rows])
        if len(tokens) > outcome.given:
            assert sequence.text is not None
            if reason != "stop":
                may_stop = outcome.count >= request.sampling.min_tokens
                text, met = sequence.text.push(tokens[-1], may_stop=may_stop)
            if met is not None:
                reason = "stop"
                if self._is_open(sequence):
                    self._remove(sequence)
            if reason:
                text += sequence.text.end()
        scored = bool(request.continuation)
        tops = request.sampling.logprobs or request.sampling.prompt_logprobs
        return Chunk(
            id=request.id,
            text=text,
            token_ids=tokens,
            weights=tuple(self._named(sequence, outcome, row) for row in decided.weights[rows]),
            lost=tuple(name for name in request.fusion.experts if name not in outcome.experts),
            kl=tuple((f, g) for f, g in decided.kl[rows]),
            given=outcome.given,
            logprobs=(
                tuple(decided.logprobs[rows])
                if scored or request.sampling.logprobs is not None
                else ()
            ),
            top_logprobs=tuple(map(tuple, decided.top_logprobs[rows])) if tops else (),
            greedy=tuple(decided.greedy[rows]) if scored else (),
            finish_reason=reason,
            stop_reason=met if met is not None else stop,
        )

    @staticmethod
    def _named(sequence: Stream, outcome: Outcome, weights: list[float]) -> tuple[float, ...]:
        """The weight of each expert of the request; 0.0 of those that are lost."""
        found = dict(zip(outcome.experts, weights, strict=True))
        # Six digits are what float32 holds.
        return tuple(round(found.get(name, 0.0), 6) for name in sequence.request.fusion.experts)

    def _change(self, model: str, change: Lost | Ready, plan: Plan | None = None) -> None:
        """Takes in that a model was lost, while it computed `plan`, or that it is ready."""
        if isinstance(change, Ready):
            self.scheduler.find(model)
            if not any(model in each.computed for each in self.sequences.values()):
                self.losses.over(model)
            return
        running = self._dying(model, plan) if plan else []
        suspects = Suspects(
            len(running),
            highest_slot=max((each.slot for each in running), default=-1),
            deaths=max((each.deaths[model].count for each in running), default=0),
        )
        verdict = self.losses.lost(model, change, suspects)
        self.scheduler.lose(model)
        if verdict == "fewer":
            self.scheduler.preempt()
            self.scheduler.restrict(max(1, len(running) // 2))
        elif verdict == "fail":
            why = f"{change.reason}: {change.error}" if change.error else change.reason
            error = f"model {model!r} was lost while it computed this request and no other: {why}"
            for sequence in running:
                self._fail(sequence, error)

    def _dying(self, model: str, plan: Plan) -> list[Stream]:
        """The sequences that a model was computing when it was lost, which they remember."""
        ends = plan.starts + plan.lengths
        chunks = zip(plan.slots.tolist(), plan.starts.tolist(), ends.tolist(), strict=True)
        at = {slot: (start, end) for slot, start, end in chunks}
        streams = [each for each in self._streams(at) if model in each.computed]
        for sequence in streams:
            before, here = sequence.deaths.get(model), at[sequence.slot]
            sequence.deaths[model] = before.again(*here) if before else Deaths(*here)
        return streams

    def _streams(self, slots: Collection[int]) -> list[Stream]:
        """What runs in these slots."""
        running = self.scheduler.running
        return [each for each in running if each.slot in slots and isinstance(each, Stream)]

    def add_model(self, name: str, length: int, positions: int | None = None) -> None:
        """One more expert, away until the fabric says that it is ready."""
        self.limits = self.limits.having({**self.limits.lengths, name: length})
        self._gone.pop(name, None)
        if positions is not None:
            self.scheduler.slots.positions[name] = positions
        self.scheduler.lose(name)

    def is_ready(self, name: str) -> bool:
        return name not in self.scheduler.away

    def remove_model(self, name: str) -> bool:
        """Takes no more requests for an expert. False while some are under way."""
        self.limits = self.limits.having(
            {each: length for each, length in self.limits.lengths.items() if each != name}
        )
        if any(name in sequence.request.models for sequence in self.sequences.values()):
            return False
        self.scheduler.remove_model(name)
        self.losses.forget(name)
        return True

    def give_up(self, name: str, error: str) -> None:
        """An expert will not come back: what cannot do without it fails."""
        self._gone[name] = error
        for sequence in list(self.sequences.values()):
            if sequence.request.fusion.alone == name:
                self._fail(sequence, error)

    def _fail(self, sequence: Stream, error: str) -> None:
        """Ends a sequence with an error, unless it has ended."""
        if self._is_open(sequence):
            self._remove(sequence, failed=True)
            self._news.append((sequence, _failure(sequence, error)))

    def _remove(self, sequence: Stream, *, failed: bool = False) -> None:
        del self.sequences[sequence.key]
        self.scheduler.remove(sequence, failed=failed)

    def _gauge(self) -> None:
        running = self.scheduler.running
        longest = next(iter(self.limits.lengths.values()))
        held = sum(max(sequence.computed.values()) for sequence in running)
        record = self.telemetry.record
        record("num_requests_running", len(running))
        record("num_requests_waiting", len(self.sequences) - len(running))
        record("kv_cache_usage_perc", held / (longest * self.scheduler.slots.count))


def _failure(sequence: Stream, error: str) -> Chunk:
    return Chunk(id=sequence.request.id, finish_reason="error", error=error)
