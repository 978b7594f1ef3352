"""How logits travel from a worker to its coordinator: in shared memory, or with their message.

The logits of a worker on the coordinator's node do not pass through a socket. They lie in a memory
file that the coordinator creates for each worker and that has no name in any file system, so that
it is gone with the last process that holds it, however that process ends. A step is a lockstep: a
worker writes only between a plan and its reply, the coordinator reads only between that reply and
the next plan, so one buffer per worker is enough. From other nodes the logits come as a frame of
their own behind the message's header.

Another path is to be added here: what an `Inbox` offers to a worker, what the worker's `Outbox`
sends instead of the logits, and how the inbox finds them by that.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dlf_ray.plans import Logits

HAS_MEMORY = hasattr(os, "memfd_create")  # Linux; elsewhere everything goes over TCP
NONCE = 64  # bytes in front of the logits, a multiple of every float's size


@dataclass(frozen=True)
class Memory:
    """Where a worker may leave its logits, if it can open this, that is, if it is on the node."""

    path: str
    nonce: bytes
    """The first bytes there; another machine's file of the same path has others."""
    address: str
    """The coordinator's socket inside the node: a quarter faster than TCP to oneself."""
    network: str
    """The coordinator's network namespace, in which alone that socket exists; containers of one
    machine may have the processes in common, but not the network."""


class Inbox:
    """The coordinator's end, for all workers."""

    def __init__(self, rows: int, vocab: int) -> None:
        """With room for `rows` rows of logits per worker."""
        # An abstract name (Linux): no file that could be left behind.
        self.inside = f"ipc://@dlf-{secrets.token_hex(8)}" if HAS_MEMORY else None
        """Where the coordinator's socket should listen too, for workers of its node."""
        self._size = NONCE + rows * vocab * torch.float32.itemsize
        self._memory: dict[str, tuple[int, mmap.mmap, Memory]] = {}

    def offer(self, worker: str) -> Memory | None:
        """What a worker gets to know of it."""
        if not self.inside:
            return None
        if worker not in self._memory:
            fd = os.memfd_create(f"dlf-{worker}")
            os.ftruncate(fd, self._size)  # pages are taken when they are first written
            data = mmap.mmap(fd, self._size)
            nonce = secrets.token_bytes(NONCE)
            data[:NONCE] = nonce
            memory = Memory(f"/proc/{os.getpid()}/fd/{fd}", nonce, self.inside, _network())
            self._memory[worker] = (fd, data, memory)
        return self._memory[worker][2]

    def take(self, worker: str, frames: Sequence[memoryview]) -> Logits:
        """The logits of a worker's message; they are valid until its next plan is sent.

        Raises `ValueError` or `LookupError` where the message is none.
        """
        shared = self._memory[worker][1] if len(frames) == 1 else None
        return Logits.from_bytes(frames[0], memoryview(shared)[NONCE:] if shared else frames[1])

    def forget(self, worker: str) -> None:
        if worker in self._memory:
            os.close(self._memory.pop(worker)[0])

    def close(self) -> None:
        for worker in list(self._memory):
            self.forget(worker)


class Outbox:
    """A worker's end."""

    def __init__(self, memory: Memory | None) -> None:
        self._memory = _opened(memory) if memory else None
        self.shared = self._memory is not None
        """Whether logits are left in memory."""
        self.inside = memory.address if memory and self.shared else None
        """The coordinator's socket inside the node, if this is its node."""

    def frames(self, logits: Logits) -> list[bytes | memoryview]:
        """What is to be sent; `logits` are in memory after that, or are the second frame."""
        values = logits.values
        size = values.numel() * values.element_size()
        if self._memory is not None and size <= len(self._memory) - NONCE:
            if size:
                target = torch.frombuffer(
                    self._memory, dtype=values.dtype, count=values.numel(), offset=NONCE
                )
                target.view(values.shape).copy_(values)
            return [logits.header()]
        raw = values.cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return [logits.header(), raw.data]


def _network() -> str:
    return os.readlink("/proc/self/ns/net")


def _opened(memory: Memory) -> mmap.mmap | None:
    """The coordinator's memory file, or None where that is out of reach (another node)."""
    if memory.network != _network():
        return None
    try:
        with open(memory.path, "r+b") as file:
            data = mmap.mmap(file.fileno(), 0)
    except OSError:
        return None
    return data if data[: len(memory.nonce)] == memory.nonce else None
