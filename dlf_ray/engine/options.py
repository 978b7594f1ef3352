"""What one request may set differently from its family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from dlf_ray.config import Family, Fusion, check_bounds
from dlf_ray.params import FusionParams, check_candidates
from dlf_ray.rules import RULES, Rule, Select


class FusionOptions(TypedDict, total=False):
    """What one request may set differently from the family file."""

    rule: Rule
    select: Select
    step: float
    experts: Sequence[str]
    """The experts that take part; all if absent, `[]` for the large model alone."""
    weights: Mapping[str, float]
    """With rule static; 1.0 for those not named."""
    bounds: Mapping[str, tuple[float, float]]
    alone: str
    """One model answers by itself, unfused."""
    trace: bool
    """Record what every actor does for the request (`Output.spans`)."""


def resolve(family: Family, options: FusionOptions) -> FusionParams:
    """The family's fusion with a request's own options on top.

    Raises `ValueError` for names that are not in the family and for options that clash.
    """
    if unknown := set(options) - set(FusionOptions.__annotations__):
        raise ValueError(
            f"unknown fusion options {sorted(unknown)}; there are "
            f"{sorted(FusionOptions.__annotations__)}"
        )
    alone = options.get("alone")
    if alone is not None:
        if alone not in family.models:
            raise ValueError(f"no model {alone!r} in the family; it has {list(family.models)}")
        if clash := set(options) - {"alone", "trace"}:
            raise ValueError(f"`alone` leaves nothing to fuse; drop {sorted(clash)}")
    experts = () if alone else tuple(options.get("experts", family.experts))
    bounds, weights = options.get("bounds", {}), options.get("weights", {})
    for name in (*experts, *bounds, *weights):
        if name not in family.experts:
            raise ValueError(f"no expert {name!r} in the family; it has {list(family.experts)}")
    if len(set(experts)) < len(experts):
        raise ValueError(f"`experts` names one twice: {list(experts)}")
    rule = options.get("rule", family.fusion.rule)
    # The checks of the family file, on the settings of this request.
    fusion = Fusion.checked(
        rule=rule,
        select=options.get("select", family.fusion.select),
        step=options.get("step", family.fusion.step),
        weights={**(family.fusion.weights if rule == family.fusion.rule else {}), **weights},
    )
    for pair in bounds.values():
        check_bounds(pair)
    # In the order of the family, so that equal requests are fused together.
    experts = tuple(name for name in family.experts if name in experts)
    limits = {name: bounds.get(name, family.experts[name].bounds) for name in experts}
    searches = RULES[rule].searches
    if fusion.select == "blend" and len(set(limits.values())) > 1 and searches:
        raise ValueError(
            f"`blend` has one weight for all experts: make their bounds equal, {limits}"
        )
    if searches:
        check_candidates(list(limits.values()), fusion.step)
    return FusionParams(
        rule=rule,
        select=fusion.select,
        step=fusion.step,
        experts=experts,
        bounds=tuple((float(low), float(high)) for low, high in limits.values()),
        weights=tuple(fusion.weights.get(e, 1.0) for e in experts) if RULES[rule].given else (),
        alone=alone,
    )
