"""Processes die while an engine runs: that costs time, and never an answer.

One engine for most of it: that it serves the next test is part of what is tested.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

import psutil
import pytest
from conftest import family_of, prompts_of
from processes import PATIENCE_S, actors, alive, below, groups, settled
from workers import CROWD, DOOM, Mortal, MortalModel, beside, light_model

from dlf_ray import Engine, EngineError, SamplingParams

pytestmark = pytest.mark.usefixtures("ray_cluster")

LONG = SamplingParams(max_tokens=60, ignore_eos=True)
FEW = SamplingParams(max_tokens=3, ignore_eos=True)


def pid(engine, name):
    return int(beside(engine.family.models[name], "pid").read_text())


def doom(engine, name, times=1):
    """The model's process dies at its next steps with the token of doom."""
    beside(engine.family.models[name], "doom").write_text(str(times))


@contextlib.contextmanager
def told(engine, name, what, value=""):
    """Meanwhile a model is "closed", or "held" at a position."""
    file = beside(engine.family.models[name], what)
    file.write_text(str(value))
    try:
        yield
    finally:
        file.unlink()


def kill(engine, *names, number=signal.SIGKILL):
    for name in names:
        os.kill(pid(engine, name), number)


def recoveries(engine, count):
    """The losses since the last `count` recoveries."""
    found = engine.timings().recoveries[count:]
    print(", ".join(f"{r.model} {r.reason} {r.seconds:.1f} s" for r in found))
    return {(each.model, each.reason) for each in found}


def kill_amid(engine, prompt, *victims):
    """The tokens and text of a stream after whose 20th token the victims die."""
    stream = engine.stream(prompt, LONG)
    with told(engine, "large", "held", len(prompt) + 19):
        pieces = list(itertools.islice(stream, 20))
        assert sum(len(piece.token_ids) for piece in pieces) == 20
        kill(engine, *victims)
    pieces += stream
    tokens = [token for piece in pieces for token in piece.token_ids]
    return tokens, "".join(piece.text for piece in pieces)


@contextlib.contextmanager
def asked_meanwhile(engine, *args, **options):
    """Somebody asks the same again and again; yields the answers."""
    over, answers = threading.Event(), []

    def ask():
        while not over.is_set():
            answers.extend(engine.generate(*args, **options))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield answers
    finally:
        over.set()
        asking.join(PATIENCE_S)
    assert not asking.is_alive()


@pytest.fixture(scope="module")
def engine(ray_cluster, light_folder):
    family = family_of(
        light_folder, experts=("math", "facts"), max_num_batched_tokens=24, step_timeout_s=10
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
    assert kill_amid(engine, prompts[0], *victims) == (expected[0].token_ids, expected[0].text)
    assert recoveries(engine, before) == {(name, "died") for name in victims}


def test_real_models_killed_while_decoding(engine_of, folder, prompts):
    """Checkpoints that are loaded again, caches that are filled again; in the middle of prompts as
    well, which lie beside the one that is decoded."""
    family = family_of(folder, experts=("math",), max_num_batched_tokens=24)
    engine = engine_of(family, worker=MortalModel)
    expected = engine.generate(prompts, LONG)
    answer = kill_amid(engine, prompts[0], "large", "math")
    assert answer == (expected[0].token_ids, expected[0].text)
    doom(engine, "base")
    assert [o.token_ids for o in engine.generate(prompts, LONG)] == [o.token_ids for o in expected]
    victims = {(name, "died") for name in ("large", "math", "base")}
    assert recoveries(engine, 0) == victims


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


def test_who_does_not_need_the_lost_model_does_not_wait(engine, prompts, expected):
    """The other's model is held back until they have their answer."""
    before = len(engine.timings().recoveries)
    answers = []
    waiting = threading.Thread(target=lambda: answers.extend(engine.generate(prompts[0], LONG)))
    with told(engine, "facts", "closed"):
        kill(engine, "facts")
        waiting.start()
        (output,) = engine.generate(prompts[0], FEW, experts=["math"])
        assert (output.error, len(output.token_ids)) == (None, FEW.max_tokens)
        assert waiting.is_alive()
    waiting.join(PATIENCE_S)
    assert [output.token_ids for output in answers] == [expected[0].token_ids]
    assert recoveries(engine, before) == {("facts", "died")}


def test_a_process_that_hangs_is_killed_and_replaced(engine, prompts, expected):
    before = len(engine.timings().recoveries)
    hung = pid(engine, "math")
    kill(engine, "math", number=signal.SIGSTOP)
    (output,) = engine.generate(prompts[0], LONG)
    assert output.token_ids == expected[0].token_ids
    # A heartbeat that stays away may be noticed before the step that does.
    assert recoveries(engine, before) in ({("math", "hung")}, {("math", "died")})
    assert settled(lambda: not alive(hung))


def test_memory_that_runs_out_delays_the_youngest(engine, prompts, expected):
    crowd = [[CROWD, n] for n in range(3)]
    before = len(engine.timings().recoveries)
    outputs = engine.generate([prompts[0], *crowd], LONG)
    assert [output.error for output in outputs] == [None] * 4
    assert outputs[0].token_ids == expected[0].token_ids
    assert recoveries(engine, before) == {("math", "out of memory")}


def test_experts_come_and_go_while_others_are_served(
    request, engine, light_folder, prompts, expected
):
    spec = {"model": str(light_folder / "prose"), "num_cpus": 0.1}
    with pytest.raises(ValueError, match="has a model 'math' already"):
        engine.add_expert("math", spec)
    with pytest.raises(ValueError, match="cannot name an expert"):
        engine.add_expert("a/b", spec)
    with pytest.raises(ValueError, match="nowhere"):
        engine.add_expert("prose", {**spec, "model": str(light_folder / "nowhere")})
    light_model(light_folder / "other", vocab=310)
    with pytest.raises(ValueError, match=r"large.*prose"):
        engine.add_expert("prose", {**spec, "model": str(light_folder / "other")})
    assert settled(lambda: len(groups()) == 1)
    assert list(engine.family.experts) == list(engine.limits.experts) == ["math", "facts"]

    request.addfinalizer(lambda: "prose" in engine.family.experts and engine.remove_expert("prose"))
    with asked_meanwhile(engine, prompts[0], LONG, experts=["math", "facts"]) as running:
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
    assert {tuple(o.token_ids) for o in running} == {tuple(expected[0].token_ids)}
    assert settled(lambda: len(groups()) == 1)
    with pytest.raises(ValueError, match="no expert 'prose'"):
        engine.remove_expert("prose")
    engine.add_expert("prose", spec)  # the name is free again
    assert engine.generate(prompts[0], LONG)[0].token_ids == three.token_ids
    engine.remove_expert("prose")


def test_two_engines_of_one_cluster_do_not_meet(engine, engine_of, light_folder, prompts, expected):
    """Nor does the end of one, with a worker that is just being restarted, touch the other."""
    other = engine_of(family_of(light_folder, experts=("prose",)), worker=Mortal)
    assert len(groups()) == 2
    kill(other, "prose")
    other.close()
    assert settled(lambda: len(groups()) == 1)
    assert settled(lambda: len(actors()) == 5), actors()
    assert engine.generate(prompts[0], LONG)[0].token_ids == expected[0].token_ids


def test_an_expert_that_cannot_come_back(engine_of, light_folder, tmp_path, prompts):
    """Under `drop` the family goes on without it; else the engine ends, and says why."""
    root = shutil.copytree(light_folder, tmp_path / "family")
    family = family_of(root, experts=("math", "facts"), on_expert_loss="drop")
    engine = engine_of(family, worker=Mortal)
    (expected,) = engine.generate(prompts[0], LONG)
    tokens, lost = [], []
    stream = engine.stream(prompts[0], LONG)
    with told(engine, "math", "closed"), told(engine, "facts", "closed"):
        with told(engine, "large", "held", len(prompts[0]) + 19):
            pieces = list(itertools.islice(stream, 20))
            kill(engine, "math", "facts")
        for piece in itertools.chain(pieces, stream):
            tokens += piece.token_ids
            lost.append(piece.lost)
    assert tokens[:20] == expected.token_ids[:20]
    assert lost[0] == []
    assert ["math", "facts"] in lost
    assert len(tokens) == 60
    # They are waited for where nobody else can answer.
    (output,) = engine.generate(prompts[0], FEW, alone="math")
    assert (output.error, len(output.token_ids)) == (None, FEW.max_tokens)
    (output,) = engine.generate(prompts[0], LONG, experts=["math"])
    assert output.lost == []
    shutil.rmtree(root / "math")
    kill(engine, "math")
    (output,) = engine.generate(prompts[0], FEW, alone="math")
    assert f"{root / 'math'} is not there" in output.error
    (output,) = engine.generate(prompts[0], LONG, experts=["math"])
    assert output.lost == ["math"]
    assert {weights["math"] for weights in output.weights} == {0.0}


def test_a_large_model_that_cannot_come_back_ends_the_engine(engine_of, folder, tmp_path, prompts):
    for name in ("base", "math"):
        (tmp_path / name).symlink_to(folder / name)
    shutil.copytree(folder / "large", tmp_path / "large")
    engine = engine_of(family_of(tmp_path, experts=("math",)), worker=MortalModel)
    assert engine.generate(prompts[0], FEW)[0].error is None
    shutil.rmtree(tmp_path / "large")
    kill(engine, "large")
    with pytest.raises(EngineError, match=r"(?s)'large'.*neither a folder"):
        engine.generate(prompts[0], LONG)


def test_the_death_of_the_coordinator_fails_everything_at_once(engine_of, light_folder, prompts):
    engine = engine_of(family_of(light_folder, experts=("math",)), worker=Mortal)
    stream = engine.stream(prompts[0], SamplingParams(max_tokens=10_000, ignore_eos=True))
    next(stream)
    # The newest is ours.
    max(below("ray::CoordinatorActor"), key=psutil.Process.create_time).kill()
    with pytest.raises(EngineError, match="the coordinator died"):
        for _ in stream:
            pass
    with pytest.raises(EngineError, match="the coordinator died"):
        engine.generate(prompts[0])


NODES = """
import itertools
import sys
import report
answer = report.apart()
import ray
from ray.cluster_utils import Cluster
from conftest import family_of
from pathlib import Path
from dlf_ray import Engine, SamplingParams
from processes import alive, one_at_a_time, settled
from workers import Mortal, beside

small = {"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False}
with one_at_a_time():
    cluster = Cluster(initialize_head=True, head_node_args=small)
    nodes = [cluster.add_node(**small) for _ in range(2)]
    ray.init(cluster.address, log_to_driver=False)
sampling = SamplingParams(max_tokens=60, ignore_eos=True)
family = family_of(Path(sys.argv[1]), experts=("math",), placement_strategy="SPREAD")
with Engine(family, worker=Mortal) as engine:
    places = lambda: list(next(iter(ray.util.placement_group_table().values()))[
        "bundles_to_node_id"].values())
    expected = engine.generate([5, 6], sampling)[0].token_ids
    before = places()
    (lost, *_) = [n for n in nodes if n.node_id in before[1:] and n.node_id != before[0]]
    held = beside(family.large, "held")
    held.write_text("21")
    stream = engine.stream([5, 6], sampling)
    pieces = list(itertools.islice(stream, 20))
    there = [int(beside(spec, "pid").read_text()) for node, spec in zip(
        before[1:], family.models.values(), strict=True) if node == lost.node_id]
    cluster.remove_node(lost, allow_graceful=False)
    gone = settled(lambda: not any(map(alive, there)))
    held.unlink()
    pieces += stream
    answer({
        "gone": [len(there), gone],
        "same": [token for piece in pieces for token in piece.token_ids] == expected,
        "moved": [a != b for a, b in zip(before, places())],
        "left": lost.node_id in places(),
        "recoveries": [[r.model, r.reason, r.seconds] for r in engine.timings().recoveries],
    })
ray.shutdown()
cluster.shutdown()
"""


def test_a_node_that_disappears(light_folder):
    """Its models are placed and loaded elsewhere. A cluster of its own, on one machine."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory(prefix="r-") as short:  # sockets' paths are to be short
        done = subprocess.run(
            [sys.executable, "-c", NODES, str(light_folder)],
            env={**environment, "RAY_TMPDIR": short},
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE_S,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout)
    print(answer)
    models, gone = answer["gone"]
    assert models > 0
    assert gone
    assert answer["same"]
    assert any(answer["moved"][1:])
    assert not answer["left"]
    assert len(answer["recoveries"]) == sum(answer["moved"][1:])
