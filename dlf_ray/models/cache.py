"""The slot cache: keys and values of many sequences side by side.

The cache is a table with a row of keys and values per slot. Sequences of different lengths sit side
by side, each written and read at its own positions, which is what continuous batching needs and
none of the caches of transformers offers. It is a rectangle: what it takes is its slots times its
length, and whoever plans the memory plans both.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache, DynamicLayer

from dlf_ray.plans import LENGTH_STEP

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Where one pass reads and writes in the cache; the same for all layers of a device."""

    rows: slice | torch.Tensor
    """The slot of each row of the batch, [B]; a slice, and so a view, if they are neighbours."""
    end: int
    """Attention reads the positions below it."""
    slots: torch.Tensor
    positions: torch.Tensor
    """[N] each: where the keys and values of each token go."""
    real: torch.Tensor | None
    """[N]: the tokens among the B * T that are not padding; None if all are."""

    def to(self, device: torch.device) -> Rows:
        return replace(
            self,
            rows=self.rows if isinstance(self.rows, slice) else self.rows.to(device),
            slots=self.slots.to(device),
            positions=self.positions.to(device),
            real=None if self.real is None else self.real.to(device),
        )


class SlotCache(Cache):
    """Keys and values of every layer, each [slots, heads, length, dim] on the layer's device.

    A masked position weighs zero, which is not enough where it holds a NaN: what a sequence leaves
    behind in its slot is cleared before another could meet it, so unused places hold finite
    numbers.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)  # never made: update is our own
        self.size = (0, 0)
        """Slots and positions."""
        self._storage: dict[tuple[int, bool], torch.Tensor] = {}
        self._resized = True
        """Whether all of the storage has `size`."""
        self._reach = np.zeros(0, dtype=np.int64)
        """[slots]: positions at and above it hold zeros."""
        self._rows: dict[torch.device, Rows] = {}

    def bytes_per_position(self) -> Counter[torch.device]:
        """What one token's keys and values take on each device."""
        taken: Counter[torch.device] = Counter()
        for held in self._storage.values():
            taken[held.device] += held.shape[1] * held.shape[3] * held.element_size()
        return taken

    @property
    def tensors(self) -> int:
        """Keys and values of a layer are one each."""
        return len(self._storage)

    def prepare(
        self,
        needed: tuple[int, int],
        slots: Indices,
        ends: Indices,
        copies: tuple[Indices, Indices, Indices],
    ) -> None:
        """Readies the storage for a step that writes `slots` [n] up to positions `ends` [n].

        Where it lacks some of the `needed` slots and positions, it is made that large, and no
        larger; what lies outside is lost. `copies` are three [m]: slots, slots (m of `slots`) and
        numbers of positions to copy from the former to the latter, all as they are before.

        One tensor after the other, so that at most one is there twice.
        """
        length = int(_rounded(np.asarray(needed[1])))
        if needed[0] > self.size[0] or length > self.size[1]:
            self.size, self._resized = (needed[0], length), False
            reach = np.zeros(needed[0], dtype=np.int64)
            kept = self._reach[: needed[0]]
            reach[: len(kept)] = np.minimum(kept, length)
            self._reach = reach
        sources, targets, counts = copies
        # A little more than asked for, so that few counts differ and many copies are one.
        counts = _rounded(counts)
        self._reach[targets] = np.maximum(self._reach[targets], counts)
        behind = np.maximum(self._reach[slots] - ends, 0)
        if len(targets) or behind.any() or not self._resized:
            arrays = [_ranges(ends, behind), np.repeat(slots, behind)]
            for count in (distinct := np.unique(counts).tolist()):
                arrays += [sources[counts == count], targets[counts == count]]
            self._rewrite(arrays, distinct)
        self._resized = True
        self._reach[slots] = ends

    def _rewrite(self, arrays: list[Indices], counts: list[int]) -> None:
        """`arrays` are the positions and the slots of what is to be cleared, then the sources and
        the targets of the copies of each of `counts`."""
        packed = torch.from_numpy(np.concatenate(arrays))
        sizes = [len(array) for array in arrays]
        placed: dict[torch.device, tuple[torch.Tensor, ...]] = {}
        slots, length = self.size
        for key, held in self._storage.items():
            if (at := placed.get(held.device)) is None:
                at = placed[held.device] = packed.to(held.device).split_with_sizes(sizes)
            taken = [
                held[:, :, :count].index_select(0, sources)
                for count, sources in zip(counts, at[2::2], strict=True)
            ]
            if (held.shape[0], held.shape[2]) != self.size:
                resized = held.new_empty(slots, held.shape[1], length, held.shape[3])
                kept = held[:slots, :, :length]
                resized[: len(kept), :, : kept.shape[2]] = kept
                resized[len(kept) :] = 0
                resized[: len(kept), :, kept.shape[2] :] = 0
                held = self._storage[key] = resized
                del kept, resized
            for count, targets, part in zip(counts, at[3::2], taken, strict=True):
                held[:, :, :count].index_copy_(0, targets, part)
            if sizes[0]:
                held[at[1], :, at[0]] = 0

    def point(self, rows: Rows) -> None:
        """Says where the next pass reads and writes, within what `prepare` was told."""
        self._rows = {rows.slots.device: rows}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values of a pass, [B, heads, T, dim]; returns all that its rows may see,
        [B, heads, end, dim]."""
        device = key_states.device
        if (rows := self._rows.get(device)) is None:
            rows = self._rows[device] = next(iter(self._rows.values())).to(device)
        keys, values = (
            self._write(rows, (layer_idx, is_value), new)
            for is_value, new in ((False, key_states), (True, value_states))
        )
        return keys, values

    def _write(self, rows: Rows, key: tuple[int, bool], new: torch.Tensor) -> torch.Tensor:
        if (held := self._storage.get(key)) is None:
            slots, length = self.size
            held = new.new_zeros(slots, new.shape[1], length, new.shape[3])
            self._storage[key] = held
        new = new.transpose(1, 2).flatten(0, 1)
        held[rows.slots, :, rows.positions] = new if rows.real is None else new[rows.real]
        return held[rows.rows, :, : rows.end]


def _rounded(lengths: Indices) -> Indices:
    """Up to multiples of `LENGTH_STEP`."""
    return -(-lengths // LENGTH_STEP) * LENGTH_STEP


def _ranges(starts: Indices, counts: Indices) -> Indices:
    """`counts[i]` numbers from `starts[i]` on, for each i: [sum(counts)]."""
    firsts = np.cumsum(counts) - counts
    ranges: Indices = np.arange(counts.sum()) + np.repeat(starts - firsts, counts)
    return ranges
