"""A family before it starts: whether its models go together, fit in memory, and have a place.

`check` finds all there is to say; `check_family` raises what is certain, for engines to call before
anything is placed or loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from dlf_ray.config import LARGE, Family, ModelSpec
from dlf_ray.engine.limits import chosen, workers_of

if TYPE_CHECKING:
    from dlf_ray.models.facts import Facts, Problem

# Facts come with transformers, and placement with Ray: both are imported where they are used.

MEMORY = "memory"
"""Ray's resource of a node: bytes."""


@dataclass(frozen=True)
class Actor:
    """What a process of the family will hold, and what it asks of its node."""

    models: tuple[str, ...] = ()
    """None of the coordinator."""
    asks: Mapping[str, float] = field(default_factory=dict)
    weight_bytes: int | None = None
    cache_bytes: int | None = None
    """Of all sequences that may be decoded together, each as long as it may be."""


@dataclass(frozen=True)
class Place:
    """What the cluster has to say."""

    nodes: int
    """0: no cluster runs."""
    text: str


@dataclass(frozen=True)
class Checked:
    """All that is known of a family before it starts."""

    facts: dict[str, Facts]
    actors: dict[str, Actor]
    place: Place
    problems: tuple[Problem, ...]
    """Errors first."""

    @property
    def ok(self) -> bool:
        return not any(each.kind == "error" for each in self.problems)


def check_family(
    family: Family, models: Collection[str] | None = None, *, elsewhere: bool = False
) -> None:
    """Raises `ValueError` with all that is certain to keep the models named (all if none are) from
    starting, and can be found out at once: what is missing, broken, unlike or not supported.

    `elsewhere` is for models that other machines may load (`several_nodes`), which have disks and
    libraries of their own: what is not here is left to them. Only files that are here, or in the
    local cache of the hub, are read.
    """
    facts = facts_of(family, models, quick=True)
    found = [*_own(facts), *_agreement(family, facts)]
    certain = [p for p in found if p.kind == "error" and not (elsewhere and p.here)]
    if certain:
        raise ValueError("\n".join(_said(family, each) for each in certain))


def several_nodes() -> bool:
    """Whether the cluster that this process has joined has, or may get, more than one node."""
    from dlf_ray.engine.capacity import possible, present

    if len(present()) != 1:
        return True
    capacity = possible()
    return capacity is None or bool(capacity.more)


def check(family: Family) -> Checked:
    """Everything that can be told of a family, on this machine and the Ray cluster that runs."""
    facts = facts_of(family)
    with _joined() as (there, silence):
        place, asks, placement = _placement(family, there)
        alone = not there or not several_nodes()
    actors = actors_of(family, facts, asks)
    problems = [
        *_own(facts),
        *_agreement(family, facts),
        *_surprises(family, facts),
        *_memory(family, actors, facts, alone),
        *([_problem("warning", silence)] if silence else []),
        *placement,
    ]
    problems.sort(key=lambda each: each.kind != "error")
    return Checked(facts, actors, place, tuple(problems))


def facts_of(
    family: Family, models: Collection[str] | None = None, *, quick: bool = False
) -> dict[str, Facts]:
    """The facts of each model that is named, all if none are; `quick` as in `inspect`."""
    from dlf_ray.models.inspect import inspect

    return {
        name: inspect(spec, family.engine, family.base, quick=quick)
        for name, spec in chosen(family, models).items()
    }


def _problem(kind: str, text: str, model: str | None = None) -> Problem:
    from dlf_ray.models.facts import Problem

    return Problem("error" if kind == "error" else "warning", text, model)


def _said(family: Family, problem: Problem) -> str:
    if problem.model is None:
        return problem.text
    return f"model {problem.model!r} ({family.models[problem.model].source}): {problem.text}"


def _own(facts: Mapping[str, Facts]) -> Iterator[Problem]:
    """What is said of each model by itself."""
    for name, each in facts.items():
        yield from (replace(problem, model=name) for problem in each.problems)


def _agreement(family: Family, facts: Mapping[str, Facts]) -> Iterator[Problem]:
    """Tokenizers that do not go with the large model's, or the first's that has one."""
    from dlf_ray.models.vocabulary import refusal, surprise

    known = {name: each.vocabulary for name, each in facts.items() if each.vocabulary}
    first = next(iter(known), None)
    for name, vocabulary in known.items():
        assert first is not None
        titles = family.title(first), family.title(name)
        splits = facts[first].split, facts[name].split
        if why := refusal(known[first], vocabulary, splits, titles):
            yield _problem("error", why, name)
        elif told := surprise(known[first], vocabulary, titles):
            yield _problem("warning", told, name)


def _surprises(family: Family, facts: Mapping[str, Facts]) -> Iterator[Problem]:
    """What works, but perhaps not as was thought."""
    longest = family.engine.max_model_len
    own = [name for name in workers_of(family, list(facts)) if name in facts]  # not the adapters
    for name, each in ((name, facts[name]) for name in own):
        if each.context is not None and each.context < longest:
            text = (
                f"it was made for {each.context} tokens, `engine.max_model_len` is {longest}: "
                "requests that it takes part in are held to its own"
            )
            yield _problem("warning", text, name)
    large = facts.get(LARGE)
    if large and large.tokens is not None and not large.chat_template:
        text = (
            "its tokenizer has no chat template: conversations need one as `chat_template`, where "
            "the family is served or asked"
        )
        yield _problem("warning", text, LARGE)
    whole = {name: each for name, each in facts.items() if each.tokens is not None}
    for name, each in whole.items():
        if large and large.chat_template and each.chat_template not in (None, large.chat_template):
            text = "its chat template is another one than the large model's; it reads by its own"
            yield _problem("warning", text, name)
    ends = {each.end_tokens for each in whole.values()}
    if ends == {()}:
        text = "no model says which token ends a text: all go on to `max_tokens`"
        yield _problem("warning", text)
    elif len(ends) > 1:
        listed = ", ".join(f"{name} {list(each.end_tokens)}" for name, each in whole.items())
        text = f"end tokens differ ({listed}): those of any model that a request asks for end it"
        yield _problem("warning", text)


def actors_of(
    family: Family, facts: Mapping[str, Facts], asks: Mapping[str, Mapping[str, float]]
) -> dict[str, Actor]:
    """The processes, the coordinator first where `asks` has it; models of one share its weights."""
    actors = {name: Actor(asks=amounts) for name, amounts in asks.items()}
    for worker, models in workers_of(family, list(facts)).items():
        weights = [facts[name].weight_bytes for name in models if name in facts]
        positions = [_positions(family, facts[name]) for name in models if name in facts]
        actors[worker] = Actor(
            models=models,
            asks=asks.get(worker, {}),
            weight_bytes=None if None in weights else sum(filter(None, weights)),
            cache_bytes=None
            if None in positions
            else sum(filter(None, positions)) * family.engine.max_num_seqs,
        )
    return actors


def _positions(family: Family, facts: Facts) -> int | None:
    """The bytes of one sequence as long as it may be."""
    if facts.position_bytes is None:
        return None
    longest = family.engine.max_model_len
    return facts.position_bytes * min(longest, facts.context or longest)


def _memory(
    family: Family, actors: Mapping[str, Actor], facts: Mapping[str, Facts], alone: bool
) -> Iterator[Problem]:
    """Where weights, or the caches asked for, are more than there is; `alone` says that the family
    has this machine only."""
    shared = 0
    for name, actor in actors.items():
        if not actor.models or actor.weight_bytes is None:
            continue
        spec = family.models[name]
        most, where = _given(spec, alone)
        least = actor.weight_bytes + sum(
            _positions(family, facts[model]) or 0 for model in actor.models
        )
        asked = actor.weight_bytes + (actor.cache_bytes or 0)
        needs = (
            f"weights of {size(actor.weight_bytes)} and the cache of one sequence make "
            f"{size(least)}"
        )
        if most is None:
            shared += least if not spec.num_gpus else 0
        elif least > most:
            yield _problem("error", f"{needs}, {where} {size(most)}: give it more", name)
        elif asked > most:
            text = (
                f"weights and a cache for `max_num_seqs` sequences make {size(asked)}, {where} "
                f"{size(most)}: fewer are decoded together where they are long"
            )
            yield _problem("warning", text, name)
    if alone and shared:
        yield from _machine(shared)


def _given(spec: ModelSpec, alone: bool) -> tuple[int | None, str]:
    """The bytes that a model's process may take, and what says so; None where nothing does."""
    if not spec.num_gpus:
        return spec.memory, "its `memory` is"
    if alone and torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        return int(whole * spec.num_gpus), f"{spec.num_gpus:g} GPUs of this machine have"
    return None, ""


def _machine(needed: int) -> Iterator[Problem]:
    """Whether this machine has room for all models on its CPUs."""
    from dlf_ray.models.memory import free_bytes

    free = free_bytes(torch.device("cpu"))
    if needed > free:
        text = (
            f"the models on CPUs need {size(needed)} for weights and one sequence, this machine "
            f"has {size(free)} free"
        )
        yield _problem("warning", text)


def size(amount: float) -> str:
    return f"{amount / 2**30:.2f} GiB" if amount >= 2**30 / 100 else f"{amount / 2**20:.2f} MiB"


def listed(amounts: Mapping[str, float]) -> str:
    """Resources, as people write them."""
    return ", ".join(
        f"{size(amount)} memory" if kind == MEMORY else f"{amount:g} {kind}"
        for kind, amount in amounts.items()
    )


def _placement(
    family: Family, there: bool
) -> tuple[Place, dict[str, Mapping[str, float]], list[Problem]]:
    """What each actor asks for, and what the cluster that was joined, if there is one, says to
    that."""
    from dlf_ray.engine.capacity import Capacity, fits, possible, present, together
    from dlf_ray.engine.placement import check_cluster, needs, settled

    nodes = len(present()) if there else 0
    try:
        family = settled(family) if there else family.with_gpu_share
        needed = needs(family)
    except ValueError as error:
        return Place(nodes, "not known"), {}, [_problem("error", str(error))]
    asks = {name: need.resources for name, need in needed.items()}
    wanted, strategy = list(needed.values()), family.engine.placement_strategy
    total = listed(together(wanted).resources)
    if not there:
        problems = []
        if any(spec.num_gpus for spec in family.models.values()) and not torch.cuda.is_available():
            problems = [_problem("warning", "it asks for GPUs; torch sees none on this machine")]
        text = f"no Ray cluster runs here; the family needs {total} in total"
        return Place(0, text), asks, problems
    try:
        check_cluster(needed, strategy)
    except ValueError as error:
        return Place(nodes, "no room"), asks, [_problem("error", str(error))]
    said = f"{total} needed, {nodes} node{'s' if nodes > 1 else ''}"
    if fits(wanted, Capacity(present(free=True)), strategy):
        return Place(nodes, f"room now ({said})"), asks, []
    if fits(wanted, Capacity(present()), strategy):
        text = (
            "others hold some of what the family needs: it would wait "
            f"{family.engine.placement_timeout_s:g} s for that, then give up"
        )
        return Place(nodes, f"room, but not now ({said})"), asks, [_problem("warning", text)]
    if possible() is None:
        text = "the cluster has too few nodes, and what its autoscaler may add cannot be read here"
        return Place(nodes, f"not known ({said})"), asks, [_problem("warning", text)]
    return Place(nodes, f"room once its autoscaler has added nodes ({said})"), asks, []


@contextmanager
def _joined() -> Iterator[tuple[bool, str]]:
    """Meanwhile this process is part of the cluster that an engine would join, if one runs; else
    why not, where there should be one."""
    import ray
    from ray._private.services import canonicalize_bootstrap_address as address_of

    if ray.is_initialized():
        yield True, ""
        return
    try:
        address = address_of(None)  # type: ignore[arg-type]
        if address is not None:
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        hint = (
            "set RAY_AUTH_MODE=token where it has token authentication on; else check RAY_ADDRESS"
        )
        yield False, f"the Ray cluster does not take this process in ({error}): {hint}"
        return
    try:
        yield address is not None, ""
    finally:
        if address is not None:
            ray.shutdown()
