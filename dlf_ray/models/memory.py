"""How much memory a process may still take on the device of its model."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")
CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""A container's limit, what of it is used, and the part of that which gives way: versions 2, 1."""


def free_bytes(device: torch.device, *, limit: int | None = None, used: int = 0) -> int:
    """On a GPU, the rest of this process' share of it, or of what others leave there if less.

    On a CPU, the rest of `limit` once `used` is taken away, if there is a limit; else what the
    machine, and the container that this runs in, have left.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        share = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        # What torch holds without using it will be used before it asks for more.
        free += torch.cuda.memory_reserved(device) - allocated
        return max(0, min(share - allocated, free))
    if limit is not None:
        return max(0, limit - used)
    return max(0, min([int(psutil.virtual_memory().available), *_container()]))


def _container() -> list[int]:
    """What the limit of this process' container leaves; nothing where there is none."""
    for limit, used, stat, gives_way in CGROUPS:
        try:
            most, now = ((CGROUP / name).read_text().strip() for name in (limit, used))
            cached = dict(line.split() for line in (CGROUP / stat).read_text().splitlines())
        except OSError:
            continue
        if most.isdigit():  # "max" is none
            return [int(most) - int(now) + int(cached.get(gives_way, 0))]
    return []
