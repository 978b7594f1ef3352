"""Blocks against lists: what each slot holds, and that none is refused while there is one."""

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from dlf_ray.models.blocks import Blocks, OutOfBlocks

SLOTS = 4


class Cache:
    """Blocks with what is written in them, beside a list of its own for each slot."""

    def __init__(self, sizes, count):
        self.sizes, self.blocks = sizes, Blocks(SLOTS, sizes, count)
        self.memory = {}
        """By group, block and place in it."""
        self.lists = [[] for _ in range(SLOTS)]
        self.written = 0

    def step(self, chunks, drops, all_begin=True):
        """`chunks`: slot, source, start and length; as a worker does it. `all_begin`: also those
        that only go on."""
        before = [list(each) for each in self.lists]
        for slot, source, start, _ in chunks:
            self.lists[slot] = before[source][:start]
        moved = [
            (source, slot, start)
            for slot, source, start, _ in chunks
            if all_begin or source != slot or start != len(before[slot])
        ]
        self.blocks.begin(*(list(each) for each in zip(*moved, strict=True))) if moved else None
        self.blocks.check_integrity()
        for slot in drops:
            self.blocks.drop(slot)
            self.blocks.check_integrity()
            self.lists[slot] = []
        for slot, _, start, length in chunks:
            self.extend(slot, start, start + length)
        # All copies are made at once, from what blocks held before the step.
        old = dict(self.memory)
        assert len({to for _, to in self.blocks.copies}) == len(self.blocks.copies)
        for begun, to in self.blocks.copies:
            for (group, block, place), value in old.items():
                if block == begun:
                    self.memory[group, to, place] = value
        for slot, _, start, length in chunks:
            for at in range(start, start + length):
                self.written += 1
                self.lists[slot].append(self.written)
                for group in range(len(self.sizes)):
                    self.memory[self.place(group, slot, at)] = self.written
        self.blocks.settle()
        self.blocks.check_integrity()
        assert not self.blocks.copies
        for slot, values in enumerate(self.lists):
            for group, size in enumerate(self.sizes):
                assert len(self.blocks.tables[slot][group]) == -(-len(values) // size)
                held = [self.memory[self.place(group, slot, at)] for at in range(len(values))]
                assert held == values, (slot, group)

    def place(self, group, slot, at):
        table = self.blocks.tables[slot][group]
        return group, table[at // self.sizes[group]], at % self.sizes[group]

    def extend(self, slot, start, end):
        blocks = self.blocks
        before = [list(each) for each in blocks.tables[slot]]
        more = needed = 0
        for group, size in enumerate(self.sizes):
            own = blocks.tables[slot][group]
            more += max(0, -(-end // size) - len(own))
            if start % size:
                others = (blocks.tables[n][group] for n in range(SLOTS) if n != slot)
                needed += any(own[-1] in table for table in others)
        free = blocks.free
        try:
            added = blocks.extend(slot, start, end)
        except OutOfBlocks:
            blocks.check_integrity()
            assert needed + more > free
            raise
        blocks.check_integrity()
        assert blocks.free == free - needed - more
        for new, table, old in zip(added, blocks.tables[slot], before, strict=True):
            assert new == table[len(old) :]
        if not needed:
            for table, old in zip(blocks.tables[slot], before, strict=True):
                assert table[: len(old)] == old


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    sizes=st.sampled_from([(1,), (4,), (3, 5), (4, 2), (4, 4)]),
    count=st.integers(2, 40),
    all_begin=st.booleans(),
)
def test_slots_hold_what_lists_hold(data, sizes, count, all_begin):
    cache = Cache(sizes, count)
    slots = st.integers(0, SLOTS - 1)
    for _ in range(data.draw(st.integers(1, 12))):
        lengths = [len(each) for each in cache.lists]
        chunks = []
        for slot in data.draw(st.lists(slots, unique=True, max_size=SLOTS)):
            source = data.draw(slots | st.just(slot))
            start = data.draw(st.integers(0, lengths[source]) | st.just(lengths[source]))
            chunks.append((slot, source, start, data.draw(st.integers(1, 9))))
        drops = data.draw(st.sets(slots)) - {slot for slot, *_ in chunks}
        try:
            cache.step(chunks, drops, all_begin)
        except OutOfBlocks:
            event("out of blocks")
            return
    for slot in range(SLOTS):
        cache.blocks.drop(slot)
    cache.blocks.check_integrity()
    assert cache.blocks.free == count - 1


def test_of_several_that_part_in_a_block_the_last_keeps_it():
    """So that sequences with blocks of their own for all they hold never need another."""
    cache = Cache((4,), 3)
    cache.step([(0, 0, 0, 3)], [])
    cache.step([(1, 0, 2, 1), (2, 0, 3, 1)], [0])
    assert cache.blocks.free == 0
    cache.step([(1, 1, 3, 1)], [])
    with pytest.raises(OutOfBlocks):
        cache.step([(1, 1, 4, 1)], [])


@settings(deadline=None)
@given(
    sizes=st.sampled_from([(4,), (3, 5), (8, 2), (4, 4)]),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=SLOTS),
    spare=st.integers(0, 3),
)
def test_what_a_worker_says_of_its_blocks_is_enough(sizes, lengths, spare):
    """Counted by the smallest block, with as many blocks as all groups may take of each."""
    block = min(sizes)
    blocks = sum(-(-length // block) for length in lengths)
    cache = Cache(sizes, 1 + blocks * len(sizes) + spare)
    cache.step([(slot, slot, 0, length) for slot, length in enumerate(lengths)], [])


def test_a_block_that_is_read_in_this_step_is_not_given_away():
    cache = Cache((4,), 4)
    cache.step([(0, 0, 0, 3)], [])
    # The first reader copies; the second goes on in place, where the first was to read.
    cache.step([(1, 0, 2, 4), (0, 0, 3, 1)], [])
    assert cache.lists[1][:2] == cache.lists[0][:2]
