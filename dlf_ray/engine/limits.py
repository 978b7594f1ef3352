"""What of a family is loaded, and what requests to it may ask for."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from dlf_ray.config import Family, ModelSpec
from dlf_ray.messages import Description, Limits
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


def limits_of(family: Family, descriptions: Mapping[str, Description]) -> Limits:
    """What the loaded models can take together."""
    eos = {token for each in descriptions.values() for token in each.eos_token_ids}
    longest = family.engine.max_model_len
    lengths = {
        name: min(longest, descriptions[name].context)
        for name in family.models
        if name in descriptions
    }
    return Limits(
        lengths=lengths,
        vocab=min(each.vocab for each in descriptions.values()),
        eos_token_ids=tuple(sorted(eos)),
        positions=positions_of(family, descriptions, lengths),
    )


def positions_of(
    family: Family, descriptions: Mapping[str, Description], lengths: Mapping[str, int]
) -> dict[str, int]:
    """How many positions the cache of each model has room for, where its memory is known.

    Models on the CPUs of one node, unless their `memory` is set, share what that has left.
    Raises `ValueError` where a single sequence of the family's length does not fit.
    """
    pools: dict[str, list[str]] = {}
    for name, each in descriptions.items():
        if each.free_bytes is not None and each.cache_bytes_per_position:
            shared = each.device == "cpu" and family.models[name].memory is None
            pools.setdefault(f"node {each.node}" if shared else f"model {name}", []).append(name)
    positions: dict[str, int] = {}
    for names in pools.values():
        free = SPARE * min(descriptions[name].free_bytes or 0 for name in names)
        size = sum(descriptions[name].cache_bytes_per_position for name in names)
        positions |= dict.fromkeys(names, int(free / size) // LENGTH_STEP * LENGTH_STEP)
    for name, most in positions.items():
        if most < lengths[name]:
            raise ValueError(
                f"model {name!r} ({family.models[name].model}) has memory for the keys and values "
                f"of {most} tokens, a sequence may have {lengths[name]}: set "
                f"`engine: {{max_model_len: {most}}}` at most, or give it more memory"
                if most
                else f"model {name!r} ({family.models[name].model}) leaves no memory for keys and "
                "values: give it more, or use a smaller `dtype`"
            )
    return positions
