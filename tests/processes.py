"""What tests see of processes, and how they wait: for as long as it takes, no longer."""

import contextlib
import fcntl
import socket
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
BIN = Path(sys.executable).parent
PATIENCE_S = 120.0
"""For what takes seconds: so long only on a machine that has a lot else to do, or never."""


def settled(condition, timeout_s=PATIENCE_S):
    """Waits until `condition` holds; returns what it was in the end."""
    deadline = time.monotonic() + timeout_s
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return held


@contextlib.contextmanager
def one_at_a_time():
    """Meanwhile nobody else's cluster starts: Ray gives a node's agents 15 s and no more, which
    several nodes that start at once, on cores that are busy, would need."""
    with open(Path(tempfile.gettempdir(), "dlf_ray-tests.lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def below(*names):
    """Our own cluster's processes whose title has one of `names`; Ray titles them by class and
    method ("ray::WorkerActor.serve")."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            if any(name in title for name in names):
                found.append(process)
    return found


def alive(pid):
    """Whether a process still runs; one that nobody has asked how it ended does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def actors():
    """The processes of our actors."""
    return below("ray::WorkerActor", "ray::CoordinatorActor")


def groups():
    """The placement groups that our cluster has."""
    import ray

    every = ray.util.placement_group_table()
    return [id for id, group in every.items() if group["state"] != "REMOVED"]


def refused(family, words, error=ValueError, **options):
    """An engine does not start, says why, and leaves nothing behind."""
    from dlf_ray import Engine

    with pytest.raises(error, match=words) as caught:
        Engine(family, **options)
    assert settled(lambda: not groups())
    assert settled(lambda: not actors()), actors()
    return caught.value


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end(process):
    """Ends a process of ours with all below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.kill()
    process.wait(PATIENCE_S)
