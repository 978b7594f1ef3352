"""What of a family is loaded, and what requests to it may ask for."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from dlf_ray.config import Family, ModelSpec
from dlf_ray.messages import Description, Limits, Pool
from dlf_ray.plans import LENGTH_STEP

SPARE = 0.9
"""The part of free memory that caches may take."""


def chosen(family: Family, models: Collection[str] | None) -> dict[str, ModelSpec]:
    """The models of the family that are named, all if none are; in the order of the family.

    Raises `ValueError` where one of them is not in the family.
    """
    if models is None:
        return family.models
    if not models or (unknown := set(models) - set(family.models)):
        what = f"no model {sorted(unknown)}" if models else "no model was named"
        raise ValueError(f"{what}; the family has {list(family.models)}")
    return {name: spec for name, spec in family.models.items() if name in models}


def workers_of(family: Family, models: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The workers of some models: by the name of each, the models that it serves, its own first."""
    return {
        worker: (worker, *(name for name in served if name in models and name != worker))
        for worker, served in family.workers.items()
        if not set(served).isdisjoint(models)
    }


def by_model(
    family: Family, workers: Mapping[str, Collection[str]], loaded: Mapping[str, Description]
) -> dict[str, Description]:
    """What each model says of itself, in the order of the family, from what workers have said."""
    found = {model: loaded[worker] for worker, models in workers.items() for model in models}
    return {name: found[name] for name in family.models if name in found}


def templates_of(
    workers: Mapping[str, Collection[str]], loaded: Mapping[str, Description]
) -> dict[str, str]:
    """The chat template of each model that has one, from what workers have said."""
    found = {}
    for worker, models in workers.items():
        # a worker of another kind may say nothing of them
        for name, template in zip(models, loaded[worker].chat_templates, strict=False):
            if template:
                found[name] = template
    return found


def limits_of(
    family: Family,
    descriptions: Mapping[str, Description],
    unlike: Mapping[str, tuple[int, ...]],
) -> Limits:
    """What the loaded models can take together; `unlike`: see `vocabulary.agree`."""
    longest = family.engine.max_model_len
    first = next(iter(descriptions.values()))  # the large one's, where that is loaded
    lengths = {
        name: min(longest, descriptions[name].context)
        for name in family.models
        if name in descriptions
    }
    return Limits(
        lengths=lengths,
        vocab=first.vocab,
        vocabs={name: each.vocab for name, each in descriptions.items()},
        ends={name: each.eos_token_ids for name, each in descriptions.items()},
        unlike=dict(unlike),
        sampling=first.sampling if family.engine.generation_config == "auto" else {},
        positions=positions_of(family, descriptions, lengths),
        pools=pools_of(family, descriptions, lengths),
    )


def pools_of(
    family: Family, descriptions: Mapping[str, Description], lengths: Mapping[str, int]
) -> dict[str, Pool]:
    """The caches of blocks. Raises `ValueError` where one is too small for a single sequence."""
    pools: dict[str, Pool] = {}
    for worker, served in family.workers.items():
        loaded = [name for name in served if name in descriptions]
        for name in loaded:
            if (each := descriptions[name]).block:
                most = each.blocks // len(loaded) * each.block  # it may be in all of them
                if most < lengths[name]:
                    raise ValueError(_too_small(family, name, most, lengths[name]))
                pools[name] = Pool(worker, each.blocks * each.block, each.block)
    return pools


def positions_of(
    family: Family, descriptions: Mapping[str, Description], lengths: Mapping[str, int]
) -> dict[str, int]:
    """How many positions the cache of each model has room for, where its memory is known.

    Models on the CPUs of one node, unless their `memory` is set, share what that has left.
    Raises `ValueError` where a single sequence of the family's length does not fit.
    """
    owners = {name: worker for worker, served in family.workers.items() for name in served}
    pools: dict[str, list[str]] = {}
    for name, each in descriptions.items():
        if each.free_bytes is not None and each.cache_bytes_per_position:
            owner = owners[name]
            shared = each.device == "cpu" and family.models[owner].memory is None
            pools.setdefault(f"node {each.node}" if shared else f"worker {owner}", []).append(name)
    positions: dict[str, int] = {}
    for names in pools.values():
        free = SPARE * min(descriptions[name].free_bytes or 0 for name in names)
        size = sum(descriptions[name].cache_bytes_per_position for name in names)
        positions |= dict.fromkeys(names, int(free / size) // LENGTH_STEP * LENGTH_STEP)
    for name, most in positions.items():
        if most < lengths[name]:
            raise ValueError(_too_small(family, name, most, lengths[name]))
    return positions


def _too_small(family: Family, name: str, most: int, length: int) -> str:
    title = f"model {name!r} ({family.models[name].source})"
    if not most:
        return (
            f"{title} leaves no memory for keys and values: give it more, or use a smaller `dtype`"
        )
    return (
        f"{title} has memory for the keys and values of {most} tokens, a sequence may have "
        f"{length}: set `engine: {{max_model_len: {most}}}` at most, or give it more memory"
    )
