"""Where the actors of a family go: what they need, whether the cluster can give it, and when."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import msgspec
from ray.util.accelerators import accelerators
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dlf_ray.config import ActorOptions, EngineConfig, ExpertSpec, Family, ModelSpec
from dlf_ray.engine.capacity import (
    Capacity,
    Need,
    Node,
    declined,
    fits,
    possible,
    present,
    starting,
    together,
)
from dlf_ray.engine.limits import chosen, workers_of
from dlf_ray.engine.output import EngineError

COORDINATOR = "coordinator"
ACCELERATOR = "accelerator_type:"  # Ray's resource of a node with such a GPU
ASKED = 0.001  # of it, as Ray itself does
FIRST_WORD_S, EVERY_S = 1.0, 30.0  # when it is said what is waited for
CPUS = 1.0  # of an actor whose file does not say
LEAST = 0.01  # of a CPU, where few are shared
Needs = Mapping[str, Need]
Options = TypeVar("Options", bound=ActorOptions)

log = logging.getLogger("dlf_ray")


class Placement:
    """A bundle for each of some actors, in a placement group."""

    def __init__(
        self, needs: Needs, engine: EngineConfig, group: PlacementGroup | None = None
    ) -> None:
        """Reserves everything at once or nothing: half a family would only hold what others wait
        for. A `group` that is given belongs to the caller, whose own bundle is its first.

        Raises `ValueError` where the cluster can never hold it.
        """
        self.needs = needs
        self.owned = group is None
        if group is None:
            check_cluster(needs, engine.placement_strategy)
            group = placement_group(
                [dict(need.resources) for need in needs.values()],
                strategy=engine.placement_strategy,
                bundle_label_selector=[dict(need.label_selector) for need in needs.values()],
            )
        self.group = group
        self._engine = engine

    def wait(self) -> None:
        """Until there is room. Raises `EngineError` if that takes too long."""
        engine = self._engine
        wait_for(self.group, self.needs, engine.placement_strategy, engine.placement_timeout_s)

    def free(self) -> None:
        """Gives the room back, unless it is the caller's; ends whatever still runs in it."""
        if self.owned:
            remove_placement_group(self.group)

    def options(self, name: str) -> dict[str, Any]:
        """The options of one actor of the family."""
        asked = dict(self.needs[name].resources)
        index = list(self.needs).index(name) + (not self.owned)
        return {
            "num_cpus": asked.pop("CPU"),
            "num_gpus": asked.pop("GPU", 0),
            "memory": asked.pop("memory", None),
            "resources": asked,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self.group, placement_group_bundle_index=index
            ),
        }


def needs(family: Family, models: Collection[str] | None = None) -> dict[str, Need]:
    """What each actor of the family, or of those models of it, asks of its node, the coordinator
    first.

    Raises `ValueError` for an accelerator that Ray does not know.
    """
    family = family.with_gpu_share
    workers = workers_of(family, chosen(family, models))
    actors: dict[str, ModelSpec | EngineConfig] = {
        COORDINATOR: family.engine,
        **{name: family.models[name] for name in workers},
    }
    return {name: need_of(name, asked) for name, asked in actors.items()}


def settled(family: Family, copies: int = 1, beside: float = 0.0) -> Family:
    """The family with what its file leaves open: the `num_cpus` of actors, the coordinator's GPU.

    Each such actor has one CPU. Where the cluster is one machine that has too few for `copies` of
    the family, with `beside` CPUs for something else beside each, they have equal shares of what
    the others leave; one more share stays free, for an expert that joins later.
    """
    family = family.with_gpu_share
    actors: list[ActorOptions] = [family.engine, *(family.models[n] for n in family.workers)]
    asked = [each.num_cpus for each in actors if each.num_cpus is not None]
    unasked = len(actors) - len(asked)
    cpus = CPUS
    if unasked and (machine := _only_machine()):
        left = machine.resources.get("CPU", 0) / copies - beside - sum(asked)
        if left < unasked * CPUS:
            cpus = _share(left / (unasked + 1))
            log.info("%d actors share the CPUs of this machine: %g for each", unasked, cpus)
    return msgspec.structs.replace(
        family,
        large=_with_cpus(family.large, cpus),
        base=_with_cpus(family.base, cpus),
        experts={
            name: each if each.shares_base else _with_cpus(each, cpus)
            for name, each in family.experts.items()
        },
        engine=_with_cpus(family.engine, cpus),
    )


def settled_expert(expert: ExpertSpec) -> ExpertSpec:
    """The same for one more expert: it has what is free of the only machine, one CPU at most."""
    machine = _only_machine(free=True) if expert.num_cpus is None else None
    return _with_cpus(expert, _share(machine.resources.get("CPU", 0)) if machine else CPUS)


def _with_cpus(options: Options, cpus: float) -> Options:
    return options if options.num_cpus else msgspec.structs.replace(options, num_cpus=cpus)


def _share(cpus: float) -> float:
    """Of one CPU, in hundredths; a whole one, which will be refused, where there is nothing."""
    share = math.floor(100 * min(cpus, CPUS)) / 100
    return share if share >= LEAST else CPUS


def _only_machine(free: bool = False) -> Node | None:
    """What the cluster's node has, or what is `free` of it, if it is the only one and stays so."""
    if len(nodes := present(free)) != 1:
        return None
    capacity = possible()
    return nodes[0] if capacity is not None and not capacity.more else None


def resources(family: Family) -> dict[str, dict[str, float]]:
    """The bundle of each actor, for a placement group that the family is to run in."""
    return {name: dict(need.resources) for name, need in needs(family).items()}


def label_selectors(family: Family) -> dict[str, dict[str, str]]:
    """The label selector of each bundle."""
    return {name: dict(need.label_selector) for name, need in needs(family).items()}


def need_of(name: str, asked: ModelSpec | EngineConfig) -> Need:
    """What one actor asks of its node; errors as in `needs`."""
    known = sorted(v for k, v in vars(accelerators).items() if k.isupper() and isinstance(v, str))
    if asked.accelerator_type and asked.accelerator_type not in known:
        raise ValueError(
            f"{name}: Ray knows no `accelerator_type` {asked.accelerator_type!r}; it knows "
            f"{', '.join(known)}"
        )
    amounts = {
        "CPU": asked.num_cpus or CPUS,
        "GPU": asked.num_gpus or 0,
        "memory": asked.memory or 0,
        **({ACCELERATOR + asked.accelerator_type: ASKED} if asked.accelerator_type else {}),
        **asked.resources,
    }
    return Need({kind: amount for kind, amount in amounts.items() if amount}, asked.label_selector)


def check_cluster(needs: Needs, strategy: str) -> None:
    """Says (at level INFO) what is needed and what there is; raises `ValueError` with the same if
    the family can never fit.

    What is not there yet but may be started by the cluster's autoscaler counts as well.
    """
    wanted = list(needs.values())
    there = Capacity(present())
    if fits(wanted, there, strategy):
        log.info("the cluster has room for the family: %s", _sides(needs, there))
        return
    capacity = possible()
    if capacity is None:
        log.warning(
            "the family needs more nodes than the cluster has; what its autoscaler may add cannot "
            "be read here, so they are waited for"
        )
    elif fits(wanted, capacity, strategy):
        log.info("the cluster will have room for the family: %s", _sides(needs, capacity))
    else:
        problems = "; ".join(_problems(needs, capacity, strategy))
        raise ValueError(
            f"the cluster is too small for the family: {problems}. {_sides(needs, capacity)}\n"
            "Add nodes (or raise `max_workers` of its autoscaler), or ask for less in the "
            "family file (fractions of `num_cpus` and `num_gpus` share a CPU or a GPU)."
        )


def _sides(needs: Needs, capacity: Capacity) -> str:
    """What the family needs, and what the cluster has or may get, a line each."""
    asked = [f"  {name}: {_amounts(need)}" for name, need in needs.items()]
    return "\n".join(["Its actors ask for", *asked, "The cluster's nodes:", *_nodes(capacity)])


def _problems(needs: Needs, capacity: Capacity, strategy: str) -> list[str]:
    """Why the family does not fit, as far as that can be said of single resources or actors."""
    nodes = [(node, 1) for node in capacity.nodes] + list(capacity.more)
    verb = "may have" if capacity.more else "has"
    total = together(list(needs.values())).resources
    found = []
    for kind, wanted in total.items():
        there = sum(node.resources.get(kind, 0) * count for node, count in nodes)
        if kind.startswith(ACCELERATOR):
            if not there:
                found.append(f"no node has a GPU of the type {kind.removeprefix(ACCELERATOR)}")
        elif wanted > there:
            found.append(f"{wanted:g} {kind}s are needed, the cluster {verb} {there:g}")
    for name, need in needs.items():
        if not any(need.on(node) for node, _ in nodes):
            found.append(f"no node has room for {name} ({_amounts(need)})")
    count = len(capacity.nodes) + (capacity.max_more if capacity.more else 0)
    if strategy == "STRICT_SPREAD" and count < len(needs):
        found.append(f"STRICT_SPREAD needs {len(needs)} nodes, the cluster {verb} {count}")
    if strategy == "STRICT_PACK":
        found.append(f"STRICT_PACK needs one node with {_listed(total)}")
    return found or [f"its actors cannot be divided over the nodes (placement {strategy})"]


def _nodes(capacity: Capacity) -> list[str]:
    """A line for each kind of node."""
    there = Counter(map(_described, capacity.nodes))
    lines = [f"  {count} with {what}" for what, count in there.items()]
    for node, count in capacity.more:
        count = min(count, capacity.max_more)
        lines.append(f"  up to {count} more {node.type} with {_described(node)}")
    return lines


def wait_for(group: PlacementGroup, needs: Needs, strategy: str, timeout_s: float) -> None:
    """Until the group is placed, saying now and then what is missing.

    Raises `EngineError` with the same if it takes longer than `timeout_s`.
    """
    began = time.monotonic()
    next_word = FIRST_WORD_S
    while not group.wait(1):  # whole seconds only
        waited = time.monotonic() - began
        if waited >= timeout_s:
            raise EngineError(
                f"no room in the cluster within {timeout_s:g} s: {_missing(needs, strategy)}. Stop "
                "what holds the rest, or raise `engine.placement_timeout_s`."
            )
        if waited >= next_word:
            next_word = waited + EVERY_S
            missing = _missing(needs, strategy)
            log.warning("waiting for room, %.0f of %g s: %s", waited, timeout_s, missing)


def _missing(needs: Needs, strategy: str) -> str:
    """What is needed, what is free, who has no place now, and which nodes are on their way."""
    nodes = present(free=True)
    total = together(list(needs.values())).resources
    free = {kind: sum(node.resources.get(kind, 0) for node in nodes) for kind in total}
    placed: list[Need] = []
    without = []
    for name, need in needs.items():
        if fits([*placed, need], Capacity(nodes), strategy):
            placed.append(need)
        else:
            without.append(f"{name} ({_amounts(need)})")
    coming = [f"{count} x {type}" for type, count in starting().items()]
    return (
        f"the family needs {_listed(total)}, free are {_listed(free)} (placement {strategy}); "
        + (f"no place for {', '.join(without)}" if without else "its places are being prepared")
        + (f"; nodes being started: {', '.join(coming)}" if coming else "")
        + ("; the autoscaler is at its limits" if declined() else "")
    )


def _amounts(need: Need) -> str:
    labels = "".join(f", {key}={value}" for key, value in need.label_selector.items())
    return _listed(need.resources) + labels


def _described(node: Node) -> str:
    """A node without what Ray adds to each and no family asks for."""
    kinds = {
        kind: amount
        for kind, amount in sorted(node.resources.items())
        if not kind.startswith("node:") and kind != "object_store_memory"
    }
    labels = {key: value for key, value in node.labels.items() if key != "ray.io/node-id"}
    return _amounts(Need(kinds, labels))


def _listed(amounts: Mapping[str, float]) -> str:
    def one(kind: str, amount: float) -> str:
        if kind.startswith(ACCELERATOR):
            return kind.removeprefix(ACCELERATOR)
        return f"{amount / 2**30:.3g} GiB memory" if kind == "memory" else f"{amount:g} {kind}"

    return ", ".join(one(kind, amount) for kind, amount in amounts.items())
