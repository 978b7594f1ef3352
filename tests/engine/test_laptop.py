"""What a family file leaves open is settled by what there is: CPUs of a small machine, a GPU."""

import json
import logging
import os
import subprocess
import sys
import tempfile

import msgspec
import pytest
import ray
import yaml
from processes import TESTS

from dlf_ray import Family, LocalEngine
from dlf_ray.config import ExpertSpec
from dlf_ray.engine import placement
from dlf_ray.engine.capacity import Capacity, Node
from dlf_ray.engine.engine import _say_where_it_fuses
from dlf_ray.engine.placement import needs, settled, settled_expert
from dlf_ray.serving.app import FRONT_CPUS, Settings, _families, application

M = {"model": "some/model"}
PLAIN = Family.from_dict({"large": M, "base": M, "experts": {"math": M, "facts": M}})


def with_(large=(), base=(), engine=()):
    spec = {"large": {**M, **dict(large)}, "base": {**M, **dict(base)}, "engine": dict(engine)}
    return Family.from_dict({**spec, "experts": {"math": M}})


@pytest.fixture
def cluster(monkeypatch):
    """Sets what the cluster has, what is free of it, and what may come."""

    def made(*nodes, free=None, more=(), hidden=False):
        there = [Node({"CPU": cpus}) for cpus in nodes]
        now = [Node({"CPU": cpus}) for cpus in (nodes if free is None else free)]
        monkeypatch.setattr(placement, "present", lambda free=False: now if free else there)
        capacity = None if hidden else Capacity(there, more, len(more))
        monkeypatch.setattr(placement, "possible", lambda: capacity)

    return made


def cpus_of(family):
    return {name: need.resources["CPU"] for name, need in needs(family).items()}


def test_who_asks_for_nothing_has_a_cpu_where_there_are_enough(cluster):
    cluster(5)
    assert set(cpus_of(settled(PLAIN)).values()) == {1}
    assert set(cpus_of(PLAIN).values()) == {1}


@pytest.mark.parametrize(("cpus", "each"), [(1, 0.16), (2, 0.33), (4, 0.66)])
def test_a_small_machine_is_shared_with_room_for_one_more(cluster, caplog, cpus, each):
    cluster(cpus)
    caplog.set_level(logging.INFO)
    assert set(cpus_of(settled(PLAIN)).values()) == {each}
    assert f"5 actors share the CPUs of this machine: {each} for each" in caplog.text


def test_what_the_file_says_is_never_changed(cluster):
    cluster(2)
    family = with_(large={"num_cpus": 1}, engine={"num_cpus": 0.4})
    assert cpus_of(settled(family)) == {"coordinator": 0.4, "large": 1, "base": 0.2, "math": 0.2}
    greedy = with_(large={"num_cpus": 2})
    assert cpus_of(settled(greedy)) == {"coordinator": 1, "large": 2, "base": 1, "math": 1}


def test_copies_and_neighbours_have_their_part(cluster):
    cluster(2)
    assert set(cpus_of(settled(PLAIN, copies=2)).values()) == {0.16}
    assert set(cpus_of(settled(PLAIN, beside=0.2)).values()) == {0.3}


def test_larger_clusters_are_not_divided(cluster):
    one = {1}
    cluster(2, 2)
    assert set(cpus_of(settled(PLAIN)).values()) == one
    cluster(2, more=[(Node({"CPU": 4}), 1)])
    assert set(cpus_of(settled(PLAIN)).values()) == one
    cluster(2, hidden=True)
    assert set(cpus_of(settled(PLAIN)).values()) == one


def test_one_more_expert_has_what_is_free(cluster):
    expert = ExpertSpec(model="some/model")
    for free, each in ((3, 1), (0.334, 0.33), (0, 1)):
        cluster(4, free=[free])
        assert settled_expert(expert).num_cpus == each
    asked = msgspec.structs.replace(expert, num_cpus=2)
    assert settled_expert(asked) == asked


GPU = {"num_gpus": 1}


@pytest.mark.parametrize(
    ("family", "large", "coordinator"),
    [
        (with_(), 0, 0),
        (with_(large=GPU), 0.9, 0.1),
        (with_(large={"num_gpus": 0.4}, base={"num_gpus": 0.6}), 0.3, 0.1),
        (with_(large={"num_gpus": 0.1}), 0.05, 0.05),
        (with_(large={"num_gpus": 2}, base=GPU), 2, 0),  # Ray gives several as a whole only
        (with_(base=GPU), 0, 0),
        (with_(large=GPU, engine={"num_gpus": 0}), 1, 0),
        (with_(large=GPU, engine={"num_gpus": 0.3}), 1, 0.3),
        (with_(large=GPU, engine={"placement_strategy": "STRICT_SPREAD"}), 1, 0),
        (with_(large=GPU, engine={"resources": {"head": 1}}), 1, 0),
        (with_(large=GPU, engine={"label_selector": {"zone": "a"}}), 1, 0),
        (
            with_(large={**GPU, "resources": {"large": 0.1}}, engine={"resources": {"large": 0.1}}),
            *(0.9, 0.1),
        ),
    ],
)
def test_the_coordinator_has_a_share_of_the_large_models_gpu(family, large, coordinator):
    shared = family.with_gpu_share
    assert (shared.large.num_gpus, shared.engine.num_gpus) == (large, coordinator)
    assert shared.with_gpu_share == shared
    wanted = needs(family)
    assert wanted["large"].resources.get("GPU", 0) == large
    assert wanted["coordinator"].resources.get("GPU", 0) == coordinator


def test_where_the_coordinator_fuses_is_said(caplog):
    caplog.set_level(logging.INFO)
    _say_where_it_fuses(with_().with_gpu_share)
    assert not caplog.records
    _say_where_it_fuses(with_(large=GPU).with_gpu_share)
    assert "fuses on a GPU, of which it has 0.1" in caplog.text
    assert caplog.records[-1].levelno == logging.INFO
    for family in (with_(large={"num_gpus": 2}), with_(large=GPU, engine={"num_gpus": 0})):
        _say_where_it_fuses(family.with_gpu_share)
        assert caplog.records[-1].levelno == logging.WARNING
        assert "fuses on a CPU" in caplog.records[-1].message


def test_serve_settles_families_beside_each_other(cluster, tmp_path, monkeypatch):
    """Two families of four actors, a replica's own process each, and the ingress, on two CPUs."""
    cluster(2)
    files = [tmp_path / f"{name}.yaml" for name in ("one", "two")]
    for file in files:
        file.write_text(yaml.safe_dump({"large": M, "base": M, "experts": {"math": M}}))
    settings = Settings(families={file.stem: str(file) for file in files})
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    asked = [sum(cpus_of(family).values()) for family in _families(settings).values()]
    assert sum(asked) + 3 * FRONT_CPUS <= 2
    assert application(settings)
    scaled = Settings(
        families={"one": str(files[0])}, autoscaling_config={"min_replicas": 1, "max_replicas": 3}
    )
    (family,) = _families(scaled).values()
    assert 3 * (sum(cpus_of(family).values()) + FRONT_CPUS) + FRONT_CPUS <= 2
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # as in `serve build`
    assert [each.large.num_cpus for each in _families(settings).values()] == [None, None]


def bare(folder, tmp_path):
    """A family file that says which models there are, and nothing else."""
    file = tmp_path / "family.yaml"
    models = {name: {"model": str(folder / name)} for name in ("large", "base", "math", "facts")}
    experts = {name: models.pop(name) for name in ("math", "facts")}
    file.write_text(yaml.safe_dump({**models, "experts": experts}))
    return file


def test_a_local_engine_needs_no_numbers(folder, tmp_path):
    with LocalEngine(Family.from_yaml(bare(folder, tmp_path))) as engine:
        assert engine.generate([5])[0].token_ids


SMALL = """
import json, sys
import report
answer = report.apart()
import ray
from dlf_ray import Engine, Family
from processes import one_at_a_time

small = {"include_dashboard": False, "object_store_memory": 80_000_000}
with one_at_a_time():
    ray.init("local", num_cpus=2, log_to_driver=False, **small)
with Engine(Family.from_yaml(sys.argv[1])) as engine:
    before = engine.generate([5, 6])[0].token_ids
    engine.add_expert("prose", {"model": sys.argv[2]})
    answer({
        "tokens": before,
        "cpus": {name: spec.num_cpus for name, spec in engine.family.models.items()},
        "after": len(engine.generate([5, 6])[0].weights[0]),
    })
"""


def test_a_family_without_numbers_starts_on_two_cpus(folder, tmp_path):
    """A cluster of its own, on which five actors would ask for five CPUs; and one more joins."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(TESTS)
    with tempfile.TemporaryDirectory(prefix="r-") as short:  # sockets' paths are to be short
        done = subprocess.run(
            [sys.executable, "-c", SMALL, str(bare(folder, tmp_path)), str(folder / "prose")],
            env={**environment, "RAY_TMPDIR": short},
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["cpus"] == {
        **dict.fromkeys(("large", "base", "math", "facts"), 0.33),
        "prose": 0.35,
    }
    with LocalEngine(Family.from_yaml(bare(folder, tmp_path))) as local:
        assert told["tokens"] == local.generate([5, 6])[0].token_ids
    assert told["after"] == 3
