"""What an exception of a computation means: no memory, a process of no more use, or neither.

Torch has a class for some of these, for the others only the words of the library below it.
"""

from __future__ import annotations

import torch

MEMORY = (
    "out of memory",  # CUDA's allocator and driver, HIP, MPS, NCCL
    "out_of_memory",
    "alloc_failed",  # cuBLAS and cuDNN, which make their handles and workspaces late
    "can't allocate memory",  # torch on a CPU
    "not enough memory",
    "bad_alloc",
)
DEVICE = (
    "cuda error",  # whatever it is, and cuBLAS's, which torch reports as such
    "cuda driver error",
    "cudnn error",
    "cudnn_status",
    "nccl error",
    "hip error",
    "triton error [cuda]",
    "device-side assert",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no room for a computation that is fine otherwise."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _says(error, MEMORY)


def sticks(error: BaseException) -> bool:
    """Whether no later computation of this process can be trusted to work.

    After most errors of a GPU (an illegal access, a failed assertion, memory that is broken) every
    later call fails as well, until the process has ended. Few do not stick; to start anew after one
    of those costs time only.
    """
    if is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or _says(error, DEVICE)


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(each in text for each in words)
