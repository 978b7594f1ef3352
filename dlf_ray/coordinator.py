"""The continuous-batching loop over all models: plan, run, weigh, fuse, sample, commit.

A plain class: over Ray it runs inside an actor and its fabric is sockets and shared memory, in a
notebook or a test its fabric is a few function calls in the same process.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from msgspec.structs import replace

from dlf_ray import scheduler
from dlf_ray.config import BASE, LARGE, EngineConfig
from dlf_ray.fusion import Aims, Fused, aim, weigh
from dlf_ray.messages import (
    Chunk,
    Failed,
    FinishReason,
    FusionParams,
    Limits,
    Logits,
    LossReason,
    Lost,
    Plan,
    Ready,
    Recovery,
    Request,
    Timings,
)
from dlf_ray.metrics import Clock, Metrics, Sink, Span
from dlf_ray.sampling import penalised, sample, top_logprobs, uniform
from dlf_ray.scheduler import Scheduler, Step
from dlf_ray.text import TextStream

STRIKES = 8
"""Losses of a model with no logits of it in between, after which what runs is suspected."""
DIRECTIONS = ("fused_large", "large_fused")

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


@dataclass(eq=False)
class Stream(scheduler.Sequence):
    """A sequence, with its client and its text so far."""

    client: str = ""
    seed: int = 0
    text: TextStream = field(kw_only=True)
    arrived: float = field(default_factory=time.time)
    started: bool = False
    """Whether it has had a slot yet."""
    emitted: float | None = None
    """When its newest token left."""
    spans: list[Span] = field(default_factory=list)

    @property
    def fusion(self) -> FusionParams:
        """The request's, without the experts that are lost to it for now."""
        fusion = self.request.fusion
        return fusion.without(self.lost) if self.lost else fusion

    @property
    def lost(self) -> tuple[str, ...]:
        return tuple(name for name in self.request.fusion.experts if name not in self.computed)

    def named(self, weights: Sequence[float]) -> tuple[float, ...]:
        """The weight of each expert of the request; 0.0 of those that are lost."""
        found = dict(zip(self.fusion.experts, weights, strict=True))
        # Six digits are what float32 holds.
        return tuple(round(found.get(name, 0.0), 6) for name in self.request.fusion.experts)

    @property
    def models(self) -> tuple[str, ...]:
        return self.request.models

    def rest(self, count: int) -> tuple[int, ...]:
        """What is still to be scored of the continuation, at most `count` tokens."""
        return self.request.continuation[self.scored : self.scored + count]

    def asked(self, given: bool) -> int | None:
        """How many top log-probabilities a token of the continuation, or a generated one, comes
        with; None where not even its own was asked for."""
        sampling = self.request.sampling
        return (sampling.prompt_logprobs or 0) if given else sampling.logprobs


@dataclass(frozen=True)
class Decided:
    """What a step decided for the rows of a group."""

    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)

    def part(self, rows: slice, sequence: Stream) -> dict[str, Any]:
        """The fields of the chunk of one sequence."""
        fields: dict[str, Any] = {"token_ids": tuple(self.tokens[rows])}
        sampling = sequence.request.sampling
        if sequence.request.continuation or sampling.logprobs is not None:
            fields["logprobs"] = tuple(self.logprobs[rows])
        if sampling.logprobs or sampling.prompt_logprobs:
            fields["top_logprobs"] = tuple(map(tuple, self.top_logprobs[rows]))
        if sequence.request.continuation:
            fields["greedy"] = tuple(self.greedy[rows])
        return fields


@dataclass
class Group:
    """The rows of a step that are fused alike, [R] of them."""

    fusion: FusionParams
    sequences: dict[Stream, int]
    """How many of the rows are whose, in this order."""
    logits: dict[str, torch.Tensor] = field(default_factory=dict)
    """[R, V] of each model, as they arrive."""
    aims: Aims | None = None

    @property
    def models(self) -> tuple[str, ...]:
        return self.fusion.models

    def take(self, model: str, logits: torch.Tensor) -> None:
        """One model's rows; the last small model's settle what the large one is to aim at."""
        self.logits[model] = logits
        small = self.models[1:]
        if model in small and all(name in self.logits for name in small):
            self.aims = aim(
                self.logits[BASE],
                [self.logits[name] for name in self.fusion.experts],
                rule=self.fusion.rule,
                select=self.fusion.select,
                weights=self.fusion.weights or None,
            )

    def fuse(self) -> Fused:
        if self.aims is not None:
            rule, step, bounds = self.fusion.rule, self.fusion.step, self.fusion.bounds
            return weigh(self.logits[LARGE], self.aims, rule=rule, step=step, bounds=bounds)
        logits = self.logits[self.models[0]].float()  # one model alone: nothing to fuse
        none = logits.new_zeros(len(logits))
        return Fused(logits, none[:, None][:, :0], none, logits.new_zeros(len(logits), 2))


class Coordinator:
    """Serves requests over the models behind `fabric`."""

    def __init__(
        self,
        fabric: Fabric,
        *,
        limits: Limits,
        decode: Callable[[Sequence[int]], str],
        engine: EngineConfig,
        device: torch.device | str = "cpu",
        metrics: Sink | None = None,
    ) -> None:
        self.fabric = fabric
        self.limits = limits
        self.decode = decode
        self.device = torch.device(device)
        self.metrics = Metrics(metrics)
        self.scheduler = Scheduler(
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            enable_prefix_caching=engine.enable_prefix_caching,
            drop_experts=engine.on_expert_loss == "drop",
        )
        self.recoveries: list[Recovery] = []
        self._losses: dict[str, tuple[LossReason, float]] = {}
        """Why and when each model was lost that is not computing again yet."""
        self._strikes: Counter[str] = Counter()
        """How often each model was lost since its logits were last used."""
        self._gone: dict[str, str] = {}
        """Experts that will not come back, and why."""
        self.sequences: dict[tuple[str, int], Stream] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.steps = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would advance anything: not while all that is asked waits for models."""
        return any(not self.scheduler.held(sequence) for sequence in self.sequences.values())

    @property
    def timings(self) -> Timings:
        return Timings(self.steps, dict(self.seconds), tuple(self.recoveries))

    def add(self, request: Request, client: str = "") -> None:
        """Queues a request. Raises `ValueError` where it cannot be served."""
        self.limits.check(request)
        if error := self._gone.get(request.fusion.alone or ""):
            raise ValueError(error)
        if (client, request.id) in self.sequences:
            raise ValueError(f"a request of id {request.id} is under way already")
        sampling = request.sampling
        sequence = Stream(
            request,
            room=self.limits.room(request),
            client=client,
            seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
            text=TextStream(self.decode, request.prompt_of(request.models[0]), sampling.stop),
        )
        self.sequences[client, request.id] = sequence
        self.scheduler.add(sequence)
        self._gauge()

    def abort(self, id: int, client: str = "") -> None:
        """Forgets a request; one that has ended already is no error, the two may have crossed."""
        if sequence := self.sequences.get((client, id)):
            self._remove(sequence)
            self.metrics("request_success", 1, finished_reason="abort")
            self._gauge()

    def step(self) -> list[tuple[str, Chunk]]:
        """Advances every sequence that can go on; returns what is new, each with its client."""
        clock = Clock()
        news = [each for change in self.fabric.changes() for each in self._change(*change)]
        if not self.has_work:
            return self._measured(clock, news)
        with clock.stage("plan"):
            step = self.scheduler.plan()
            self.fabric.send(step.plans)
            groups = self._groups(step)
            self._started()
        failed, changes = self._collect(step, groups, clock)
        news += [(sequence, self._fail(sequence, error)) for sequence, error in failed.items()]
        for group in groups:
            if not set(group.models) <= set(group.logits):
                # A model of it raised, so its sequences have failed, or was lost.
                for sequence, count in group.sequences.items():
                    self.scheduler.retract(sequence, count)
                continue
            with clock.stage("weigh"):
                fused = group.fuse()
            with clock.stage("sample"):
                decided = self._decide(group, fused)
            with clock.stage("commit"):
                news += self._committed(group, fused, decided, failed)
        news += [each for change in changes for each in self._change(*change)]
        self.steps += 1
        return self._measured(clock, news)

    def _collect(
        self, step: Step, groups: list[Group], clock: Clock
    ) -> tuple[dict[Stream, str], list[tuple[str, Lost | Ready]]]:
        """Takes the models' logits as they arrive: what fails, and which models come or go."""
        failed: dict[Stream, str] = {}
        changes: list[tuple[str, Lost | Ready]] = []
        answers = self.fabric.receive(step.plans)
        while True:
            with clock.stage("wait"):
                answered = next(answers, None)
            if answered is None:
                return failed, changes
            model, answer = answered
            with clock.stage("aim"):
                if isinstance(answer, Lost | Ready):
                    changes.append((model, answer))
                elif isinstance(answer, Failed) and answer.out_of_memory:
                    lost = Lost("out of memory", answer.error)
                    changes += [(model, lost), (model, Ready())]
                else:
                    self._take(step, groups, model, answer, failed, clock)

    def _committed(
        self, group: Group, fused: Fused, decided: Decided, failed: Collection[Stream]
    ) -> list[tuple[Stream, Chunk]]:
        """What a step adds to each sequence of a group but those that have failed."""
        weights, kl = fused.weights.tolist(), fused.kl.tolist()
        news = []
        end = 0
        for sequence, count in group.sequences.items():
            rows, end = slice(end, end + count), end + count
            if sequence not in failed:
                chunk = Chunk(
                    id=sequence.request.id,
                    given=len(sequence.rest(count)),
                    weights=tuple(sequence.named(row) for row in weights[rows]),
                    lost=sequence.lost,
                    kl=tuple((f, g) for f, g in kl[rows]),
                    **decided.part(rows, sequence),
                )
                news.append((sequence, self._commit(sequence, chunk)))
        return news

    def _change(self, model: str, change: Lost | Ready) -> list[tuple[Stream, Chunk]]:
        """Takes in that a model was lost or is ready; returns the failures that this means."""
        if isinstance(change, Ready):
            self.scheduler.find(model)
            if not any(model in each.computed for each in self.sequences.values()):
                self._recovered(model)
            return []
        if model not in self._losses:
            log.warning("model %r is lost: %s", model, change.reason)
            self._losses[model] = change.reason, time.perf_counter()
        self._strikes[model] += 1
        memory = change.reason == "out of memory"
        self.scheduler.lose(model, away=True)
        if not memory and self._strikes[model] < STRIKES:
            return []
        # What runs may be too much for the model, or what kills it: less of it is tried. Memory has
        # been cleared, and the lowest slot needs least of it.
        suspects = [s for s in self.sequences.values() if s.slot >= 0 and model in s.models]
        again = memory and (self._strikes[model] < 2 or any(s.slot for s in suspects))
        if suspects and (again or len(self.scheduler.running) > 1):
            self.scheduler.preempt()
            return []
        why = f"{change.reason}: {change.error}" if change.error else change.reason
        error = f"model {model!r} was lost while it computed this request and no other: {why}"
        return [(sequence, self._fail(sequence, error)) for sequence in suspects]

    def _recovered(self, model: str) -> None:
        if loss := self._losses.pop(model, None):
            reason, began = loss
            recovery = Recovery(model, reason, time.perf_counter() - began)
            self.recoveries.append(recovery)
            self.metrics("recoveries", 1, model=model, reason=reason)
            self.metrics("recovery_time_seconds", recovery.seconds)
            log.info("model %r recovered in %.1f s (%s)", model, recovery.seconds, reason)

    def add_model(self, name: str, length: int) -> None:
        """One more expert, away until the fabric says that it is ready."""
        self.limits = self.limits.having({**self.limits.lengths, name: length})
        self._gone.pop(name, None)
        self.scheduler.lose(name, away=True)

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
        self._losses.pop(name, None)
        return True

    def give_up(self, name: str, error: str) -> list[tuple[str, Chunk]]:
        """An expert will not come back: what cannot do without it fails."""
        self._gone[name] = error
        alone = [s for s in self.sequences.values() if s.request.fusion.alone == name]
        return self._measured(
            Clock(), [(sequence, self._fail(sequence, error)) for sequence in alone]
        )

    def _groups(self, step: Step) -> list[Group]:
        groups: dict[FusionParams, Group] = {}
        for sequence, count in step.ready.items():
            assert isinstance(sequence, Stream)
            fusion = sequence.fusion
            groups.setdefault(fusion, Group(fusion, {})).sequences[sequence] = count
        return list(groups.values())

    def _take(
        self,
        step: Step,
        groups: list[Group],
        model: str,
        answer: Logits | Failed,
        failed: dict[Stream, str],
        clock: Clock,
    ) -> None:
        """Hands one model's rows to their groups, and notes the sequences that it fails."""
        if isinstance(answer, Failed):
            slots = set(step.plans[model].slots.tolist())
            for sequence in self.sequences.values():
                if sequence.slot in slots and model in sequence.computed:
                    failed.setdefault(sequence, f"model {model!r} failed: {answer.error}")
            return
        clock.forward(model, answer.began, answer.seconds)
        if len(answer.values):
            self._strikes[model] = 0
            self._recovered(model)
        values = answer.values[:, : self.limits.vocab].to(self.device)
        if not answer.finite.all():
            # Rows are independent, but nothing may trip over a row that is lost already.
            finite = torch.from_numpy(answer.finite.copy()).to(self.device)
            values = torch.where(finite[:, None], values, torch.zeros_like(values))
        for group in groups:
            if model in group.models:
                rows = step.rows(model, group.sequences)
                owners = (s for s, count in group.sequences.items() for _ in range(count))
                for row, sequence in zip(rows, owners, strict=True):
                    if not answer.finite[row]:
                        error = f"model {model!r} returned NaN or infinite logits"
                        failed.setdefault(sequence, error)
                group.take(model, values if rows == list(range(len(values))) else values[rows])

    def _decide(self, group: Group, fused: Fused) -> Decided:
        """The token of each row, drawn or given, and what was asked to be known of it."""
        sequences = [s for s, count in group.sequences.items() for _ in range(count)]
        given: list[int] = []  # -1 where a token is to be drawn
        for sequence, count in group.sequences.items():
            rest = sequence.rest(count)
            given += [*rest, *[-1] * (count - len(rest))]
        drawn = [row for row, token in enumerate(given) if token < 0]
        tokens = list(given)
        if drawn:
            chosen = [sequences[row] for row in drawn]
            params = [sequence.request.sampling for sequence in chosen]
            logits = penalised(
                fused.logits if len(drawn) == len(given) else fused.logits[drawn],
                params,
                [s.request.prompt_of(s.models[0]) + s.request.continuation for s in chosen],
                [s.generated for s in chosen],
                self.limits.eos_token_ids,
            )
            draws = [
                uniform(s.seed, len(s.generated)) if s.request.sampling.temperature > 0 else 0.0
                for s in chosen
            ]
            for row, token in zip(drawn, sample(logits, params, draws), strict=True):
                tokens[row] = token
        asked = [s.asked(token >= 0) for s, token in zip(sequences, given, strict=True)]
        if all(count is None for count in asked):
            return Decided(tokens)
        logprobs = fused.logits.log_softmax(-1)
        at = torch.tensor(tokens, device=logprobs.device)[:, None]
        return Decided(
            tokens,
            logprobs.gather(-1, at)[:, 0].tolist(),
            top_logprobs(logprobs, [count or 0 for count in asked]),
            [
                best == token
                for best, token in zip(logprobs.argmax(-1).tolist(), tokens, strict=True)
            ],
        )

    def _commit(self, sequence: Stream, chunk: Chunk) -> Chunk:
        """Takes over what a step decided, with what it adds to the text and whether that ends."""
        sequence.scored += chunk.given
        if len(chunk.token_ids) == chunk.given:
            if sequence.scored < len(sequence.request.continuation) or sequence.generates:
                return chunk
            self._remove(sequence)
            return replace(chunk, finish_reason="length")
        sampling, token = sequence.request.sampling, chunk.token_ids[-1]
        sequence.generated.append(token)
        may_stop = len(sequence.generated) >= sampling.min_tokens
        eos = token in self.limits.eos_token_ids and not sampling.ignore_eos
        stop: str | int | None = token if token in sampling.stop_token_ids else None
        text, ends = "", may_stop and (eos or stop is not None)
        if not ends:
            text, stop = sequence.text.push(token, may_stop=may_stop)
            ends = stop is not None
        reason: FinishReason | None = "stop" if ends else None
        if reason is None and len(sequence.generated) >= sequence.room:
            reason = "length"
        if reason is not None:
            text += sequence.text.end()
            self._remove(sequence)
        return replace(chunk, text=text, finish_reason=reason, stop_reason=stop)

    def _fail(self, sequence: Stream, error: str) -> Chunk:
        self._remove(sequence, failed=True)
        return Chunk(id=sequence.request.id, finish_reason="error", error=error)

    def _remove(self, sequence: Stream, *, failed: bool = False) -> None:
        del self.sequences[sequence.client, sequence.request.id]
        self.scheduler.remove(sequence, failed=failed)

    def _started(self) -> None:
        """Notes the sequences that have just been given a slot."""
        for sequence in self.sequences.values():
            if sequence.slot >= 0 and not sequence.started:
                sequence.started = True
                waited = time.time() - sequence.arrived
                sequence.spans.append(("coordinator", "queue", sequence.arrived, waited))
                request = sequence.request
                tokens = len(request.prompt_of(request.models[0])) + len(request.continuation)
                self.metrics("request_queue_time_seconds", waited)
                self.metrics("prompt_tokens", tokens)

    def _measured(self, clock: Clock, news: list[tuple[Stream, Chunk]]) -> list[tuple[str, Chunk]]:
        """The news for their clients, once they are counted; traced requests end with a trace."""
        for stage, seconds in clock.stages.items():
            self.seconds[stage] += seconds
            self.metrics("step_time_seconds", seconds, stage=stage)
        for model, seconds in clock.forwards.items():
            self.seconds[f"forward {model}"] += seconds
            self.metrics("forward_time_seconds", seconds, model=model)
        for sequence in {*self.sequences.values(), *(sequence for sequence, _ in news)}:
            if sequence.request.trace and sequence.started:
                sequence.spans += clock.spans
        now = time.time()
        for sequence, chunk in news:
            if len(chunk.token_ids) > chunk.given:
                first = sequence.emitted is None
                name = "time_to_first_token_seconds" if first else "inter_token_latency_seconds"
                self.metrics(name, now - (sequence.emitted or sequence.arrived))
                self.metrics("generation_tokens", 1)
                sequence.emitted = now
                for expert, weight in zip(
                    sequence.request.fusion.experts, chunk.weights[-1], strict=True
                ):
                    self.metrics("expert_weight", weight, expert=expert)
                if chunk.weights[-1]:
                    for direction, nats in zip(DIRECTIONS, chunk.kl[-1], strict=True):
                        self.metrics("kl_divergence", nats, direction=direction)
            if chunk.finish_reason:
                self.metrics("request_success", 1, finished_reason=chunk.finish_reason)
                self.metrics("e2e_request_latency_seconds", now - sequence.arrived)
        self._gauge()
        return [
            (
                s.client,
                replace(chunk, spans=tuple(s.spans))
                if s.request.trace and chunk.finish_reason
                else chunk,
            )
            for s, chunk in news
        ]

    def _gauge(self) -> None:
        running = self.scheduler.running
        longest = next(iter(self.limits.lengths.values()))
        held = sum(max(sequence.computed.values()) for sequence in running)
        self.metrics("num_requests_running", len(running))
        self.metrics("num_requests_waiting", len(self.scheduler.waiting))
        self.metrics("kv_cache_usage_perc", held / (longest * self.scheduler.max_rows))
