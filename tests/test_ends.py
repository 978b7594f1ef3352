"""How an engine ends: cleanly, whether it was closed, interrupted, or could not start at all."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import ray
import tiny
from conftest import family_of

from dlf_ray import Engine, EngineError
from dlf_ray.worker import ModelWorker

pytestmark = pytest.mark.usefixtures("ray_cluster")


def actors():
    """The processes of our actors, below our own cluster's; Ray names them after their class."""
    names = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(" ".join(process.cmdline()))
    return [name for name in names if "ray::WorkerActor" in name or "ray::CoordinatorActor" in name]


def groups():
    return [
        group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"
    ]


def settled(condition, timeout_s=20.0):
    """Waits until `condition` holds; processes need a moment to go."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def test_nothing_is_left_after_the_end(folder):
    engine = Engine(family_of(folder, experts=("math",)))
    assert len(groups()) == 1
    engine.generate([5])
    engine.close()
    engine.close()  # twice is fine
    assert settled(lambda: not groups())
    assert settled(lambda: not actors()), actors()
    with pytest.raises(EngineError, match="closed"):
        engine.generate([5])


def refused(family, words, error=ValueError, timeout_s=40, **kwargs):
    """The engine does not start, says why in time, and leaves nothing behind."""
    began = time.monotonic()
    with pytest.raises(error, match=words):
        Engine(family, **kwargs)
    assert time.monotonic() - began < timeout_s
    assert settled(lambda: not groups())
    assert settled(lambda: not actors()), actors()


def test_a_missing_folder_is_named(folder):
    refused(family_of(folder, experts=("math", "nowhere")), r"nowhere")


def test_tokenizers_that_differ_are_named_with_the_first_difference(folder, tmp_path):
    other = tmp_path / "other"
    tiny.model(other, vocab=310)
    family = family_of(folder, experts=("math",))
    family = type(family).from_dict(
        {
            "large": {"model": family.large.model, "num_cpus": 0.1},
            "base": {"model": family.base.model, "num_cpus": 0.1},
            "experts": {"math": {"model": str(other), "num_cpus": 0.1}},
            "engine": {"num_cpus": 0.1},
        }
    )
    refused(family, rf"large.*{folder / 'large'}.*math.*{other}.*300")


def test_a_cluster_that_is_too_small_says_what_is_needed(folder):
    family = family_of(folder, experts=("math",), num_cpus=100)
    refused(
        family, r"100\.3 CPUs are needed, the cluster has 4(.|\n)*coordinator: 100 CPU", timeout_s=5
    )
    family = type(family).from_dict(
        {
            "large": {"model": family.large.model, "num_gpus": 2},
            "base": {"model": family.base.model},
            "experts": {},
        }
    )
    refused(family, "2 GPUs are needed, the cluster has 0", timeout_s=5)


def test_room_that_others_hold_is_waited_for_so_long_only(folder):
    @ray.remote(num_cpus=4)
    class Hog:
        def ready(self):
            return True

    hog = Hog.remote()
    ray.get(hog.ready.remote(), timeout=30)
    family = family_of(folder, experts=("math",), placement_timeout_s=1)
    refused(family, "needs 0.4 CPU, free are 0 CPU", error=EngineError)
    ray.kill(hog)


class Unloadable(ModelWorker):
    def load(self):
        import a_module_that_is_not_there

        return a_module_that_is_not_there


def test_a_worker_that_cannot_import_shows_its_traceback(folder):
    family = family_of(folder, experts=("math",))
    began = time.monotonic()
    with pytest.raises(EngineError, match="No module named 'a_module_that_is_not_there'") as caught:
        Engine(family, worker=Unloadable)
    assert time.monotonic() - began < 40
    assert "in load" in str(caught.value.__cause__)  # the worker's own traceback
    assert settled(lambda: not groups())


SCRIPT = """
import sys
from dlf_ray import Engine, Family, SamplingParams
with Engine(Family.from_yaml(sys.argv[1])) as engine:
    while True:  # a context is filled within a second
        for piece in engine.stream([5], SamplingParams(max_tokens=100_000, ignore_eos=True)):
            print("token", flush=True)
"""


@pytest.mark.parametrize(
    "end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name
)
def test_a_program_that_is_ended_leaves_nothing(folder, tmp_path, end):
    """A program of its own that generates on the cluster of these tests, which go on beside it."""
    lines = ["experts:", f"  math: {{model: {folder / 'math'}, num_cpus: 0.1}}"]
    lines += [f"{n}: {{model: {folder / n}, num_cpus: 0.1}}" for n in ("large", "base")]
    lines += ["engine: {num_cpus: 0.1, max_model_len: 512}"]
    file = tmp_path / "family.yaml"
    file.write_text("\n".join(lines))
    address = ray.get_runtime_context().gcs_address
    memory = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(file)],
        env={**os.environ, "RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "token\n"
    assert len(groups()) == 1
    process.send_signal(end)
    _, errors = process.communicate(timeout=30)
    if end == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
    assert settled(lambda: not groups())
    assert settled(lambda: not actors()), actors()
    assert set(os.listdir("/dev/shm")) <= memory
