"""The continuous-batching loop over all models: plan, run, weigh, fuse, sample, commit.

A plain class: over Ray it runs inside an actor and its fabric is sockets and shared memory, in a
notebook or a test its fabric is a few function calls in the same process.
"""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import torch

from dlf_ray import scheduler
from dlf_ray.config import BASE, LARGE, EngineConfig
from dlf_ray.fusion import Aims, Fused, aim, weigh
from dlf_ray.messages import (
    Chunk,
    FinishReason,
    FusionParams,
    Limits,
    Logits,
    Plan,
    Request,
    SamplingParams,
    Timings,
)
from dlf_ray.sampling import sample, uniform
from dlf_ray.scheduler import Scheduler, Step
from dlf_ray.text import TextStream


class Fabric(Protocol):
    """How plans reach the models and logits come back."""

    def send(self, plans: Mapping[str, Plan]) -> None:
        """Gives every model its plan and returns at once."""

    def receive(self, plans: Mapping[str, Plan]) -> Iterator[tuple[str, Logits | str]]:
        """Each model's logits in the order of their arrival, or the message of its error.

        A tensor is valid until the next `send`.
        """


@dataclass(eq=False)
class Stream(scheduler.Sequence):
    """A sequence, with its client and its text so far."""

    client: str = ""
    seed: int = 0
    text: TextStream = field(kw_only=True)


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
        return next(iter(self.sequences)).request.models

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
    ) -> None:
        self.fabric = fabric
        self.limits = limits
        self.decode = decode
        self.device = torch.device(device)
        self.scheduler = Scheduler(
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            enable_prefix_caching=engine.enable_prefix_caching,
        )
        self.sequences: dict[tuple[str, int], Stream] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self.sequences)

    @property
    def timings(self) -> Timings:
        return Timings(self.steps, dict(self.seconds))

    def add(self, request: Request, client: str = "") -> None:
        """Queues a request. Raises `ValueError` where it cannot be served."""
        self.limits.check(request)
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

    def abort(self, id: int, client: str = "") -> None:
        """Forgets a request; one that has ended already is no error, the two may have crossed."""
        if sequence := self.sequences.get((client, id)):
            self._remove(sequence)

    def step(self) -> list[tuple[str, Chunk]]:
        """Advances every running sequence; returns what is new, each with its client."""
        with self._timed("plan"):
            step = self.scheduler.plan()
            self.fabric.send(step.plans)
            groups = self._groups(step)
        failed: dict[Stream, str] = {}
        began = time.perf_counter()
        for model, answer in self.fabric.receive(step.plans):
            self.seconds["wait"] += time.perf_counter() - began
            with self._timed("aim"):
                self._take(step, groups, model, answer, failed)
            began = time.perf_counter()
        chunks = [self._fail(sequence, error) for sequence, error in failed.items()]
        for group in groups:
            if not set(group.models) <= set(group.logits):
                continue  # a model of it raised, so all of its sequences have failed
            with self._timed("weigh"):
                fused = group.fuse()
            with self._timed("sample"):
                tokens, logprobs, greedy = self._decide(group, fused)
            with self._timed("commit"):
                weights, kl = fused.weights.tolist(), fused.kl.tolist()
                end = 0
                for sequence, count in group.sequences.items():
                    rows, end = slice(end, end + count), end + count
                    if sequence not in failed:
                        chunk = Chunk(
                            id=sequence.request.id,
                            token_ids=tuple(tokens[rows]),
                            # Six digits are what float32 holds.
                            weights=tuple(tuple(round(w, 6) for w in row) for row in weights[rows]),
                            kl=tuple((f, g) for f, g in kl[rows]),
                            logprobs=tuple(logprobs[rows]) if sequence.request.continuation else (),
                            greedy=tuple(greedy[rows]) if sequence.request.continuation else (),
                        )
                        chunks.append((sequence.client, self._commit(sequence, chunk)))
        self.steps += 1
        return chunks

    def _groups(self, step: Step) -> list[Group]:
        groups: dict[FusionParams, Group] = {}
        for sequence, count in step.ready.items():
            assert isinstance(sequence, Stream)
            fusion = sequence.request.fusion
            groups.setdefault(fusion, Group(fusion, {})).sequences[sequence] = count
        return list(groups.values())

    def _take(
        self,
        step: Step,
        groups: list[Group],
        model: str,
        answer: Logits | str,
        failed: dict[Stream, str],
    ) -> None:
        """Hands one model's rows to their groups, and notes the sequences that it fails."""
        if isinstance(answer, str):
            slots = set(step.plans[model].slots.tolist())
            for sequence in self.sequences.values():
                if sequence.slot in slots and model in sequence.computed:
                    failed.setdefault(sequence, f"model {model!r} failed: {answer}")
            return
        self.seconds[f"forward {model}"] += answer.seconds
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

    def _decide(self, group: Group, fused: Fused) -> tuple[list[int], list[float], list[bool]]:
        """The token of each row, drawn or given; where any are given, their log-probabilities and
        whether they are the most probable ones."""
        params: list[SamplingParams] = []
        draws: list[float] = []
        given: list[int] = []  # -1 where a token is to be drawn
        for sequence, count in group.sequences.items():
            at = sequence.scored
            given += sequence.request.continuation[at : at + count] or [-1]
            params += [sequence.request.sampling] * count
            hot = sequence.request.sampling.temperature > 0
            draws += [uniform(sequence.seed, len(sequence.generated)) if hot else 0.0] * count
        if max(given) < 0:
            return sample(fused.logits, params, draws), [], []
        tokens = torch.tensor(given, device=fused.logits.device)[:, None]
        logprobs = fused.logits.log_softmax(-1).gather(-1, tokens.clamp(min=0))[:, 0]
        best = fused.logits.argmax(-1).tolist()
        drawn = sample(fused.logits, params, draws)
        chosen = [d if g < 0 else g for d, g in zip(drawn, given, strict=True)]
        return chosen, logprobs.tolist(), [b == g for b, g in zip(best, given, strict=True)]

    def _commit(self, sequence: Stream, chunk: Chunk) -> Chunk:
        """Takes over what a step decided, with what it adds to the text and whether that ends."""
        if continuation := sequence.request.continuation:
            sequence.scored += len(chunk.token_ids)
            if sequence.scored < len(continuation):
                return chunk
            self._remove(sequence)
            return msgspec.structs.replace(chunk, finish_reason="length")
        sampling, (token,) = sequence.request.sampling, chunk.token_ids
        sequence.generated.append(token)
        eos = token in self.limits.eos_token_ids and not sampling.ignore_eos
        text, ends = "", eos or token in sampling.stop_token_ids
        if not ends:
            text, ends = sequence.text.push(token)
        reason: FinishReason | None = "stop" if ends else None
        if reason is None and len(sequence.generated) >= sequence.room:
            reason = "length"
        if reason is not None:
            text += sequence.text.end()
            self._remove(sequence)
        return msgspec.structs.replace(chunk, text=text, finish_reason=reason)

    def _fail(self, sequence: Stream, error: str) -> tuple[str, Chunk]:
        self._remove(sequence, failed=True)
        chunk = Chunk(id=sequence.request.id, finish_reason="error", error=error)
        return sequence.client, chunk

    def _remove(self, sequence: Stream, *, failed: bool = False) -> None:
        del self.sequences[sequence.client, sequence.request.id]
        self.scheduler.remove(sequence, failed=failed)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - began
