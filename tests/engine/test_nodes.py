"""A family spread over nodes that only a network connects (see `network.py`).

The pytest process stays outside; this file, run as a script on the head, drives the engine there.
"""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import network
import pytest
import report
from conftest import EXPERTS, family_of, prompts_of
from processes import PATIENCE_S, end

from dlf_ray import SamplingParams

ROWS, TOKENS, VOCAB = 8, 40, 300
SAMPLING = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
REFUSED = network.refusal()
if REFUSED:
    pytestmark = pytest.mark.skip(reason=f"no nodes on network addresses of their own: {REFUSED}")


def drive(folder):
    """Generates once it is told to, and answers what the test wants to know."""
    answer = report.apart()
    import ray
    from ray.util import placement_group_table

    from dlf_ray import Engine

    with Engine(family_of(Path(folder), placement_strategy="SPREAD")) as engine:
        (group,) = placement_group_table().values()
        address = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        placed = [address[group["bundles_to_node_id"][i]] for i in sorted(group["bundles"])]
        engine.generate(prompts_of(ROWS, seed=1), SAMPLING)  # connections and caches are warm
        answer("ready")
        sys.stdin.readline()
        before, began = engine.timings().steps, time.perf_counter()
        outputs = engine.generate(prompts_of(ROWS), SAMPLING)
        took, steps = time.perf_counter() - began, engine.timings().steps - before
        told = {
            "nodes": dict(zip(["coordinator", *engine.family.models], placed, strict=True)),
            "shares_memory": engine.shares_memory,
            "steps": steps,
            "seconds": took,
            "outputs": [{"token_ids": o.token_ids, "weights": o.weights} for o in outputs],
        }
        answer(told)
        sys.stdin.readline()  # the test reads counters before the actors leave


@pytest.fixture(scope="module")
def driven(folder):
    """What the driver reported, and the bytes that the coordinator's node received meanwhile."""
    with contextlib.ExitStack() as clean:
        nodes = clean.enter_context(network.network(3, num_cpus=2))
        driver = subprocess.Popen(
            nodes.command(sys.executable, __file__, folder),
            env=nodes.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        clean.callback(end, driver)
        first = driver.stdout.readline()
        if not first:
            pytest.fail(driver.communicate(timeout=PATIENCE_S)[1])
        before = [nodes.received(i) for i in range(3)]
        driver.stdin.write("\n")
        driver.stdin.flush()
        told = json.loads(driver.stdout.readline())
        received = [nodes.received(i) - before[i] for i in range(3)]
        _, errors = driver.communicate("\n", timeout=PATIENCE_S)
        assert driver.returncode == 0, errors
        head = nodes.addresses.index(told["nodes"]["coordinator"])
    return SimpleNamespace(**told, received=received[head])


def test_who_is_on_another_node_does_not_share_memory(driven):
    assert len(set(driven.nodes.values())) > 1
    home = driven.nodes["coordinator"]
    expected = {name: node == home for name, node in driven.nodes.items() if name != "coordinator"}
    assert driven.shares_memory == expected
    assert not all(expected.values())


def test_spread_over_nodes_it_gives_what_the_oracle_gives(driven, oracle):
    for prompt, answer in zip(prompts_of(ROWS), driven.outputs, strict=True):
        assert len(answer["token_ids"]) == TOKENS
        oracle.check(prompt, SimpleNamespace(**answer, error=None), EXPERTS)


def test_little_more_than_the_logits_crosses_the_network(driven, figure):
    """Beside them: encryption, headers, acknowledgements of plans, and Ray's own heartbeats."""
    remote = sum(not shared for shared in driven.shares_memory.values())
    floor = remote * ROWS * TOKENS * VOCAB * 4
    figure(
        f"{remote} of {len(driven.shares_memory)} models on other nodes, "
        f"{driven.received / driven.steps:.0f} bytes a step received, "
        f"floor {floor / driven.steps:.0f}, "
        f"{1000 * driven.seconds / driven.steps:.1f} ms a step"
    )
    assert floor <= driven.received < 1.2 * floor


if __name__ == "__main__":
    drive(sys.argv[1])
