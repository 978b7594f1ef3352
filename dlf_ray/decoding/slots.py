"""What the slots of the caches hold, who may start from it, and how much memory that takes.

A slot is a row in the cache of every model. It remembers its tokens after its sequence has ended,
so that a sequence which begins alike starts from a copy. Prefixes are found by the hash of each
block of tokens with all blocks before it (as vLLM does), compared once more token by token: no
answer depends on a hash.

A model's cache is a rectangle: so many slots, each as long as the longest sequence in it. Who is
let in is decided by the rectangle that all of the running ones may come to need in every model;
what is only remembered gives way.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from dlf_ray.messages import Pool
from dlf_ray.plans import LENGTH_STEP

BLOCK = 16
"""Tokens that are hashed together; less in common is not worth a copy."""
CANDIDATES = 4
"""Of the slots that have a block in common with a sequence, so many are compared further."""
Ints = npt.NDArray[np.int32]


class Tokens:
    """The tokens of a sequence as some of its models see them: a prompt, then generated ones."""

    def __init__(self, prompt: Sequence[int], generated: list[int]) -> None:
        """`generated` grows while the sequence runs."""
        self.prompt: Ints = np.array(prompt, dtype=np.int32)
        self.generated = generated
        self._hashes: list[int] = []

    def __len__(self) -> int:
        return len(self.prompt) + len(self.generated)

    def array(self, start: int, stop: int) -> Ints:
        size = len(self.prompt)
        if stop <= size:
            return self.prompt[start:stop]
        new = np.array(self.generated[max(0, start - size) : stop - size], dtype=np.int32)
        return new if start >= size else np.concatenate([self.prompt[start:], new])

    def hashes(self) -> list[int]:
        """One for each whole block, of its tokens and all before."""
        begin = len(self._hashes)
        whole = len(self) // BLOCK
        if begin < whole:
            raw = self.array(begin * BLOCK, whole * BLOCK).tobytes()
            before = self._hashes[-1] if begin else 0
            size = BLOCK * 4
            for at in range(0, len(raw), size):
                before = hash((before, raw[at : at + size]))
                self._hashes.append(before)
        return self._hashes

    def common(self, other: Tokens, most: int) -> int:
        """How many tokens the two have in common at their beginning, at most `most`."""
        size = min(len(self), len(other), most)
        differ = self.array(0, size) != other.array(0, size)
        at = int(differ.argmax()) if size else 0
        return at if size and differ[at] else size


@dataclass(eq=False)
class Cached:
    """What a slot holds."""

    tokens: Mapping[str, Tokens]
    """By model."""
    computed: dict[str, int]
    """By model: how many of these tokens its cache holds; the running sequence's own mapping."""
    used: int = 0
    """When a sequence last started from it; 0 for never."""
    indexed: dict[str, int] = field(default_factory=dict)
    """By model: how many blocks can be found."""

    def texts(self) -> Iterable[Tokens]:
        """Those that differ: most models see the same."""
        return {id(each): each for each in self.tokens.values()}.values()


@dataclass(frozen=True)
class Prefix:
    """Where a sequence can begin in one model."""

    size: int
    """Tokens that need not be computed."""
    slot: int
    """Whose; -1 for none."""


NO_PREFIX = Prefix(0, -1)


class Slots:
    """The slots of a family, the same in the cache of every model."""

    def __init__(
        self,
        count: int,
        positions: Mapping[str, int] | None = None,
        pools: Mapping[str, Pool] | None = None,
    ) -> None:
        """`positions`: for each model whose memory is known, slots x length that fit in there.
        `pools`: for each model whose cache is one of blocks instead, those."""
        self.count = count
        self.limit = count
        """Only the slots below it may be taken: fewer after memory ran out unforeseen."""
        self.positions = dict(positions or {})
        self.pools = dict(pools or {})
        self.free = list(range(count))
        """In ascending order."""
        self.cached: dict[int, Cached] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        """Of each model's cache, at most: slots and length."""
        self._needs: dict[int, dict[str, int]] = {}
        """Of each slot that is taken: the positions that its sequence may come to, by model."""
        self._index: dict[str, dict[int, dict[int, None]]] = {}
        """By model and hash of a block: the slots that hold it."""
        self._coming: dict[int, dict[int, None]] = {}
        """By hash of a block of a prompt: the slots whose sequences hold or will compute it."""
        self._drops: dict[str, dict[int, None]] = {}
        """By model with a cache of blocks: slots that it is to drop before its next step."""
        self._held: dict[str, dict[int, int]] = {}
        """By the same, and slot: the positions that it has blocks for, but of those to be dropped.
        A sequence that waits for its turn in a step has what its slot held before."""
        self._clock = 0

    # ------------------------------------------------------------ prefixes

    def longest_prefix(self, model: str, tokens: Tokens, most: int) -> Prefix:
        """The longest prefix of `tokens` that a slot holds for the model, at most `most`."""
        best = NO_PREFIX
        index = self._index.get(model)
        for slot in self._candidates(index, tokens, most) if index else ():
            cached = self.cached[slot]
            size = min(tokens.common(cached.tokens[model], most), cached.computed.get(model, 0))
            if size > best.size:
                best = Prefix(size, slot)
        return best if best.size >= BLOCK else NO_PREFIX

    def coming_prefix(self, model: str, tokens: Tokens, most: int) -> Prefix:
        """The same of what running sequences hold or are about to compute."""
        best = NO_PREFIX
        for slot in self._candidates(self._coming, tokens, most):
            cached = self.cached[slot]
            if model in cached.computed:
                size = tokens.common(cached.tokens[model], most)
                best = max(best, Prefix(size, slot), key=lambda start: start.size)
        return best

    @staticmethod
    def _candidates(
        index: Mapping[int, dict[int, None]], tokens: Tokens, most: int
    ) -> Iterator[int]:
        """Some of the slots that have the most blocks in common with `tokens`."""
        hashes = tokens.hashes()
        low, high = 0, min(len(hashes), most // BLOCK)
        while low < high:  # a slot that has a block has all before it
            middle = (low + high + 1) // 2
            low, high = (middle, high) if hashes[middle - 1] in index else (low, middle - 1)
        return islice(index[hashes[low - 1]], CANDIDATES) if low else iter(())

    def note(self, slot: int, model: str) -> None:
        """Makes what the model has computed in a slot known to those who begin alike."""
        cached = self.cached[slot]
        begin, end = cached.indexed.get(model, 0), cached.computed[model] // BLOCK
        if begin < end:
            index = self._index.setdefault(model, {})
            for block in cached.tokens[model].hashes()[begin:end]:
                index.setdefault(block, {})[slot] = None
            cached.indexed[model] = end

    def use(self, slot: int) -> None:
        """A sequence starts from what the slot holds: that is worth keeping."""
        self._clock += 1
        self.cached[slot].used = self._clock

    # ------------------------------------------------------------ taking and leaving

    def choose(
        self, needs: Mapping[str, int], starts: Mapping[str, Prefix], sources: set[int]
    ) -> int | None:
        """A free slot for a sequence that may come to `needs` positions in each of its models; None
        where that is more memory than there is beside those that run.

        One that only goes on from what a free slot holds takes that slot. Else the lowest that
        holds nothing of use, so that caches stay small; what others start from (`sources`, now)
        goes last.
        """
        free = [slot for slot in self.free if slot < self.limit]
        if not free:
            return None
        own = {start.slot for start in starts.values()}
        mine = own.pop() if len(own) == 1 else -1
        if mine in free and all(
            self.cached[mine].computed.get(model, 0) <= start.size
            for model, start in starts.items()
        ):
            wish = mine
        else:
            kept = sources | {start.slot for start in starts.values()}

            def worth(slot: int) -> tuple[bool, int]:
                cached = self.cached.get(slot)
                return slot in kept, cached.used if cached else 0

            wish = min(free, key=worth)  # the first, so the lowest, of equals
        for slot in (wish, free[0]):
            going_on = {model for model, start in starts.items() if start.slot == slot}
            if self._fit_pools(slot, needs, going_on) and all(
                self._shape(model, slot + 1, needs[model]) for model in needs
            ):
                return slot
        return None

    def allocate(
        self, slot: int, needs: Mapping[str, int], cached: Cached, own: Collection[str] = ()
    ) -> None:
        """Gives a free slot to a sequence; what it held is remembered no longer. `own`: the models
        in which it goes on from that."""
        for model, length in needs.items():
            shape = self._shape(model, slot + 1, length)
            assert shape, "a slot that was not chosen"
            self._reshape(model, shape)
        held = {model: self._held[model].get(slot, 0) for model in own if model in self._held}
        self.forget(slot)
        for model, length in held.items():
            self._drops.get(model, {}).pop(slot, None)
            self.hold(slot, model, length)
        self.free.remove(slot)
        self.cached[slot] = cached
        self._needs[slot] = dict(needs)
        for pool in {self.pools[model] for model in needs if model in self.pools}:
            self._make_room(pool)
        for tokens in cached.texts():
            for block in tokens.hashes():
                self._coming.setdefault(block, {})[slot] = None

    def hold(self, slot: int, model: str, length: int) -> None:
        """The model will have so many positions of a slot after its next step."""
        if model in self.pools:
            self._held.setdefault(model, {})[slot] = length

    def release(self, slot: int) -> None:
        """The sequence of a slot has ended or has to make room; what it computed is remembered."""
        for tokens in self.cached[slot].texts():
            for block in tokens.hashes():
                _discard(self._coming, block, slot)
        del self._needs[slot]
        bisect.insort(self.free, slot)

    def forget(self, slot: int) -> None:
        """What a slot holds is not to be started from."""
        if cached := self.cached.get(slot):
            for model in list(cached.indexed):
                self._forget_model(slot, model)
            if slot not in self._needs:
                del self.cached[slot]
                for model, held in self._held.items():
                    if held.pop(slot, 0):
                        self._drops.setdefault(model, {})[slot] = None

    def lose(self, model: str) -> None:
        """A model has nothing in its cache any more."""
        self._index.pop(model, None)
        self._drops.pop(model, None)
        self._held.pop(model, None)
        self.shapes[model] = self._taken(model)
        for cached in self.cached.values():
            cached.indexed.pop(model, None)
            if model in cached.computed:
                cached.computed[model] = 0

    def runs(self, slot: int, cached: Cached) -> bool:
        """Whether this is what a running sequence has in a slot."""
        return slot in self._needs and self.cached[slot] is cached

    def _forget_model(self, slot: int, model: str) -> None:
        cached = self.cached[slot]
        for block in cached.tokens[model].hashes()[: cached.indexed.pop(model, 0)]:
            _discard(self._index[model], block, slot)

    # ------------------------------------------------------------ memory

    def _shape(self, model: str, slots: int, length: int) -> tuple[int, int] | None:
        """The model's cache if it must have at least so many slots of this length; None where that
        does not fit. It keeps what it has, as far as that fits beside."""
        have_slots, have_length = self.shapes.get(model, (0, 0))
        most = self.positions.get(model)
        length = _rounded(length)
        grown = max(slots, have_slots), max(length, have_length)
        if most is None or grown[0] * grown[1] <= most or grown == (have_slots, have_length):
            return grown
        taken_slots, taken_length = self._taken(model)
        slots, length = max(slots, taken_slots), max(length, taken_length)
        if slots * length > most:
            # Alone in the lowest it is let in: that it fits was looked at when the family started.
            return (slots, length) if slots == 1 else None
        return max(slots, min(have_slots, most // length)), length

    def _taken(self, model: str) -> tuple[int, int]:
        """The rectangle that the running sequences may come to need."""
        needs = {slot: need[model] for slot, need in self._needs.items() if model in need}
        return max(needs, default=-1) + 1, _rounded(max(needs.values(), default=0))

    def _reshape(self, model: str, shape: tuple[int, int]) -> None:
        slots, length = shape
        if self.shapes.get(model, (0, 0)) != shape:
            self.shapes[model] = shape
            for slot, cached in self.cached.items():
                if model in cached.computed and (slot >= slots or cached.computed[model] > length):
                    if slot >= slots:
                        self._forget_model(slot, model)
                        cached.computed[model] = 0
                    else:
                        cached.computed[model] = length

    def dropped(self, model: str) -> list[int]:
        """The slots that the model is to drop in its next step; they are told once."""
        return list(self._drops.pop(model, ()))

    def _fit_pools(self, slot: int, needs: Mapping[str, int], own: Collection[str]) -> bool:
        """Whether a sequence has enough blocks beside those that run, whatever is only remembered.

        Alone it has: that was looked at when the family started.
        """
        if not self._needs:
            return True
        return all(
            self._running(pool) + self._blocks(pool, slot, needs, own) <= pool.tokens
            for pool in {self.pools[model] for model in needs if model in self.pools}
        )

    def _running(self, pool: Pool) -> int:
        """What those that run have of a pool or may come to need."""
        return sum(self._blocks(pool, slot, needs) for slot, needs in self._needs.items())

    def _blocks(
        self,
        pool: Pool,
        slot: int,
        needs: Mapping[str, int] = MappingProxyType({}),
        own: Collection[str] | None = None,
    ) -> int:
        """The tokens of whole blocks for what a slot needs and holds; `own`: in which models it
        counts what it holds, in all if that is not said."""
        total = 0
        for model, its in self.pools.items():
            if its == pool:
                counts = own is None or model in own
                held = self._held.get(model, {}).get(slot, 0) if counts else 0
                total += -(-max(needs.get(model, 0), held) // pool.block) * pool.block
        return total

    def _make_room(self, pool: Pool) -> None:
        """Drops what is only remembered, the least used first, as far as those that run need it."""
        left = pool.tokens - self._running(pool)
        rest = sorted(set(self.cached) - set(self._needs), key=lambda slot: -self.cached[slot].used)
        for slot in rest:
            left -= self._blocks(pool, slot)
            if left < 0:
                self.forget(slot)

    # ------------------------------------------------------------ what must hold

    def check_integrity(self) -> None:
        """Raises `AssertionError` where the parts of this disagree."""
        taken = set(self._needs)
        assert self.free == sorted(set(range(self.count)) - taken)
        assert taken <= set(self.cached) <= set(range(self.count))
        for slot, cached in self.cached.items():
            for model, computed in cached.computed.items():
                assert 0 <= computed <= len(cached.tokens[model]), (slot, model, computed)
        for model, index in self._index.items():
            for block, slots in index.items():
                for slot in slots:
                    cached = self.cached[slot]
                    assert block in cached.tokens[model].hashes()[: cached.indexed[model]]
        for slots in self._coming.values():
            assert set(slots) <= taken
        for model, most in self.positions.items():
            rows, length = self.shapes.get(model, (0, 0))
            assert rows * length <= most or rows == 1
        for pool in set(self.pools.values()):
            held = [self._blocks(pool, slot, self._needs.get(slot, {})) for slot in self.cached]
            assert sum(held) <= pool.tokens or len(held) == 1
        for model, lengths in self._held.items():
            assert set(lengths) <= set(self.cached)
            assert not set(lengths) & set(self._drops.get(model, ())) - taken
            for slot, length in lengths.items():
                cached = self.cached[slot]
                assert slot in taken or cached.computed.get(model, 0) <= length


def _rounded(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def _discard(index: dict[int, dict[int, None]], block: int, slot: int) -> None:
    """Takes a slot from a block's; blocks that no slot has are not kept."""
    if slots := index.get(block):
        slots.pop(slot, None)
        if not slots:
            del index[block]
