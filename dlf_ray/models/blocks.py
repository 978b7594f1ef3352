"""Which blocks of a paged cache hold which positions of which slot.

Blocks are counted, so that slots can share a prefix, and copied when one of the slots is about to
write into what others read. One pool of numbers serves all groups of layers (those with windows of
their own are a group), as in vLLM; block 0 is nobody's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class OutOfBlocks(MemoryError):
    """No block is free: the worker answers that it is out of memory."""


class Blocks:
    """The blocks of all slots."""

    def __init__(self, slots: int, sizes: Sequence[int], count: int) -> None:
        """`sizes`: the positions in a block of each group; `count` blocks, block 0 among them."""
        self.tables: list[tuple[list[int], ...]] = [tuple([] for _ in sizes) for _ in range(slots)]
        """For each slot, and each group, its blocks in the order of positions."""
        self.copies: list[tuple[int, int]] = []
        """From which block to which one, before this step computes anything."""
        self._sizes = tuple(sizes)
        self._free = list(range(count - 1, 0, -1))
        self._users = np.zeros(count, dtype=np.int32)
        self._read: list[int] = []
        """Blocks that are copied from in this step, not to be given away before."""

    @property
    def free(self) -> int:
        """How many blocks nobody has."""
        return len(self._free)

    def begin(self, sources: Sequence[int], slots: Sequence[int], starts: Sequence[int]) -> None:
        """Gives each slot the first `start` positions of its source, all as they are before this
        step; a slot that is its own source is cut there."""
        taken = [
            tuple(
                table[: -(-start // size)]
                for table, size in zip(self.tables[source], self._sizes, strict=True)
            )
            for source, start in zip(sources, starts, strict=True)
        ]
        for tables in taken:
            for table in tables:
                np.add.at(self._users, table, 1)
        for slot, tables in zip(slots, taken, strict=True):
            old, self.tables[slot] = self.tables[slot], tables
            for table in old:
                self._release(table)

    def extend(self, slot: int, start: int, end: int) -> tuple[list[int], ...]:
        """Makes room for positions start..end; a block that others read too is copied first.

        Returns the new blocks of each group. Raises `OutOfBlocks`.
        """
        added: tuple[list[int], ...] = tuple([] for _ in self._sizes)
        for table, new, size in zip(self.tables[slot], added, self._sizes, strict=True):
            # Who has copied it reads it before anything is written: the last one may write there.
            if start % size and self._users[table[-1]] - self._read.count(table[-1]) > 1:
                copy = self._take()
                self._read.append(table[-1])
                self.copies.append((table[-1], copy))
                table[-1] = copy
            while len(table) * size < end:
                new.append(self._take())
                table.append(new[-1])
        return added

    def drop(self, slot: int) -> None:
        """Nothing of the slot is needed any more."""
        for table in self.tables[slot]:
            self._release(table)
            table.clear()

    def settle(self) -> None:
        """The copies of this step are done."""
        self._release(self._read)
        self._read, self.copies = [], []

    def check_integrity(self) -> None:
        """Raises `AssertionError` where the counts and the tables disagree."""
        users = np.zeros_like(self._users)
        for tables in self.tables:
            for table in tables:
                assert len(set(table)) == len(table)
                np.add.at(users, table, 1)
        np.add.at(users, self._read, 1)
        assert (users == self._users).all()
        assert sorted(self._free) == [n for n in range(1, len(users)) if not users[n]]

    def _take(self) -> int:
        if not self._free:
            raise OutOfBlocks("no block of the cache is free")
        block = self._free.pop()
        self._users[block] = 1
        return block

    def _release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._users[block] -= 1
            if not self._users[block]:
                self._free.append(block)
