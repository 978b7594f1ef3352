"""Which tokens every model computes next. No torch, no Ray: sequences, slots and budgets.

There are no prefill and decode phases: in each model a sequence has a number of computed positions
that must catch up with its tokens. A prompt is many tokens behind, a decoding sequence one.

Sequences that begin alike (few-shot examples, the choices of one question) share what is computed:
a slot remembers its tokens after its sequence has ended, and a new sequence starts from a copy of
the longest beginning that any slot holds. While that is still being computed, it waits.

A model that lost its cache is one that is far behind: it catches up as with a prompt. While it is
away, its sequences are held, or go on without it where it is an expert that may be dropped.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from dlf_ray.messages import Plan, Request

WORTH_SHARING = 16
"""Tokens that are worth a copy."""


@dataclass(eq=False)
class Sequence:
    """One request under way."""

    request: Request
    room: int
    """The most tokens it may generate."""
    generated: list[int] = field(default_factory=list)
    slot: int = -1
    """Its place in every model's cache, the same in all; -1 while it waits."""
    computed: dict[str, int] = field(default_factory=dict)
    """For each of its models, the positions that the model's cache holds."""

    def __post_init__(self) -> None:
        self.computed = dict.fromkeys(self.request.models, 0)

    sources: dict[str, Sequence] = field(default_factory=dict)
    """For each model that is to start from a copy: whose, until that is planned."""
    scored: int = 0
    """Tokens of the continuation that have their log-probability."""

    @property
    def generates(self) -> bool:
        return self.request.sampling.max_tokens > 0

    @property
    def tail(self) -> int:
        """The last tokens that all models compute in the same steps, since their logits meet there:
        the newest one while generating, those before the rest of a continuation while scoring."""
        return len(self.request.continuation) - self.scored + self.generates

    def tokens(self, model: str, start: int, stop: int) -> list[int]:
        prompt = self.request.prompt_of(model)
        given = self.request.continuation
        after = [*given, *self.generated] if given else self.generated
        if start >= len(prompt):
            return after[start - len(prompt) : stop - len(prompt)]
        return [*prompt[start:stop], *after[: max(0, stop - len(prompt))]]

    def behind(self, model: str) -> int:
        """Tokens that the model has not computed yet; the last one need not be if none follows."""
        after = len(self.request.continuation) + len(self.generated) - (not self.generates)
        return len(self.request.prompt_of(model)) + after - self.computed[model]


@dataclass(frozen=True)
class Step:
    """One step of all models."""

    plans: dict[str, Plan]
    """For each model that has something to compute."""
    ready: dict[Sequence, int]
    """The sequences whose logits meet in this step, and how many positions of each."""

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
        enable_prefix_caching: bool = True,
        drop_experts: bool = False,
    ) -> None:
        self.enable_prefix_caching = enable_prefix_caching
        self.drop_experts = drop_experts
        """Whether sequences go on without an expert that is away."""
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_rows = max_num_seqs
        """Rows of logits in a step: one for each running sequence, so scoring has to share."""
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.away: set[str] = set()
        """Models that cannot compute now."""
        self._room = max_num_seqs
        """Sequences that may run; less than there are slots after memory ran out."""
        self._free = list(range(max_num_seqs))
        self._last: dict[int, Sequence] = {}
        """Whose tokens each slot holds, running or ended."""
        self._steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def held(self, sequence: Sequence) -> bool:
        """Whether one of its models is away."""
        return not self.away.isdisjoint(sequence.computed)

    def add(self, sequence: Sequence) -> None:
        for model in self.away:
            self._reset(sequence, model)
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence, *, failed: bool = False) -> None:
        """Forgets a sequence that has ended or is not wanted; after a failure, its slot's content
        too."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        heapq.heappush(self._free, sequence.slot)
        self._room += 1
        if failed:
            del self._last[sequence.slot]

    def retract(self, sequence: Sequence, count: int) -> None:
        """Takes back the last positions that a step computed of a sequence, as it will not have
        their logits; all of its models are to meet there again."""
        for model in sequence.computed:
            sequence.computed[model] -= count

    def lose(self, model: str, *, away: bool) -> None:
        """A model has nothing in its cache any more; `away` until `find` it cannot compute."""
        if away:
            self.away.add(model)
        for sequence in self._known():
            self._reset(sequence, model)

    def find(self, model: str) -> None:
        """A model can compute again: it catches up with all sequences that it is part of."""
        self.away.discard(model)
        for sequence in self._known():
            if model in sequence.request.models:
                sequence.computed.setdefault(model, 0)

    def remove_model(self, model: str) -> None:
        """Forgets a model that no sequence under way uses; another may have its name later."""
        self.away.discard(model)
        for sequence in self._last.values():
            sequence.computed.pop(model, None)

    def preempt(self) -> None:
        """Sends the youngest half of what runs back to the front of the queue, to be computed anew,
        and lets no more run than are left (one at least) until some of those have ended."""
        kept = len(self.running) // 2
        for sequence in reversed(self.running[kept:]):
            heapq.heappush(self._free, sequence.slot)
            del self._last[sequence.slot]
            sequence.slot = -1
            sequence.sources.clear()
            sequence.computed = dict.fromkeys(sequence.computed, 0)
            self.waiting.appendleft(sequence)
        del self.running[kept:]
        self._room = max(1, kept)

    def _known(self) -> list[Sequence]:
        """Waiting, running, and ended ones that others may start from."""
        return [*self.waiting, *self._last.values()]

    def _reset(self, sequence: Sequence, model: str) -> None:
        sequence.sources.pop(model, None)
        if self.drop_experts and model in self.away and model in sequence.request.fusion.experts:
            sequence.computed.pop(model, None)
        elif model in sequence.computed:
            sequence.computed[model] = 0

    def plan(self) -> Step:
        """The next step, which counts as computed from here on.

        When its turn comes, a sequence takes what it can use of the budget that is left, but for a
        half if shorter prompts ask for that. The tail of a sequence is computed by all of its
        models in the same steps; until the budget of every one of them allows some of it, they only
        catch up to the token before.
        """
        self._forget_lost_sources()
        self._admit()
        left: dict[str, int] = {}
        rows = self.max_rows
        chunks: dict[str, list[tuple[Sequence, int, int]]] = {}
        ready: dict[Sequence, int] = {}
        for sequence, shorter in self._turns():
            tail = sequence.tail
            budget = {}
            for model in sequence.computed:
                tokens = left.setdefault(model, self.max_num_batched_tokens)
                asked = sum(each.behind(model) for each in shorter if model in each.computed)
                budget[model] = max((tokens + 1) // 2, tokens - asked)
            catch_up = {m: max(0, sequence.behind(m) - tail) for m in sequence.computed}
            meet = min(tail, rows, *(budget[m] - catch_up[m] for m in budget))
            for model in budget:
                size = catch_up[model] + meet if meet > 0 else min(catch_up[model], budget[model])
                if size:
                    chunks.setdefault(model, []).append((sequence, size, max(0, meet)))
                    left[model] -= size
            if meet > 0:
                ready[sequence] = meet
                rows -= meet
        self._steps += 1
        # In the order of slots, so that a model finds the rows of a full batch in storage order.
        ready = dict(sorted(ready.items(), key=lambda item: item[0].slot))
        return Step({model: self._to_plan(model, part) for model, part in chunks.items()}, ready)

    def _turns(self) -> list[tuple[Sequence, list[Sequence]]]:
        """The sequences that can go on in the order of the plan, each with the prompts that it has
        to leave room for.

        Decoding sequences come first, so that a long prompt delays no running answer; then the
        oldest prompt, so that it gets on whatever follows; then the shortest ones.
        """
        behind = {s: max(map(s.behind, s.computed)) for s in self.running if not self.held(s)}
        prompts = [sequence for sequence, tokens in behind.items() if tokens > 1]
        oldest = prompts[0] if prompts else None
        shorter = [each for each in prompts if behind[each] < behind[prompts[0]]]
        order = sorted(behind, key=lambda s: (behind[s] > 1, s is not oldest, behind[s]))
        return [(sequence, shorter if sequence is oldest else []) for sequence in order]

    def _forget_lost_sources(self) -> None:
        """A copy that found no room in its step's budget is off once its source is overwritten."""
        for sequence in self.running:
            for model, source in list(sequence.sources.items()):
                if self._last.get(source.slot) is not source:
                    del sequence.sources[model]
                    sequence.computed[model] = 0

    def _admit(self) -> None:
        """Gives slots to waiting sequences, but to those not yet whose beginning is under way."""
        later = []
        tries = min(len(self._free), self._room - len(self.running))
        while self.waiting and tries > 0:
            sequence = self.waiting.popleft()
            if self.held(sequence):
                later.append(sequence)
                continue
            tries -= 1
            if self.enable_prefix_caching and not self._share(sequence):
                later.append(sequence)
                continue
            sequence.slot = heapq.heappop(self._free)  # the lowest, to keep used slots together
            self._last[sequence.slot] = sequence
            self.running.append(sequence)
        self.waiting.extendleft(reversed(later))

    def _share(self, sequence: Sequence) -> bool:
        """Lets a sequence start from the longest beginnings that slots hold; False if a running one
        is about to have more of it."""
        starts = dict.fromkeys(sequence.computed, 0)
        coming = dict(starts)
        for other in self._last.values():
            alike: dict[tuple[object, object], int] = {}
            for model in starts:
                if model not in other.computed:
                    continue
                prompts = sequence.request.prompt_of(model), other.request.prompt_of(model)
                key = id(prompts[0]), id(prompts[1])  # mostly one prompt for all models
                if key not in alike:
                    alike[key] = _common(*prompts)
                most = min(alike[key], sequence.behind(model) - sequence.tail)
                # What another is itself still to copy is not there yet.
                have = 0 if model in other.sources else min(most, other.computed[model])
                if have >= WORTH_SHARING and have > starts[model]:
                    starts[model], sequence.sources[model] = have, other
                if other in self.running and not self.held(other):
                    coming[model] = max(coming[model], most)
        if any(coming[model] >= starts[model] + WORTH_SHARING for model in starts):
            sequence.sources.clear()
            return False
        sequence.computed.update(starts)
        return True

    def _to_plan(self, model: str, chunks: list[tuple[Sequence, int, int]]) -> Plan:
        chunks.sort(key=lambda chunk: chunk[0].slot)
        tokens: list[int] = []
        starts, sources = [], []
        for sequence, size, _ in chunks:
            source = sequence.sources.pop(model, None)
            sources.append(source.slot if source else -1)
            start = sequence.computed[model]
            starts.append(start)
            tokens += sequence.tokens(model, start, start + size)
            sequence.computed[model] = start + size
        return Plan(
            step=self._steps,
            slots=_ints([sequence.slot for sequence, _, _ in chunks]),
            starts=_ints(starts),
            lengths=_ints([size for _, size, _ in chunks]),
            wants=_ints([want for _, _, want in chunks]),
            tokens=_ints(tokens),
            sources=_ints(sources if max(sources) >= 0 else []),
        )


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens two prompts have in common at their beginning."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size
    low, high = 0, size  # bisection: comparing whole slices is fast, a loop over tokens is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low


def _ints(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.asarray(values, dtype=np.int32)
