"""What is measured: each figure against what the requests themselves say, and Ray's own export."""

import json
import re
import time
import urllib.request

import pytest
import ray
from conftest import EXPERTS, family_of
from processes import PATIENCE_S, ROOT

from dlf_ray import Engine, LocalEngine, SamplingParams
from dlf_ray.metrics import METRICS, MemorySink, chrome_trace

FAULTS = {"recoveries", "recovery_time_seconds"}
"""Recorded only when something dies."""


def test_figures_of_a_few_requests_are_theirs(folder):
    sink = MemorySink()
    with LocalEngine(family_of(folder, max_num_seqs=2), metrics=sink) as engine:
        sampling = SamplingParams(max_tokens=4, ignore_eos=True)
        outputs = engine.generate([[5] * 10, [6] * 3, [7, 8]], sampling)
        engine.score([[5]], [[6, 7]])
        assert sink.values["num_requests_running",] == [0]
        stream = engine.stream([5], sampling)
        next(stream)
        assert sink.values["num_requests_running",] == [1]
        assert 0 < sink.values["kv_cache_usage_perc",][0] <= 1 / 256
        stream.close()
    values = sink.values
    assert values["prompt_tokens",] == [10 + 3 + 2 + 3 + 1]
    assert values["generation_tokens",] == [3 * 4 + 1]
    assert values["request_success", "length"] == [4]
    assert values["request_success", "abort"] == [1]
    assert len(values["time_to_first_token_seconds",]) == 4
    assert len(values["inter_token_latency_seconds",]) == 3 * 3
    ends = values["e2e_request_latency_seconds",]
    assert len(ends) == 4
    # The third had to wait for a slot until another had ended.
    assert max(values["request_queue_time_seconds",]) > 0.5 * min(ends)
    for name in EXPERTS:
        weights = [w[name] for output in outputs for w in output.weights]
        assert sorted(values["expert_weight", name][:12]) == pytest.approx(sorted(weights))
    for at, direction in enumerate(("fused_large", "large_fused")):
        nats = [kl[at] for output in outputs for kl in output.kl]
        assert sorted(values["kl_divergence", direction][:12]) == pytest.approx(sorted(nats))
    for model in engine.family.models:
        assert all(s > 0 for s in values["forward_time_seconds", model])
    assert {name for name, *_ in values} == set(METRICS) - FAULTS


def test_a_trace_shows_every_actor_at_work(folder):
    with LocalEngine(family_of(folder)) as engine:
        sampling = SamplingParams(max_tokens=3, ignore_eos=True)
        began = time.time()
        (output,) = engine.generate([5, 6], sampling, trace=True)
        ended = time.time()
        assert engine.generate([5, 6], sampling)[0].spans == []
    events = chrome_trace(output.spans)["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert set(names.values()) == {"coordinator", *engine.family.models}
    done = [e for e in events if e["ph"] == "X"]
    assert sum(e["name"] == "forward" for e in done) == 3 * len(engine.family.models)
    stages = ["plan", "wait", "aim", "weigh", "sample", "commit", "queue"]
    assert {e["name"] for e in done} == {"forward", *stages}
    for event in done:
        assert began * 1e6 <= event["ts"] <= event["ts"] + event["dur"] <= ended * 1e6 + 1e3


def test_ray_exports_them_for_prometheus(ray_cluster, folder):
    with Engine(family_of(folder, experts=("math",)), model_name="measured") as engine:
        (output,) = engine.generate([5], SamplingParams(max_tokens=7, ignore_eos=True), trace=True)
        assert {actor for actor, *_ in output.spans} == {"coordinator", *engine.family.models}
        (node,) = ray.nodes()
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        deadline = time.monotonic() + PATIENCE_S
        found = {}
        while "generation_tokens" not in found and time.monotonic() < deadline:
            time.sleep(1)
            page = urllib.request.urlopen(address, timeout=10).read().decode()
            rows = re.findall(r'^ray_dlf_(\w+)\{(.*model_name="measured".*)\} (\S+)$', page, re.M)
            found = {name.removesuffix("_total"): (tags, float(v)) for name, tags, v in rows}
    assert found["generation_tokens"][1] == 7
    assert found["prompt_tokens"][1] == 1
    assert 'finished_reason="length"' in found["request_success"][0]
    exported = {re.sub(r"_(bucket|count|sum)$", "", name) for name in found}
    assert exported == set(METRICS) - FAULTS


def test_the_dashboard_shows_every_metric_and_no_other():
    board = json.loads((ROOT / "cluster" / "grafana.json").read_text())
    shown = set()
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            for name in re.findall(r"ray_dlf_(\w+)", target["expr"]):
                plain = re.sub(r"_(bucket|sum|count|total)$", "", name)
                shown.add(plain)
                kind = METRICS[plain].kind
                assert name.endswith("_total") == (kind == "counter")
                assert bool(re.search(r"_(bucket|sum|count)$", name)) == (kind == "histogram")
            for by in re.findall(r"by \(([\w, ]+)\)", target["expr"]):
                labels = {label for each in shown for label in METRICS[each].labels}
                assert set(by.split(", ")) <= {*labels, "le", "model_name"}
    assert shown == set(METRICS)
