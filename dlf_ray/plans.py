"""The step itself: a plan out to every worker, logits back."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int32]


ALL = 2**31 - 1
"""A limit that leaves out nothing."""


LENGTH_STEP = 64
"""The length of a model's cache is a multiple of it: few sizes to grow through, rows aligned."""


@dataclass(frozen=True)
class Plan:
    """What one model computes in one step: n chunks of n sequences.

    A chunk puts `lengths[i]` tokens into slot `slots[i]`, the first of them at position
    `starts[i]`, and scores the last `wants[i]` of them (0 for a prompt that is not complete yet).
    `starts[i]` never exceeds what the slot has already computed: 0 begins a new sequence in the
    slot, less than computed rolls back. So a plan is a diff by itself: each token travels to each
    model once, and a model that lost its state is served by starting at 0 again.

    Where `sources[i]` is a slot, that one's first `starts[i]` positions, as they are before this
    step, are copied to slot `slots[i]` first: sequences that begin alike are computed once.

    A model's cache is a rectangle of slots x positions. Once the copies are made, nothing is held
    any more at and above slot `keep`, nor at and above position `keep_length` of any slot, but for
    what the plan's own chunks begin from: the first `starts[i]` positions of their slots. A cache
    that lacks slots or positions for a plan becomes as large as the highest slot and the longest
    sequence held after the plan ask for, lengths rounded up to `LENGTH_STEP`, and no larger; so a
    plan can trade slots for length, and back. One that lacks neither stays as it is. A cache of
    blocks is no rectangle: there, what slots `drops` hold is dropped instead, once copies are made.

    A worker that serves several models over one copy of weights takes one plan for all of them:
    `models[i]` says whose chunk i is, by its place among the worker's, and each has slots of its
    own.
    """

    step: int
    slots: Ints
    starts: Ints
    lengths: Ints
    wants: Ints
    tokens: Ints
    """All chunks one after the other, [sum(lengths)]."""
    sources: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    """A slot or -1 for each chunk, or nothing at all if there is nothing to copy."""
    keep: int = ALL
    keep_length: int = ALL
    drops: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    """Slots, or none."""
    models: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    """For each chunk, or nothing at all where the worker serves one model."""

    HEADER = struct.Struct("<4sQIIIIIII")
    MAGIC = b"dlfP"

    @property
    def rows(self) -> int:
        """Rows of logits that this plan asks for."""
        return int(self.wants.sum())

    def to_bytes(self) -> bytes:
        parts = (self.tokens, self.sources, self.drops, self.models)
        sizes = len(self.slots), *map(len, parts)
        header = self.HEADER.pack(self.MAGIC, self.step, *sizes, self.keep, self.keep_length)
        arrays = (self.slots, self.starts, self.lengths, self.wants, *parts)
        return header + np.concatenate(arrays).astype("<i4", copy=False).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Plan:
        """Raises `ValueError` where `data` is not a plan."""
        if len(data) < cls.HEADER.size:
            raise ValueError("a plan shorter than its header")
        magic, step, n, *sizes, keep, keep_length = cls.HEADER.unpack_from(data)
        if magic != cls.MAGIC or len(data) != cls.HEADER.size + 4 * (4 * n + sum(sizes)):
            raise ValueError("not a plan, or one of another length than its header says")
        body = np.frombuffer(data, dtype="<i4", offset=cls.HEADER.size)
        slots, starts, lengths, wants = body[: 4 * n].reshape(4, n)
        ends = 4 * n + np.cumsum(sizes)
        tokens, sources, drops, models, _ = np.split(body[4 * n :], ends - 4 * n)
        columns = (slots, starts, lengths, wants, tokens, sources)
        return cls(step, *columns, keep, keep_length, drops, models)


@dataclass(frozen=True)
class Logits:
    """One model's answer to a plan."""

    step: int
    values: torch.Tensor
    """[R, V], in the model's own float type, rows in the order of the plan."""
    finite: npt.NDArray[np.bool_]
    """[R]: whether a row is free of NaN and infinities."""
    seconds: float
    """Wall-clock seconds of the forward pass."""
    began: float = 0.0
    """When that began, in seconds since 1970 by the worker's clock."""

    HEADER = struct.Struct("<4sQIIBdd")
    MAGIC = b"dlfL"
    DTYPES = (torch.float32, torch.bfloat16, torch.float16)

    def header(self) -> bytes:
        rows, vocab = self.values.shape
        kind = self.DTYPES.index(self.values.dtype)
        times = self.seconds, self.began
        packed = self.HEADER.pack(self.MAGIC, self.step, rows, vocab, kind, *times)
        return packed + self.finite.tobytes()

    @classmethod
    def from_bytes(cls, header: bytes | memoryview, values: memoryview) -> Logits:
        """The tensor is a view of `values`. Raises `ValueError` where the two are not logits."""
        if len(header) < cls.HEADER.size:
            raise ValueError("logits with a header cut short")
        magic, step, rows, vocab, kind, seconds, began = cls.HEADER.unpack_from(header)
        if magic != cls.MAGIC or kind >= len(cls.DTYPES) or len(header) != cls.HEADER.size + rows:
            raise ValueError("not logits, or logits of a broken header")
        dtype = cls.DTYPES[kind]
        size = rows * vocab * dtype.itemsize
        if len(values) < size:
            raise ValueError(f"{len(values)} bytes of logits where the header says {size}")
        if rows:
            tensor = torch.frombuffer(values, dtype=dtype, count=rows * vocab).view(rows, vocab)
        else:
            tensor = torch.empty(0, vocab, dtype=dtype)
        finite = np.frombuffer(header, dtype=np.bool_, offset=cls.HEADER.size)
        return cls(step, tensor, finite, seconds, began)
