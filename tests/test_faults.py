"""Processes die while an engine runs: that costs time, and never an answer.

One engine for most of it: that it serves the next test is part of what is tested.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from conftest import family_of
from test_ends import actors, groups, settled
from test_local import prompts_of

from dlf_ray import Engine, EngineError, SamplingParams
from dlf_ray.worker import ModelWorker

pytestmark = pytest.mark.usefixtures("ray_cluster")

DOOM, CROWD = 298, 299
LONG = SamplingParams(max_tokens=60, ignore_eos=True)
PATIENCE_S = 120.0


class Mortal(ModelWorker):
    """Its process leaves its number beside the model, and dies where a file there says so."""

    def load(self):
        Path(f"{self.spec.model}.pid").write_text(str(os.getpid()))
        return super().load()

    def compute(self, plan):
        doom = Path(f"{self.spec.model}.doom")
        if DOOM in plan.tokens and doom.exists():
            lives = int(doom.read_text())
            doom.write_text(str(lives - 1)) if lives > 1 else doom.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if CROWD in plan.tokens and len(plan.slots) > 2 and "math" in self.spec.model:
            raise torch.OutOfMemoryError("no room")
        time.sleep(0.01)  # so that there is a middle of a generation
        return super().compute(plan)


def pid(engine, name):
    return int(Path(f"{engine.family.models[name].model}.pid").read_text())


def doom(engine, name, times=1):
    """The model's process dies at its next steps with the token of doom."""
    Path(f"{engine.family.models[name].model}.doom").write_text(str(times))


def kill(engine, *names, number=signal.SIGKILL):
    for name in names:
        os.kill(pid(engine, name), number)


def recoveries(engine, count):
    """The losses since the last `count` recoveries."""
    found = engine.timings().recoveries[count:]
    print(", ".join(f"{r.model} {r.reason} {r.seconds:.1f} s" for r in found))
    return {(each.model, each.reason) for each in found}


@pytest.fixture(scope="module")
def engine(ray_cluster, folder):
    family = family_of(
        folder, experts=("math", "facts"), max_num_batched_tokens=24, step_timeout_s=10
    )
    with Engine(family, worker=Mortal) as made:
        yield made


@pytest.fixture(scope="module")
def prompts():
    """The second with the token of doom in its middle."""
    (short, long) = prompts_of(2, longest=100, seed=5)
    assert DOOM not in short + long
    return [[*short, 7, 8], [*long[:60], DOOM, *long[60:]]]


@pytest.fixture(scope="module")
def expected(engine, prompts):
    """What is generated while nothing happens."""
    return engine.generate(prompts, LONG)


@pytest.mark.parametrize(
    "victims", [("math",), ("base",), ("large", "facts", "math")], ids=" ".join
)
def test_killed_while_decoding(engine, prompts, expected, victims):
    """A stream goes on where it was, and repeats nothing."""
    before = len(engine.timings().recoveries)
    tokens, text = [], ""
    for piece in engine.stream(prompts[0], LONG):
        tokens += piece.token_ids
        text += piece.text
        if len(tokens) == 20:
            kill(engine, *victims)
    assert tokens == expected[0].token_ids
    assert text == expected[0].text
    assert recoveries(engine, before) == {(name, "died") for name in victims}


def test_killed_in_the_middle_of_a_prompt_and_again_while_catching_up(engine, prompts, expected):
    before = len(engine.timings().recoveries)
    doom(engine, "math", times=2)
    doom(engine, "large")
    outputs = engine.generate(prompts, LONG)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert recoveries(engine, before) == {("math", "died"), ("large", "died")}


def test_killed_while_idle(engine, prompts, expected):
    """Before anybody knows, and after the restart."""
    kill(engine, "facts")
    (output,) = engine.generate(prompts[0], LONG)
    assert output.token_ids == expected[0].token_ids
    old = pid(engine, "base")
    kill(engine, "base")
    assert settled(lambda: pid(engine, "base") != old, PATIENCE_S)
    (output,) = engine.generate(prompts[0], LONG)
    assert output.token_ids == expected[0].token_ids


def test_who_does_not_need_the_lost_model_does_not_wait(engine, prompts):
    kill(engine, "facts")
    began = time.monotonic()
    loss = threading.Thread(target=engine.generate, args=(prompts[0], LONG))
    loss.start()
    assert engine.generate(prompts[0], SamplingParams(max_tokens=3), experts=["math"])
    answered = time.monotonic() - began
    loss.join(PATIENCE_S)
    assert answered < (time.monotonic() - began) / 2


def test_a_process_that_hangs_is_killed_and_replaced(engine, prompts, expected):
    before = len(engine.timings().recoveries)
    hung = pid(engine, "math")
    kill(engine, "math", number=signal.SIGSTOP)
    (output,) = engine.generate(prompts[0], LONG)
    assert output.token_ids == expected[0].token_ids
    assert recoveries(engine, before) <= {("math", "hung"), ("math", "died")}  # with heartbeats
    assert settled(lambda: not psutil.pid_exists(hung))


def test_memory_that_runs_out_delays_the_youngest(engine, prompts, expected):
    crowd = [[CROWD, n] for n in range(3)]
    before = len(engine.timings().recoveries)
    outputs = engine.generate([prompts[0], *crowd], LONG)
    assert [output.error for output in outputs] == [None] * 4
    assert outputs[0].token_ids == expected[0].token_ids
    assert recoveries(engine, before) == {("math", "out of memory")}


def test_experts_come_and_go_while_others_are_served(engine, folder, prompts, expected):
    spec = {"model": str(folder / "prose"), "num_cpus": 0.1}
    with pytest.raises(ValueError, match="has a model 'math' already"):
        engine.add_expert("math", spec)
    with pytest.raises(ValueError, match="cannot name an expert"):
        engine.add_expert("a/b", spec)
    with pytest.raises(ValueError, match="nowhere"):
        engine.add_expert("prose", {**spec, "model": str(folder / "nowhere")})
    tiny.model(folder / "other", vocab=310)
    with pytest.raises(ValueError, match=r"large.*prose"):
        engine.add_expert("prose", {**spec, "model": str(folder / "other")})
    assert settled(lambda: len(groups()) == 1)
    assert list(engine.family.experts) == list(engine.limits.experts) == ["math", "facts"]

    served = threading.Event()
    running = []

    def serve():
        while not served.is_set():
            running.append(engine.generate(prompts[0], LONG, experts=["math", "facts"])[0])

    thread = threading.Thread(target=serve)
    thread.start()
    engine.add_expert("prose", spec)
    (three,) = engine.generate(prompts[0], LONG)
    assert set(three.weights[0]) == {"math", "facts", "prose"}
    kill(engine, "prose")  # it is restarted like any other
    (again,) = engine.generate(prompts[0], LONG)
    assert again.token_ids == three.token_ids
    stream = engine.stream(prompts[0], LONG, experts=["prose"])
    next(stream)
    removal = threading.Thread(target=engine.remove_expert, args=("prose",))
    removal.start()
    assert settled(lambda: "prose" not in engine.limits.experts)
    with pytest.raises(ValueError, match="no expert 'prose'"):
        engine.generate(prompts[0], experts=["prose"])
    assert sum(len(piece.token_ids) for piece in stream) == LONG.max_tokens - 1
    removal.join(PATIENCE_S)
    assert not removal.is_alive()
    served.set()
    thread.join(PATIENCE_S)
    assert {tuple(o.token_ids) for o in running} == {tuple(expected[0].token_ids)}
    assert settled(lambda: len(groups()) == 1)
    with pytest.raises(ValueError, match="no expert 'prose'"):
        engine.remove_expert("prose")
    engine.add_expert("prose", spec)  # the name is free again
    assert engine.generate(prompts[0], LONG)[0].token_ids == three.token_ids
    engine.remove_expert("prose")


def test_two_engines_of_one_cluster_do_not_meet(engine, folder, prompts, expected):
    """Nor does the end of one, with a worker that is just being restarted, touch the other."""
    other = Engine(family_of(folder, experts=("prose",)), worker=Mortal)
    assert len(groups()) == 2
    kill(other, "prose")
    other.close()
    assert settled(lambda: len(groups()) == 1)
    assert settled(lambda: len(actors()) == 5), actors()
    assert engine.generate(prompts[0], LONG)[0].token_ids == expected[0].token_ids


def test_an_expert_that_cannot_come_back(folder, tmp_path, prompts):
    """Under `drop` the family goes on without it; else the engine ends, and says why."""
    for name in ("math", "facts"):
        shutil.copytree(folder / name, tmp_path / name)
    for name in ("large", "base"):
        (tmp_path / name).symlink_to(folder / name)
    family = family_of(tmp_path, experts=("math", "facts"), on_expert_loss="drop")
    with Engine(family, worker=Mortal) as engine:
        (expected,) = engine.generate(prompts[0], LONG)
        tokens, lost = [], []
        for piece in engine.stream(prompts[0], LONG):
            tokens += piece.token_ids
            lost.append(piece.lost)
            if len(tokens) == 20:
                kill(engine, "math", "facts")
        assert tokens[:20] == expected.token_ids[:20]
        assert lost[0] == []
        assert ["math", "facts"] in lost
        assert len(tokens) == 60
        # They are waited for where nobody else can answer.
        assert engine.generate(prompts[0], SamplingParams(max_tokens=2), alone="math")
        (output,) = engine.generate(prompts[0], LONG, experts=["math"])
        assert output.lost == []
        shutil.rmtree(tmp_path / "math")
        kill(engine, "math")
        (output,) = engine.generate(prompts[0], SamplingParams(max_tokens=2), alone="math")
        assert "math" in output.error
        assert "is neither a folder" in output.error
        (output,) = engine.generate(prompts[0], LONG, experts=["math"])
        assert output.lost == ["math"]
        assert {weights["math"] for weights in output.weights} == {0.0}


def test_a_large_model_that_cannot_come_back_ends_the_engine(folder, tmp_path, prompts):
    for name in ("base", "math"):
        (tmp_path / name).symlink_to(folder / name)
    shutil.copytree(folder / "large", tmp_path / "large")
    with Engine(family_of(tmp_path, experts=("math",)), worker=Mortal) as engine:
        engine.generate(prompts[0])
        shutil.rmtree(tmp_path / "large")
        kill(engine, "large")
        with pytest.raises(EngineError, match=r"(?s)'large'.*neither a folder"):
            engine.generate(prompts[0], LONG)


def test_the_death_of_the_coordinator_fails_everything_at_once(folder, prompts):
    engine = Engine(family_of(folder, experts=("math",)), worker=Mortal)  # it takes its time
    stream = engine.stream(prompts[0], SamplingParams(max_tokens=10_000, ignore_eos=True))
    next(stream)
    # The newest is ours.
    coordinators = [
        each
        for each in psutil.process_iter(["cmdline", "create_time"])
        if "ray::CoordinatorActor" in " ".join(each.info["cmdline"] or ())
    ]
    process = max(coordinators, key=lambda each: each.info["create_time"])
    process.kill()
    with pytest.raises(EngineError, match="the coordinator died"):
        for _ in stream:
            pass
    with pytest.raises(EngineError, match="the coordinator died"):
        engine.generate(prompts[0])
    engine.close()


NODES = """
import sys
import report
answer = report.apart()
import ray
from ray.cluster_utils import Cluster
from conftest import family_of
from pathlib import Path
from dlf_ray import Engine, SamplingParams
from test_faults import Mortal

small = {"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=small)
nodes = [cluster.add_node(**small) for _ in range(2)]
ray.init(cluster.address, log_to_driver=False)
sampling = SamplingParams(max_tokens=240, ignore_eos=True)  # longer than a node takes to die
family = family_of(Path(sys.argv[1]), experts=("math",), placement_strategy="SPREAD")
with Engine(family, worker=Mortal) as engine:
    places = lambda: list(next(iter(ray.util.placement_group_table().values()))[
        "bundles_to_node_id"].values())
    expected = engine.generate([5, 6], sampling)[0].token_ids
    before, tokens = places(), []
    (lost, *_) = [n for n in nodes if n.node_id in before[1:] and n.node_id != before[0]]
    for piece in engine.stream([5, 6], sampling):
        tokens += piece.token_ids
        if len(tokens) == 20:
            cluster.remove_node(lost, allow_graceful=False)
    answer({
        "same": tokens == expected,
        "moved": [a != b for a, b in zip(before, places())],
        "left": lost.node_id in places(),
        "recoveries": [[r.model, r.reason, r.seconds] for r in engine.timings().recoveries],
    })
ray.shutdown()
cluster.shutdown()
"""


def test_a_node_that_disappears(folder):
    """Its models are placed and loaded elsewhere. A cluster of its own, on one machine."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory(prefix="r-") as short:  # sockets' paths are to be short
        done = subprocess.run(
            [sys.executable, "-c", NODES, str(folder)],
            env={**environment, "RAY_TMPDIR": short},
            capture_output=True,
            text=True,
            timeout=280,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    print(told)
    assert told["same"]
    assert any(told["moved"][1:])
    assert not told["left"]
    assert len(told["recoveries"]) == sum(told["moved"][1:])
