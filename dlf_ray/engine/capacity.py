"""What the cluster has, what its autoscaler may add, and whether a family fits in there.

Ray waits for ever for what it cannot place. Whether nodes may still come is known to the
autoscaler alone: its configuration lies on the head node, beside the process that reads it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
import yaml
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.autoscaler.v2.schema import ClusterStatus
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated.autoscaler_pb2 import (  # type: ignore[attr-defined]
    GetClusterStatusReply,
)
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

HEAD_TIMEOUT_S = 30.0  # for a look at the head node's processes
TRIES = 20_000  # for a division of the needs over the nodes, before nothing is claimed of it
PRECISION = 10_000  # of Ray's amounts; whole numbers add up without errors


class Need(NamedTuple):
    """What one actor asks of the node that it runs on."""

    resources: Mapping[str, float]
    label_selector: Mapping[str, str] = {}

    def on(self, node: Node) -> bool:
        """Whether the node can hold the actor if it holds nothing else."""
        return matches(node.labels, self.label_selector) and all(
            node.resources.get(kind, 0) >= amount for kind, amount in self.resources.items()
        )


class Node(NamedTuple):
    """What a node has, or would have if the autoscaler started it."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = {}
    type: str = ""
    """Its name in the autoscaler's configuration."""


@dataclass(frozen=True)
class Capacity:
    """Nodes that there are, and those that may come."""

    nodes: Sequence[Node]
    more: Sequence[tuple[Node, int]] = ()
    """How many of each the autoscaler may add."""
    max_more: int = 0
    """How many it may add altogether."""


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels are what a Ray label selector asks: `a`, `!a`, `in(a,b)`."""
    for key, wanted in selector.items():
        listed = re.fullmatch(r"!?in\((.*)\)", wanted)
        values = listed[1].split(",") if listed else [wanted.removeprefix("!")]
        found = labels.get(key) in (value.strip() for value in values)
        if found == wanted.startswith("!"):
            return False
    return True


def fits(needs: Sequence[Need], capacity: Capacity, strategy: str) -> bool:
    """Whether the needs can be divided over the nodes, if others hold nothing there.

    `strategy` is a placement group's. A search, largest needs first; without an answer after
    `TRIES` steps it says yes, since a family that may fit must not be refused.
    """
    if strategy == "STRICT_PACK":
        needs = [together(needs)]
    nodes = list(capacity.nodes)
    first_new = len(nodes)
    for node, count in capacity.more:
        nodes += [node] * min(count, len(needs))
    order = sorted(needs, key=lambda need: (sum(need.on(n) for n in nodes), -_size(need)))
    free = [{kind: _whole(amount) for kind, amount in n.resources.items()} for n in nodes]
    held = [0] * len(nodes)
    tries = 0

    def place(index: int) -> bool:
        nonlocal tries
        if index == len(order):
            return True
        wanted = {kind: _whole(amount) for kind, amount in order[index].resources.items()}
        started = sum(count > 0 for count in held[first_new:])
        seen = set()  # of nodes that are alike, one is tried
        for i, node in enumerate(nodes):
            if held[i] and strategy == "STRICT_SPREAD":
                continue
            if i >= first_new and not held[i] and started == capacity.max_more:
                continue
            room = free[i]
            if not matches(node.labels, order[index].label_selector) or any(
                room.get(kind, 0) < amount for kind, amount in wanted.items()
            ):
                continue
            state = (bool(held[i]), i >= first_new, str(node.labels), str(sorted(room.items())))
            if state in seen:
                continue
            seen.add(state)
            tries += 1
            free[i] = {kind: amount - wanted.get(kind, 0) for kind, amount in room.items()}
            held[i] += 1
            if tries > TRIES or place(index + 1):
                return True
            free[i] = room
            held[i] -= 1
        return False

    return place(0)


def together(needs: Sequence[Need]) -> Need:
    """All of them on one node."""
    total: dict[str, float] = {}
    labels: dict[str, str] = {}
    for need in needs:
        for kind, amount in need.resources.items():
            total[kind] = total.get(kind, 0) + amount
        labels.update(need.label_selector)
    return Need(total, labels)


def _size(need: Need) -> float:
    return 8 * need.resources.get("GPU", 0) + need.resources.get("CPU", 0)


def _whole(amount: float) -> int:
    return round(amount * PRECISION)


def status() -> ClusterStatus:
    return get_cluster_status(ray.get_runtime_context().gcs_address)


def present(free: bool = False) -> list[Node]:
    """The nodes that there are: with all they have, or with what is `free` of it."""
    found = status()
    nodes = []
    for info in (*found.active_nodes, *found.idle_nodes):
        usage = info.resource_usage.usage if info.resource_usage else []
        resources = {u.resource_name: u.total - free * u.used for u in usage}
        nodes.append(Node(resources, info.labels or {}, info.ray_node_type_name))
    return nodes


def this_node() -> str | None:
    """Names the node of this process to whoever has to look there; None if there is no other."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    here = ray.get_runtime_context().get_node_id()
    names = [
        f"node {node['NodeManagerAddress']} ({node['NodeManagerHostname']})"
        for node in nodes
        if node["NodeID"] == here
    ]
    return names[0] if len(nodes) > 1 and names else None


def possible() -> Capacity | None:
    """The nodes that there are and those that an autoscaler may add; None if its limits are hidden.

    In Kubernetes it runs beside the head's container, and its limits are not Ray's to read.
    """
    nodes = present()
    try:
        config = _from_head()
    except (LookupError, OSError, yaml.YAMLError, ray.exceptions.RayError):
        hidden = is_autoscaler_v2(fetch_from_server=True) or _report()
        return None if hidden else Capacity(nodes)
    return limits(config, nodes) if config else Capacity(nodes)


def limits(config: Mapping[str, Any], nodes: Sequence[Node]) -> Capacity | None:
    """What a cluster of these nodes may become by its autoscaler's configuration.

    None if that does not say what its nodes have.
    """
    there = Counter(node.type for node in nodes)
    total = config.get("max_workers", 0)
    more = []
    for name, spec in config.get("available_node_types", {}).items():
        of_type = spec.get("max_workers", 0 if name == config["head_node_type"] else total)
        if of_type > there[name]:
            if not spec.get("resources"):
                return None
            node = Node(spec["resources"], spec.get("labels", {}), name)
            more.append((node, of_type - there[name]))
    return Capacity(nodes, more, max(0, total - (len(nodes) - 1)))  # one of them is the head


def _from_head() -> Any:
    head = next(n["NodeID"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"])
    if head == ray.get_runtime_context().get_node_id():
        return autoscaler_config()
    there: Any = ray.remote(num_cpus=0, max_retries=0)(autoscaler_config)
    where = NodeAffinitySchedulingStrategy(head, soft=False)
    return ray.get(there.options(scheduling_strategy=where).remote(), timeout=HEAD_TIMEOUT_S)


def autoscaler_config() -> Any:
    """The configuration of the autoscaler on this node, None if it has none and starts no nodes.

    Raises `LookupError` where no autoscaler runs on this node.
    """
    address = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if address in words and any(Path(word).name == "monitor.py" for word in words):
            for word in words:
                if word.startswith("--autoscaling-config="):
                    file = Path(word.partition("=")[2]).expanduser()
                    return yaml.safe_load(file.read_text(encoding="utf-8"))
            return None
    raise LookupError("no autoscaler runs on this node")


def _report() -> Any:
    """What Ray's first autoscaler tells of its work; the second one's is part of `status`."""
    return json.loads(_internal_kv_get(b"__autoscaling_status") or "{}").get("autoscaler_report")


def starting() -> dict[str, int]:
    """How many nodes of each type the autoscaler is starting now."""
    found: Counter[str] = Counter()
    report = _report() or {}
    found.update(report.get("pending_launches", {}))
    found.update(type for _, type, *_ in report.get("pending_nodes", ()))
    told = status()
    for request in told.pending_launches:
        found[request.ray_node_type_name] += request.count
    found.update(node.ray_node_type_name for node in told.pending_nodes)
    return dict(found)


def declined() -> bool:
    """Whether the second autoscaler says that it cannot start what some placement group needs.

    It says so where its limits are reached, by others perhaps; the first one only keeps trying.
    """
    client: Any = GcsClient(address=ray.get_runtime_context().gcs_address)
    reply: Any = GetClusterStatusReply.FromString(client.get_cluster_status())
    return bool(reply.autoscaling_state.infeasible_gang_resource_requests)
