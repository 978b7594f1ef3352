"""Which tokens every model computes next. No torch, no Ray: sequences, slots and budgets.

There are no prefill and decode phases: in each model a sequence has a number of computed positions
that must catch up with its tokens. A prompt is many tokens behind, a decoding sequence one.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from dlf_ray.messages import Plan, Request


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

    def tokens(self, model: str, start: int, stop: int) -> list[int]:
        prompt = self.request.prompt_of(model)
        if start >= len(prompt):
            return self.generated[start - len(prompt) : stop - len(prompt)]
        return [*prompt[start:stop], *self.generated[: max(0, stop - len(prompt))]]

    def behind(self, model: str) -> int:
        """Tokens that the model has not computed yet."""
        length = len(self.request.prompt_of(model)) + len(self.generated)
        return length - self.computed[model]


@dataclass(frozen=True)
class Step:
    """One step of all models."""

    plans: dict[str, Plan]
    """For each model that has something to compute."""
    ready: list[Sequence]
    """The sequences whose next token this step decides."""

    def rows(self, model: str, sequences: Iterable[Sequence]) -> list[int]:
        """Where the logits of `sequences` are among the rows of `model`."""
        at = {id(s): row for row, s in enumerate(s for s in self.ready if model in s.computed)}
        return [at[id(sequence)] for sequence in sequences]


class Scheduler:
    """First come, first served: a slot for each running sequence, a token budget for each step."""

    def __init__(self, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._free = list(range(max_num_seqs))
        self._steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, whether it is finished, failed or no longer wanted."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            heapq.heappush(self._free, sequence.slot)

    def plan(self) -> Step:
        """The next step, which counts as computed from here on.

        Decoding sequences come first, so that a long prompt delays no running answer; what is left
        of the budget goes to prompts in the order of their arrival. A sequence's last known token
        is computed by all of its models in the same step, since all their logits meet there; until
        the budget of every one of them allows it, they only catch up to the token before.
        """
        while self.waiting and self._free:
            sequence = self.waiting.popleft()
            sequence.slot = heapq.heappop(self._free)  # the lowest, to keep used slots together
            self.running.append(sequence)
        left: dict[str, int] = {}
        chunks: dict[str, list[tuple[Sequence, int, int]]] = {}
        ready: list[Sequence] = []
        decoding = [s for s in self.running if all(s.behind(m) == 1 for m in s.computed)]
        known = set(map(id, decoding))
        for sequence in (*decoding, *(s for s in self.running if id(s) not in known)):
            todo = {model: sequence.behind(model) for model in sequence.computed}
            budget = {model: left.get(model, self.max_num_batched_tokens) for model in todo}
            whole = all(todo[model] <= budget[model] for model in todo)
            for model in todo:
                size = todo[model] if whole else min(todo[model] - 1, budget[model])
                if size:
                    chunks.setdefault(model, []).append((sequence, size, int(whole)))
                    left[model] = budget[model] - size
            if whole:
                ready.append(sequence)
        self._steps += 1
        # In the order of slots, so that a model finds the rows of a full batch in storage order.
        ready.sort(key=lambda sequence: sequence.slot)
        return Step({model: self._to_plan(model, part) for model, part in chunks.items()}, ready)

    def _to_plan(self, model: str, chunks: list[tuple[Sequence, int, int]]) -> Plan:
        chunks.sort(key=lambda chunk: chunk[0].slot)
        tokens: list[int] = []
        starts = []
        for sequence, size, _ in chunks:
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
        )


def _ints(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.asarray(values, dtype=np.int32)
