"""Which tokens every model computes next. No torch, no Ray: sequences, slots and budgets.

There are no prefill and decode phases: in each model a sequence has a number of computed positions
that must catch up with its tokens. A prompt is many tokens behind, a decoding sequence one.

Sequences that begin alike (few-shot examples, the choices of one question) share what is computed:
a new one starts from a copy of the longest prefix that any slot holds (see `slots`). One that is
still being computed is waited for, where that takes fewer tokens and no more steps.

A model that lost its cache is one that is far behind: it catches up as with a prompt. While it is
away, its sequences leave their slots to others, or go on without it where it is an expert that may
be dropped.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np

from dlf_ray.decoding.slots import BLOCK, NO_PREFIX, Cached, Ints, Prefix, Slots, Tokens
from dlf_ray.messages import Pool, Request
from dlf_ray.plans import Plan

WORTH_WAITING = 64
"""Tokens that cost about as much as a step: a shorter prefix is computed again, not waited for."""
LOOK_AHEAD = 4
"""So many times as many waiting sequences as there are slots are looked at in a step."""


class Source(NamedTuple):
    """What a sequence is to start from a copy of, until that is planned."""

    slot: int
    cached: Cached


@dataclass(eq=False)
class Sequence:
    """One request under way."""

    request: Request
    max_new_tokens: int
    """The most tokens it may generate."""
    generated: list[int] = field(default_factory=list)
    slot: int = -1
    """Its place in every model's cache, the same in all; -1 while it waits."""
    computed: dict[str, int] = field(default_factory=dict)
    """For each of its models, the positions that the model's cache holds."""
    tokens: dict[str, Tokens] = field(default_factory=dict)
    """As each of its models sees them; those of equal prompts are one object."""
    sources: dict[str, Source] = field(default_factory=dict)
    """For each model that is to start from a copy: of what."""
    scored: int = 0
    """Tokens of the continuation that have their log-probability."""
    number: int = 0
    """In the order of arrival."""
    waited: tuple[Source, int] | None = None
    """Whose prefix it waits for, and how far that was computed when it was last looked at."""

    def __post_init__(self) -> None:
        request = self.request
        self.computed = dict.fromkeys(request.models, 0)
        # Equal prompts once, however many models the message repeated them for.
        known: dict[tuple[int, ...], tuple[int, ...]] = {request.prompt: request.prompt}
        own = {name: known.setdefault(each, each) for name, each in request.prompts.items()}
        self.request = msgspec.structs.replace(request, prompts=own)
        texts: dict[int, Tokens] = {}
        for model in request.models:
            prompt = self.request.prompt_of(model)
            if id(prompt) not in texts:
                texts[id(prompt)] = Tokens(prompt + request.continuation, self.generated)
            self.tokens[model] = texts[id(prompt)]

    @property
    def generates(self) -> bool:
        return self.request.sampling.max_tokens > 0

    @property
    def joint(self) -> int:
        """The last tokens that all models compute in the same steps, since their logits meet there:
        the newest one while generating, those before the rest of a continuation while scoring."""
        return len(self.request.continuation) - self.scored + self.generates

    def uncomputed(self, model: str) -> int:
        """Tokens that the model has not computed yet; the last one need not be if none follows."""
        return len(self.tokens[model]) - (not self.generates) - self.computed[model]

    @property
    def needs(self) -> dict[str, int]:
        """The positions that it may come to in each model."""
        return {
            model: len(each.prompt) + self.max_new_tokens for model, each in self.tokens.items()
        }


@dataclass(frozen=True)
class Step:
    """One step of all models."""

    plans: dict[str, Plan]
    """For each model that has something to compute."""
    ready: dict[Sequence, int]
    """The sequences whose logits meet in this step, and how many positions of each."""
    admitted: list[Sequence]
    """Those that have been given a slot."""

    def rows(self, model: str, sequences: Iterable[Sequence]) -> list[int]:
        """Where the logits of `sequences` are among the rows of `model`."""
        at, begin = {}, 0
        for sequence, count in self.ready.items():
            if model in sequence.computed:
                at[sequence] = range(begin, begin + count)
                begin += count
        return [row for sequence in sequences for row in at[sequence]]


class Scheduler:
    """First come, first served: a slot for each running sequence, a token budget for each step."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_rows: int | None = None,
        enable_prefix_caching: bool = True,
        drop_experts: bool = False,
        positions: Mapping[str, int] | None = None,
        pools: Mapping[str, Pool] | None = None,
    ) -> None:
        """`positions`, `pools`: see `Slots`."""
        self.enable_prefix_caching = enable_prefix_caching
        self.drop_experts = drop_experts
        """Whether sequences go on without an expert that is away."""
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_rows = max_rows or max_num_seqs
        """Rows of logits in a step, at least one for each running sequence."""
        self.slots = Slots(max_num_seqs, positions, pools)
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()
        self.stalled: dict[Sequence, None] = {}
        """Those that wait for a model which is away."""
        self.running: list[Sequence] = []
        self.away: set[str] = set()
        """Models that cannot compute now."""
        self.limit = max_num_seqs
        """Sequences that may run; less than there are slots after something went wrong."""
        self._ended = 0
        """Sequences since that was set."""
        self._numbers = itertools.count()
        self._steps = 0

    @property
    def has_work(self) -> bool:
        """Whether anything can be planned: not while all that is asked waits for models."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        sequence.number = next(self._numbers)
        if self.enable_prefix_caching:  # hashed here, where no step waits for it
            for tokens in sequence.tokens.values():
                tokens.hashes()
        for model in self.away:
            self._reset(sequence, model)
        (self.waiting if self.away.isdisjoint(sequence.computed) else self.stalled)[sequence] = None

    def remove(self, sequence: Sequence, *, failed: bool = False) -> None:
        """Forgets a sequence that has ended or is not wanted; after a failure, its slot's content
        too."""
        if sequence.slot < 0:
            (self.waiting if sequence in self.waiting else self.stalled).pop(sequence)
            return
        slot = sequence.slot
        self._leave(sequence)
        if failed:
            self.slots.forget(slot)
        self._ended += 1
        if self._ended >= self.limit < self.slots.count:
            self.restrict(self.limit + 1)

    def retract(self, sequence: Sequence, count: int) -> None:
        """Takes back the last positions that a step computed of a sequence, as it will not have
        their logits; all of its models are to meet there again."""
        for model in sequence.computed:
            sequence.computed[model] -= count

    def lose(self, model: str) -> None:
        """A model has nothing in its cache any more, and until `recover` cannot compute.

        The sequences that need it give up their slots; what their other models have computed there
        is remembered as long as nobody else needs the slots.
        """
        self.away.add(model)
        self.slots.lose(model)
        for sequence in [*self.running, *self.waiting, *self.stalled]:
            if model in sequence.computed:
                self._reset(sequence, model)
                if model in sequence.computed and sequence not in self.stalled:
                    if sequence.slot >= 0:
                        self._leave(sequence)
                    else:
                        del self.waiting[sequence]
                    self.stalled[sequence] = None

    def recover(self, model: str) -> None:
        """A model can compute again: it catches up with all sequences that it is part of."""
        self.away.discard(model)
        for sequence in [*self.running, *self.waiting, *self.stalled]:
            if model in sequence.request.models:
                sequence.computed.setdefault(model, 0)
        self._queue([s for s in self.stalled if self.away.isdisjoint(s.computed)])

    def remove_model(self, model: str) -> None:
        """Forgets a model that no sequence under way uses; another may have its name later."""
        self.away.discard(model)
        self.slots.lose(model)
        self.slots.positions.pop(model, None)
        self.slots.pools.pop(model, None)

    def preempt(self) -> None:
        """Sends all that runs back to the queue, to be computed anew as the limit allows."""
        stopped = list(self.running)
        for sequence in stopped:
            self._leave(sequence)
        self._queue(stopped)

    def restrict(self, limit: int) -> None:
        """Lets no more sequences run than `limit`, in the lowest slots: as much memory is enough.
        Once as many have ended as may run, one more may."""
        self.limit = self.slots.limit = limit
        self._ended = 0

    def _queue(self, sequences: list[Sequence]) -> None:
        """Puts sequences where they belong by their arrival."""
        if sequences:
            for sequence in sequences:
                self.stalled.pop(sequence, None)
            in_order = sorted([*self.waiting, *sequences], key=lambda sequence: sequence.number)
            self.waiting = OrderedDict.fromkeys(in_order)

    def _leave(self, sequence: Sequence) -> None:
        """Frees a sequence's slot; should it go on, it starts from whatever is remembered then."""
        for model in sequence.sources:  # what it was to copy is not there
            sequence.computed[model] = 0
        sequence.sources.clear()
        self.running.remove(sequence)
        self.slots.release(sequence.slot)
        sequence.slot = -1
        sequence.computed = dict.fromkeys(sequence.computed, 0)
        sequence.waited = None

    def _reset(self, sequence: Sequence, model: str) -> None:
        sequence.sources.pop(model, None)
        if self.drop_experts and model in self.away and model in sequence.request.fusion.experts:
            sequence.computed.pop(model, None)
        elif model in sequence.computed:
            sequence.computed[model] = 0

    def plan(self) -> Step:
        """The next step, which counts as computed from here on.

        When its turn comes, a sequence takes what it can use of the budget that is left, but for a
        half if shorter prompts ask for that. The joint tokens of a sequence are computed by all its
        models in the same steps; until the budget of every one of them allows some of it, they only
        catch up to the token before.
        """
        self._forget_lost_sources()
        admitted = self._admit()
        left: dict[str, int] = {}
        rows = self.max_rows
        chunks: dict[str, list[tuple[Sequence, int, int]]] = {}
        ready: dict[Sequence, int] = {}
        for sequence, shorter in self._turns():
            joint = sequence.joint
            budget = {}
            for model in sequence.computed:
                tokens = left.setdefault(model, self.max_num_batched_tokens)
                if shorter:
                    asked = sum(
                        each.uncomputed(model) for each in shorter if model in each.computed
                    )
                    tokens = max((tokens + 1) // 2, tokens - asked)
                budget[model] = tokens
            catch_up = {m: max(0, sequence.uncomputed(m) - joint) for m in sequence.computed}
            now = min(joint, rows, *(budget[m] - catch_up[m] for m in budget))
            for model in budget:
                size = catch_up[model] + now if now > 0 else min(catch_up[model], budget[model])
                if size:
                    chunks.setdefault(model, []).append((sequence, size, max(0, now)))
                    left[model] -= size
            if now > 0:
                ready[sequence] = now
                rows -= now
        self._steps += 1
        # In the order of slots, so that a model finds the rows of a full batch in storage order.
        ready = dict(sorted(ready.items(), key=lambda item: item[0].slot))
        plans = {model: self._to_plan(model, part) for model, part in chunks.items()}
        return Step(plans, ready, admitted)

    def _turns(self) -> list[tuple[Sequence, list[Sequence]]]:
        """The running sequences in the order of the plan, each with the prompts that it has to
        leave room for.

        Decoding sequences come first, so that a long prompt delays no running answer; then the
        oldest prompt, so that it gets on whatever follows; then the shortest ones.
        """
        behind = {s: max(map(s.uncomputed, s.computed)) for s in self.running}
        prompts = [sequence for sequence, tokens in behind.items() if tokens > 1]
        oldest = prompts[0] if prompts else None
        shorter = [each for each in prompts if behind[each] < behind[prompts[0]]]
        order = sorted(behind, key=lambda s: (behind[s] > 1, s is not oldest, behind[s]))
        return [(sequence, shorter if sequence is oldest else []) for sequence in order]

    def _forget_lost_sources(self) -> None:
        """A copy that found no room in its step's budget is off once its source is overwritten."""
        for sequence in self.running:
            for model, source in list(sequence.sources.items()):
                there = self.slots.cached.get(source.slot) is source.cached
                if not there or source.cached.computed.get(model, 0) < sequence.computed[model]:
                    del sequence.sources[model]
                    sequence.computed[model] = 0

    def _admit(self) -> list[Sequence]:
        """Gives slots to waiting sequences, but to those not yet whose prefix is under way."""
        admitted: list[Sequence] = []
        later: list[Sequence] = []
        sources = {each.slot for s in self.running for each in s.sources.values()}
        looks = LOOK_AHEAD * self.slots.count
        while self.waiting and looks and self.slots.free and len(self.running) < self.limit:
            looks -= 1
            sequence, _ = self.waiting.popitem(last=False)
            if self.enable_prefix_caching and self._waits(sequence):
                later.append(sequence)
                continue
            starts = self._starts(sequence)
            slot = self.slots.choose(sequence.needs, starts, sources)
            if slot is None:  # nobody overtakes who waits for memory: it might wait for ever
                later.append(sequence)
                break
            self._start(sequence, slot, starts)
            sources |= {each.slot for each in sequence.sources.values()}
            admitted.append(sequence)
        for sequence in reversed(later):
            self.waiting[sequence] = None
            self.waiting.move_to_end(sequence, last=False)
        return admitted

    def _most(self, sequence: Sequence, model: str) -> int:
        """The tokens of a prefix that it can use: its joint tokens have to be computed."""
        return max(0, sequence.uncomputed(model) - sequence.joint)

    def _starts(self, sequence: Sequence) -> dict[str, Prefix]:
        if not self.enable_prefix_caching:
            return dict.fromkeys(sequence.computed, NO_PREFIX)
        found: dict[tuple[str, int], Prefix] = {}
        for model in sequence.computed:
            tokens = sequence.tokens[model]
            most = self._most(sequence, model)
            found[model, id(tokens)] = self.slots.longest_prefix(model, tokens, most)
        return {model: start for (model, _), start in found.items()}

    def _start(self, sequence: Sequence, slot: int, starts: Mapping[str, Prefix]) -> None:
        """Gives a slot to a sequence, which starts from copies of what others hold."""
        for model, start in starts.items():
            if start.size:
                self.slots.use(start.slot)
                if start.slot != slot:
                    sequence.sources[model] = Source(start.slot, self.slots.cached[start.slot])
                sequence.computed[model] = start.size
        sequence.slot = slot
        own = [model for model, each in starts.items() if each.size and each.slot == slot]
        cached = Cached(sequence.tokens, sequence.computed)
        self.slots.allocate(slot, sequence.needs, cached, own)
        self.running.append(sequence)

    def _waits(self, sequence: Sequence) -> bool:
        """Whether much more of its prefix than there is now is about to be computed for another.

        It goes on waiting as long as that gets on, and for nobody else then: those that begin more
        and more alike would start one after the other.
        """
        if sequence.waited is not None:
            source, before = sequence.waited
            now = sum(source.cached.computed.values())
            sequence.waited = source, now
            gets_on = now > before and self.slots.runs(source.slot, source.cached)
            return gets_on and self._gains(sequence, source.cached)
        for model, tokens in sequence.tokens.items():
            if model not in sequence.computed:
                continue
            most = self._most(sequence, model)
            if most < WORTH_WAITING:
                continue
            coming = self.slots.coming_prefix(model, tokens, most)
            if coming.size < WORTH_WAITING:
                continue
            if coming.size >= self.slots.longest_prefix(model, tokens, most).size + BLOCK:
                source = Source(coming.slot, self.slots.cached[coming.slot])
                sequence.waited = source, sum(source.cached.computed.values())
                return True
        return False

    def _gains(self, sequence: Sequence, cached: Cached) -> bool:
        """Whether more of a sequence's prefix is still to come in a slot."""
        for model, tokens in sequence.tokens.items():
            if model in cached.computed and model in sequence.computed:
                most = self._most(sequence, model)
                if tokens.common(cached.tokens[model], most) > cached.computed[model]:
                    return True
        return False

    def _to_plan(self, model: str, chunks: list[tuple[Sequence, int, int]]) -> Plan:
        chunks.sort(key=lambda chunk: chunk[0].slot)
        tokens: list[Ints] = []
        starts, sources = [], []
        for sequence, size, _ in chunks:
            source = sequence.sources.pop(model, None)
            sources.append(source.slot if source else -1)
            start = sequence.computed[model]
            starts.append(start)
            tokens.append(sequence.tokens[model].array(start, start + size))
            sequence.computed[model] = start + size
            self.slots.hold(sequence.slot, model, start + size)
            if start // BLOCK < (start + size) // BLOCK or source:
                self.slots.note(sequence.slot, model)
        keep, keep_length = self.slots.shapes[model]
        return Plan(
            step=self._steps,
            slots=_ints([sequence.slot for sequence, _, _ in chunks]),
            starts=_ints(starts),
            lengths=_ints([size for _, size, _ in chunks]),
            wants=_ints([want for _, _, want in chunks]),
            tokens=np.concatenate(tokens),
            sources=_ints(sources if max(sources) >= 0 else []),
            keep=keep,
            keep_length=keep_length,
            drops=_ints(self.slots.dropped(model)),
        )


def _ints(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.asarray(values, dtype=np.int32)
