"""How an engine ends: cleanly, whether it was closed, interrupted, or could not start at all."""

import os
import signal
import sys
from pathlib import Path

import pytest
import ray
import tiny
from conftest import family_file, family_of
from processes import PATIENCE_S, actors, groups, refused, settled
from workers import Light, Unloadable

from dlf_ray import EngineError

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_nothing_is_left_after_the_end(engine_of, light_folder):
    engine = engine_of(family_of(light_folder, experts=("math",)), worker=Light)
    assert len(groups()) == 1
    engine.generate([5])
    engine.close()
    engine.close()  # twice is fine
    assert settled(lambda: not groups())
    assert settled(lambda: not actors()), actors()
    with pytest.raises(EngineError, match="closed"):
        engine.generate([5])


def refused_at_once(family, words):
    """Before any room is asked for."""
    before = set(ray.util.placement_group_table())
    refused(family, words)
    assert set(ray.util.placement_group_table()) == before


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
    refused_at_once(family, r"100\.3 CPUs are needed, the cluster has 4(.|\n)*coordinator: 100 CPU")
    family = type(family).from_dict(
        {
            "large": {"model": family.large.model, "num_gpus": 2},
            "base": {"model": family.base.model},
            "experts": {},
        }
    )
    refused_at_once(family, "2 GPUs are needed, the cluster has 0")


@pytest.fixture
def hog(ray_cluster):
    @ray.remote(num_cpus=4)
    class Hog:
        def ready(self):
            return True

    actor = Hog.remote()
    ray.get(actor.ready.remote(), timeout=PATIENCE_S)
    yield
    ray.kill(actor)


def test_room_that_others_hold_is_waited_for_so_long_only(hog, folder):
    family = family_of(folder, experts=("math",), placement_timeout_s=1)
    refused(family, "needs 0.4 CPU, free are 0 CPU", error=EngineError)


def test_a_worker_that_cannot_import_shows_its_traceback(light_folder):
    family = family_of(light_folder, experts=("math",))
    words = "No module named 'a_module_that_is_not_there'"
    error = refused(family, words, error=EngineError, worker=Unloadable)
    assert "in load" in str(error.__cause__)  # the worker's own traceback


SCRIPT = """
import sys
from dlf_ray import Engine, Family, SamplingParams
from workers import Light
with Engine(Family.from_yaml(sys.argv[1]), worker=Light) as engine:
    while True:  # a context is filled within a second
        for piece in engine.stream([5], SamplingParams(max_tokens=100_000, ignore_eos=True)):
            print("token", flush=True)
"""


def mapped(name):
    """Whether a process works with a file of the shared memory."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if f"/dev/shm/{name}" in maps.read_text():
                return True
        except OSError:  # the process has ended, or is not ours
            continue
    return False


def left_in_memory(before):
    """Files of the shared memory that are new and nobody's; other clusters have theirs there."""
    return [name for name in set(os.listdir("/dev/shm")) - before if not mapped(name)]


@pytest.mark.parametrize(
    "end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name
)
def test_a_program_that_is_ended_leaves_nothing(program, light_folder, tmp_path, end):
    """A program of its own that generates on the cluster of these tests, which go on beside it."""
    file = family_file(light_folder, tmp_path / "family.yaml", ("math",), max_model_len=512)
    memory = set(os.listdir("/dev/shm"))
    address = ray.get_runtime_context().gcs_address
    process = program(
        sys.executable, "-c", SCRIPT, file, env={**os.environ, "RAY_ADDRESS": address}
    )
    assert process.stdout.readline() == "token\n"
    assert len(groups()) == 1
    process.send_signal(end)
    _, errors = process.communicate(timeout=PATIENCE_S)
    if end == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
    assert settled(lambda: not groups())
    assert settled(lambda: not actors()), actors()
    assert settled(lambda: not left_in_memory(memory)), left_in_memory(memory)
