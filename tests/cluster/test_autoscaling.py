"""A family that needs nodes which do not exist yet, on the many-node stand-in of cluster/."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import family_of
from processes import BIN, PATIENCE_S, ROOT, TESTS, end, free_port, one_at_a_time, settled

from dlf_ray import LocalEngine, SamplingParams

HEAD_ID = "f" * 51 + "00000"
PROMPTS = [[5, 6, 7], [11, 12, 13, 14]]


@pytest.fixture(scope="module")
def cluster():
    """`ray start` as the head of cluster/local.yaml says; yields the environment to join it."""
    import ray

    folder = Path(tempfile.mkdtemp(prefix="dlf"))  # short: sockets lie in it
    port = free_port()
    address = f"{ray.util.get_node_ip_address()}:{port}"
    text = (ROOT / "cluster" / "local.yaml").read_text()
    assert f"ID={HEAD_ID}\n" in text
    config = yaml.safe_load(text.replace("ADDRESS", address))
    assert config["provider"]["gcs_address"] == address
    file = folder / "local.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a-token-of-the-tests-only-0123456789",
        "RAY_ADDRESS": address,
        "PYTHONPATH": str(TESTS),
    }
    command = [
        *(BIN / "ray", "start", "--head", "--block", "--num-cpus=1", "--disable-usage-stats"),
        *(f"--port={port}", f"--autoscaling-config={file}", f"--temp-dir={folder / 'ray'}"),
        # The usual ports are of the cluster of the other tests, in this machine too.
        *(f"--ray-client-server-port={free_port()}", "--include-dashboard=false"),
        f"--dashboard-agent-listen-port={free_port()}",
    ]
    of_head = {
        **{key: value for key, value in environment.items() if key != "RAY_ADDRESS"},
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    }
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def up():
        asked = [BIN / "ray", "status"]
        return subprocess.run(asked, env=environment, check=False, **quiet).returncode == 0

    with one_at_a_time():
        head = subprocess.Popen(command, env=of_head, **quiet)
        started = settled(up)
    if started:
        yield environment
    end(head)
    # What the autoscaler started may have lost its parents.
    strays = [
        process
        for process in psutil.process_iter(["cmdline"])
        if address in " ".join(process.info["cmdline"] or ())
    ]
    for process in strays:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)
    assert started, "the cluster did not come up"


DRIVER = """
import json, sys, time
began = time.monotonic()
import report
answer = report.apart()
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from dlf_ray import Engine, Family, SamplingParams
from dlf_ray.engine.capacity import possible

def nodes():
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]

def wait_until(condition, timeout_s=240):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, nodes()
        time.sleep(0.2)

def refused(family):
    try:
        Engine(Family.from_dict(family))
    except ValueError as error:
        return str(error)

def passed(what):
    print(f"{what}: {time.monotonic() - began:.0f} s", file=sys.stderr)

told = json.loads(sys.argv[1])
ray.init(log_to_driver=False)
[head] = nodes()
told["too_large"] = refused(told["large"])
passed("refused")
with Engine(Family.from_dict(told["family"])) as engine:
    passed("started")
    told["nodes"] = len(nodes())
    outputs = engine.generate(told["prompts"], SamplingParams(max_tokens=8))
    told["tokens"] = [list(output.token_ids) for output in outputs]
    # From a node of the autoscaler's, the limits that lie on the head are read as well.
    elsewhere = NodeAffinitySchedulingStrategy(next(n for n in nodes() if n != head), soft=False)
    look = ray.remote(num_cpus=0)(possible).options(scheduling_strategy=elsewhere)
    told["more"] = ray.get(look.remote(), timeout=120).max_more
    told["missing"] = refused(told["nowhere"])
    passed("generated, refused")
wait_until(lambda: nodes() == [head])
passed("gone")
answer(told)
"""


def test_nodes_come_for_a_family_and_go_after_it(cluster, folder):
    local = family_of(folder, experts=("math",))
    spec = {"num_cpus": 0.5}
    family = {
        "large": {"model": local.large.model, "num_cpus": 1, "resources": {"large": 1}},
        "base": {"model": local.base.model, **spec, "resources": {"small": 2}},
        "experts": {
            "math": {"model": str(folder / "math"), **spec, "label_selector": {"size": "small"}}
        },
        "engine": {
            **{"num_cpus": 0.5, "max_num_seqs": 8, "max_model_len": 256},
            "placement_timeout_s": 2 * PATIENCE_S,
        },
    }
    large = {**family, "large": {**family["large"], "resources": {"large": 2}}}
    nowhere = {**family, "large": {"model": "/no/such/folder", "num_cpus": 0.5}}
    nowhere = {**nowhere, "base": {"model": local.base.model, **spec}, "experts": {}}
    with LocalEngine(local) as engine:
        expected = engine.generate(PROMPTS, SamplingParams(max_tokens=8))

    asked = {"family": family, "large": large, "nowhere": nowhere, "prompts": PROMPTS}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(asked)],
        env=cluster,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    print(done.stderr)
    assert told["tokens"] == [list(output.token_ids) for output in expected]
    assert told["nodes"] == 3
    assert told["more"] == 2
    assert "waiting for room" in done.stderr
    assert "no place for large (1 CPU, 1 large)" in done.stderr
    assert "2 larges are needed, the cluster may have 1" in told["too_large"]
    assert "up to 1 more large with 4 CPU, 1 large, size=large" in told["too_large"]
    assert "model 'large' (/no/such/folder): on node" in told["missing"]
