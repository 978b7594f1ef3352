"""What a family asks of the cluster, and what it is told where that cannot be had."""

import logging
import time

import msgspec
import pytest
import ray
from conftest import family_of
from processes import PATIENCE_S, settled
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import AutoscalingState

from dlf_ray import Engine, EngineError
from dlf_ray.engine import capacity, placement
from dlf_ray.engine.capacity import Capacity, Need, Node, fits, limits, matches
from dlf_ray.engine.placement import needs, resources


def need(cpus, gpus=0, selector=(), **custom):
    return Need({"CPU": cpus, "GPU": gpus, **custom}, dict(selector))


def node(cpus, gpus=0, labels=(), **custom):
    return Node({"CPU": cpus, "GPU": gpus, **custom}, dict(labels))


PACK, SPREAD = "STRICT_PACK", "STRICT_SPREAD"


@pytest.mark.parametrize(
    ("wanted", "nodes", "strategy", "fit"),
    [
        ([need(1, 0.3)] * 3, [node(3, 1)], "PACK", True),  # fractions share a GPU
        ([need(1, 0.3)] * 4, [node(4, 1)], "PACK", False),
        ([need(0.1)] * 3, [node(0.3)], "PACK", True),  # 0.1 + 0.1 + 0.1 > 0.3 in floats
        ([need(1, 2)], [node(4, 1), node(4, 1)], "PACK", False),  # enough, but on two nodes
        ([need(2), need(2), need(3), need(3)], [node(5), node(5)], "PACK", True),
        # The largest first, into the first that has room, fails here: 4+3 leaves no 3 elsewhere.
        ([need(n) for n in (4, 3, 3, 2, 2, 2)], [node(8), node(8)], "PACK", True),
        ([need(n) for n in (6, 4, 4, 3, 3)], [node(10), node(10)], "PACK", True),
        ([need(n) for n in (5, 5, 5)], [node(8), node(8)], "PACK", False),
        ([need(1)] * 2, [node(8)], SPREAD, False),
        ([need(1)] * 2, [node(1), node(1)], SPREAD, True),
        ([need(1), need(4)], [node(4), node(1)], SPREAD, True),
        ([need(2), need(4)], [node(4), node(1)], SPREAD, False),
        ([need(1)] * 2, [node(1), node(1)], PACK, False),
        ([need(1), need(1, 0.5)], [node(2), node(2, 1)], PACK, True),
        ([need(1, rack=1)], [node(4)], "PACK", False),
        ([need(1, rack=0.5)] * 2, [node(4, rack=1)], "PACK", True),
        ([need(1, selector={"zone": "a"})], [node(4)], "PACK", False),
        ([need(1, selector={"zone": "a"})], [node(4, labels={"zone": "a"})], "PACK", True),
    ],
)
def test_whether_needs_can_be_divided_over_nodes(wanted, nodes, strategy, fit):
    assert fits(wanted, Capacity(nodes), strategy) is fit


def test_nodes_that_may_come_count_up_to_their_limits():
    head, large, small = node(1), node(4, 1), node(2)
    wanted = [need(1), need(4, 1), need(2), need(2)]
    assert not fits(wanted, Capacity([head]), "PACK")
    assert fits(wanted, Capacity([head], [(large, 1), (small, 2)], 3), "PACK")
    assert not fits(wanted, Capacity([head], [(large, 1), (small, 1)], 3), "PACK")
    assert not fits(wanted, Capacity([head], [(large, 1), (small, 2)], 2), "PACK")
    assert fits(wanted, Capacity([head], [(large, 1), (small, 2)], 3), SPREAD)


def test_what_would_take_for_ever_to_find_out_is_not_refused():
    wanted = [need(3 + i / 100) for i in range(40)]
    began = time.process_time()
    assert fits(wanted, Capacity([node(10 + i / 100) for i in range(13)]), "PACK")
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    ("selector", "fit"),
    [
        ("a", True),
        ("b", False),
        ("!a", False),
        ("!b", True),
        ("in(a, b)", True),
        ("in(b,c)", False),
        ("!in(a,b)", False),
        ("!in(b,c)", True),
    ],
)
def test_labels_are_selected_as_ray_does(selector, fit):
    assert matches({"zone": "a"}, {"zone": selector}) is fit
    assert matches({}, {"zone": selector}) is selector.startswith("!")


CONFIG = {
    "max_workers": 3,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 1}},
        "large": {"resources": {"CPU": 4}, "labels": {"size": "large"}, "max_workers": 2},
        "small": {"resources": {"CPU": 2}},
    },
}


def test_the_limits_of_an_autoscaler():
    there = [Node({"CPU": 1}), Node({"CPU": 4}, type="large")]
    found = limits(CONFIG, there)
    assert [(node.type, count) for node, count in found.more] == [("large", 1), ("small", 3)]
    assert found.more[0][0].labels == {"size": "large"}
    assert found.max_more == 2
    types = {**CONFIG["available_node_types"], "some": {"max_workers": 1}}
    assert limits({**CONFIG, "available_node_types": types}, there) is None


def changed(family, model="large", engine=(), **options):
    spec = msgspec.structs.replace(getattr(family, model), **options)
    settings = msgspec.structs.replace(family.engine, **dict(engine))
    return msgspec.structs.replace(family, **{model: spec, "engine": settings})


def test_bundles_say_all_that_a_family_file_asks_for(folder):
    asked = {"memory": 2**30, "accelerator_type": "A10G", "resources": {"rack": 1}, "num_gpus": 1}
    family = changed(family_of(folder, experts=()), **asked, label_selector={"zone": "a"})
    assert resources(family)["large"] == {
        **{"CPU": 0.1, "GPU": 1, "memory": 2**30, "accelerator_type:A10G": 0.001, "rack": 1}
    }
    assert resources(family)["base"] == {"CPU": 0.1}
    assert needs(family)["large"].label_selector == {"zone": "a"}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_gpus": 1}, "1 GPUs are needed, the cluster has 0"),
        ({"accelerator_type": "A1000"}, r"large: .*'A1000'.*A100, .*H100"),
        ({"accelerator_type": "A100"}, "no node has a GPU of the type A100"),
        ({"resources": {"rack": 1}}, "1 racks are needed, the cluster has 0"),
        ({"memory": 2**50}, r"no node has room for large \(0.1 CPU, .* GiB memory\)"),
        ({"label_selector": {"zone": "a"}}, r"no node has room for large \(0.1 CPU, zone=a\)"),
        ({"engine": {"placement_strategy": SPREAD}}, "STRICT_SPREAD needs 4 nodes, the clu.* 1"),
    ],
)
def test_what_no_node_has_is_refused_at_once(folder, options, words):
    before = set(ray.util.placement_group_table())
    with pytest.raises(ValueError, match=words) as caught:
        Engine(changed(family_of(folder, experts=("math",)), **options))
    assert set(ray.util.placement_group_table()) == before  # no room was asked for
    if "A1000" not in str(caught.value):
        for line in ("coordinator: 0.1 CPU", "math: 0.1 CPU", "1 with 4 CPU"):
            assert f"\n  {line}" in str(caught.value)


def test_what_is_needed_is_said_before_anything_starts(ray_cluster, folder, caplog):
    family = family_of(folder, experts=("math",))
    with caplog.at_level(logging.INFO, "dlf_ray"):
        placement.check_cluster(needs(family), "PACK")
    for words in (
        "has room for the family",
        "coordinator: 0.1 CPU",
        "math: 0.1 CPU",
        "1 with 4 CPU",
    ):
        assert words in caplog.text


@pytest.fixture
def hog(ray_cluster):
    @ray.remote(num_cpus=3.8)
    class Hog:
        def ready(self):
            return True

    actor = Hog.remote()
    ray.get(actor.ready.remote(), timeout=PATIENCE_S)
    yield
    ray.kill(actor)


def test_who_waits_is_told_for_what(folder, hog, caplog, monkeypatch):
    monkeypatch.setattr(placement, "FIRST_WORD_S", 0.5)
    family = family_of(folder, experts=("math",), placement_timeout_s=2)
    words = r"no place for base \(0.1 CPU\), math \(0.1 CPU\)"
    with pytest.raises(EngineError, match=words):
        Engine(family)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "waiting for room, 1 of 2 s: the family needs 0.4 CPU, free are 0.2 CPU" in caplog.text
    assert "no place for base (0.1 CPU), math (0.1 CPU)" in caplog.text


def test_hidden_limits_of_an_autoscaler_are_waited_for(folder, hog, caplog, monkeypatch):
    """As in Kubernetes, where the head's container has no process of the autoscaler."""

    def nothing():
        raise LookupError

    monkeypatch.setattr(capacity, "autoscaler_config", nothing)
    assert settled(capacity._report)  # the autoscaler's first one, some seconds after its start
    family = family_of(folder, experts=("math",), num_cpus=5, placement_timeout_s=0.5)
    with pytest.raises(EngineError, match=r"no place for coordinator \(5 CPU\)"):
        Engine(family)
    assert "cannot be read here, so they are waited for" in caplog.text


def test_nodes_on_their_way_are_told_by_either_autoscaler(ray_cluster, monkeypatch):
    """The first keeps a report in the cluster's store, the second one tells the head itself."""
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    state = AutoscalingState(autoscaler_state_version=1)
    state.pending_instance_requests.add(ray_node_type_name="gpu", count=2)
    report = {"pending_launches": {"gpu": 1}, "pending_nodes": [["1.2.3.4", "cpu", "setting-up"]]}
    monkeypatch.setattr(capacity, "_report", lambda: report)
    state.infeasible_gang_resource_requests.add(details="a placement group")
    client.report_autoscaling_state(state.SerializeToString())
    assert capacity.starting() == {"gpu": 3, "cpu": 1}
    assert capacity.declined()
    client.report_autoscaling_state(
        AutoscalingState(autoscaler_state_version=2).SerializeToString()
    )
    assert capacity.starting() == {"gpu": 1, "cpu": 1}
    assert not capacity.declined()


def test_the_head_is_asked_from_other_nodes_too(ray_cluster):
    """The look at the head's processes, as a task there: this cluster's starts no nodes."""
    look = ray.remote(num_cpus=0)(capacity.autoscaler_config)
    assert ray.get(look.remote(), timeout=PATIENCE_S) is None
