"""The recipe of a merge: which models, by which method, with which weights.

One YAML becomes one frozen `Recipe`. Its keys are mergekit's where they mean the same; what
mergekit has beyond them is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from dlf_ray.config import converted, read_yaml
from dlf_ray.training.merging import METHODS, Method, MethodSpec, drop

FOREIGN = {
    "slices": "models are merged whole; list them under `models`",
    "modules": "models are merged whole; list them under `models`",
    "tokenizer_source": "the models have to share a tokenizer, and the base's is copied",
    "tokenizer": "the models have to share a tokenizer, and the base's is copied",
    "chat_template": "the base's is copied",
    "out_dtype": "`dtype` is what the result is saved in; it is computed in float32",
    "int8_mask": "it saves memory that is not needed here, and changes nothing else",
    "rescale": "DARE divides by the density what it keeps; `lambda` scales the result",
    "gamma": "the methods that use it are not supported",
    "epsilon": "the methods that use it are not supported",
}
"""What mergekit has and this has not, and what to do instead."""
SCALARS = ("weight", "density", "lambda", "normalize")


def _check_finite(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"`{name}` must be a number, not {value}")


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A mapping in the recipe."""


class Lines(_Section, frozen=True):
    """LiNeS: what is added to layer l of L is scaled by alpha + beta l / (L - 1)."""

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        _check_finite(alpha=self.alpha, beta=self.beta)


class ModelParameters(_Section, frozen=True):
    """What each model may have for itself."""

    weight: float | None = None
    density: float | None = None
    """The share of its shift that is kept."""

    def __post_init__(self) -> None:
        _check_finite(weight=self.weight)
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"`density` must be above 0 and at most 1, not {self.density}")


class Parameters(ModelParameters, frozen=True):
    """`weight` and `density` of the models that give none, and what concerns the whole."""

    normalize: bool | None = None
    """Whether to divide by the sum of the weights; the method's habit if not given."""
    lambda_: float = msgspec.field(default=1.0, name="lambda")
    """What the merged shifts are multiplied by before they are added to the base."""
    lines: Lines | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite(**{"lambda": self.lambda_})


class Source(_Section, frozen=True):
    """One model of the merge."""

    model: str
    """A folder (relative to the recipe) or a hub id: of a model, or of a LoRA adapter over the
    base."""
    parameters: ModelParameters = ModelParameters()


class Expert(NamedTuple):
    """One model that takes part, with what the recipe says of it in one place or another; what it
    does not say is nan."""

    model: str
    weight: float
    density: float


class Recipe(_Section, frozen=True):
    """Everything that decides what comes out."""

    merge_method: Method
    models: tuple[Source, ...]
    base_model: str | None = None
    parameters: Parameters = Parameters()
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What the result is saved in; the base's types if not given."""
    seed: int | None = None
    """Of what DARE drops; 0 if not given."""
    sha256: dict[str, str] = {}
    """Hashes that the models' files have to have; a merge writes them into its folder."""

    @property
    def method(self) -> MethodSpec:
        return METHODS[self.merge_method]

    @property
    def normalize(self) -> bool:
        given = self.parameters.normalize
        return self.method.normalize if given is None else given

    @property
    def experts(self) -> tuple[Expert, ...]:
        """Without the base, where shifts from it are merged: it has none."""
        base = self.base_model if self.method.over_base else None
        return tuple(self._expert(each) for each in self.models if each.model != base)

    def _expert(self, source: Source) -> Expert:
        own, shared = source.parameters, self.parameters
        return Expert(
            source.model,
            _first(own.weight, shared.weight),
            _first(own.density, shared.density),
        )

    def __post_init__(self) -> None:
        _check_models(self)
        _check_parameters(self)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Reads a recipe; local folders are relative to it.

        Raises `FileNotFoundError` without the file, and `ValueError` where its content is no
        recipe: the message names the place and says what is valid there.
        """
        path = Path(path)
        raw = read_yaml(path)
        try:
            _refuse_foreign(raw)
            return converted(raw, cls)._resolved(path.parent)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _resolved(self, folder: Path) -> Recipe:
        def path(value: str) -> str:
            local = folder / value
            return str(local.resolve()) if value and local.exists() else value

        return msgspec.structs.replace(
            self,
            base_model=path(self.base_model) if self.base_model else self.base_model,
            models=tuple(
                msgspec.structs.replace(each, model=path(each.model)) for each in self.models
            ),
            sha256={path(each): digest for each, digest in self.sha256.items()},
        )

    def written(self, sha256: Mapping[str, str]) -> dict[str, Any]:
        """The recipe as a file would say it in full, with the hashes of what was merged."""
        shared, method = self.parameters, self.method

        def own(expert: Expert) -> dict[str, float]:
            density = {"density": expert.density} if method.thin else {}
            return {"weight": expert.weight, **density}

        parameters: dict[str, Any] = {"normalize": self.normalize}
        if method.over_base:
            parameters["lambda"] = shared.lambda_
        if shared.lines:
            parameters["lines"] = msgspec.to_builtins(shared.lines)
        optional = {
            "base_model": self.base_model,
            "dtype": self.dtype,
            "seed": (self.seed or 0) if method.thin is drop else None,
        }
        return {
            "merge_method": self.merge_method,
            **{key: value for key, value in optional.items() if value is not None},
            "models": [{"model": each.model, "parameters": own(each)} for each in self.experts],
            "parameters": parameters,
            "sha256": dict(sha256),
        }


def _first(*values: float | None) -> float:
    """The first that is given; nan if none is."""
    return next((value for value in values if value is not None), math.nan)


def _check_models(recipe: Recipe) -> None:
    method, name = recipe.method, recipe.merge_method
    if method.over_base and not recipe.base_model:
        raise ValueError(
            f"{name} merges what the models differ in from their base: set `base_model` to it"
        )
    if not recipe.models:
        raise ValueError("`models` is empty: list the models to merge")
    named = [each.model for each in recipe.models]
    for each in recipe.models:
        if not each.model:
            raise ValueError("`model` is empty: give a local folder or a hub id")
        if named.count(each.model) > 1:
            raise ValueError(
                f"{each.model} stands twice in `models`: give it once, with one weight"
            )
        given = each.parameters != ModelParameters()
        if method.over_base and each.model == recipe.base_model and given:
            raise ValueError(
                f"{each.model} is the base, of which {name} has no shift to weigh: "
                "take its `parameters` out"
            )
    if len(recipe.experts) < method.least:
        beside = " beside the base" if method.over_base else ""
        raise ValueError(
            f"{name} merges {method.least} models or more{beside}, "
            f"and `models` has {len(recipe.experts)}"
        )
    if strange := sorted(recipe.sha256.keys() - {*named, recipe.base_model}):
        raise ValueError(f"`sha256` names {strange[0]}, which is not merged: take it out")


def _check_parameters(recipe: Recipe) -> None:
    method, name, shared = recipe.method, recipe.merge_method, recipe.parameters
    densities = [shared.density, *(each.parameters.density for each in recipe.models)]
    if not method.thin and any(each is not None for each in densities):
        others = ", ".join(other for other, row in METHODS.items() if row.thin)
        raise ValueError(f"`density` belongs to {others}; {name} keeps all: take it out")
    for each in recipe.experts:
        if math.isnan(each.weight):
            raise ValueError(
                f"{each.model} has no `weight`: give it one, or one for all in `parameters`"
            )
        if method.thin and math.isnan(each.density):
            raise ValueError(
                f"{each.model} has no `density`, the share of it that {name} keeps: "
                "give it one, or one for all in `parameters`"
            )
    weights = [each.weight for each in recipe.experts]
    if recipe.normalize and (min(weights) < 0 or sum(weights) == 0):
        raise ValueError(
            "normalized weights must be 0 or more, and not all 0: change them, or set "
            "`normalize: false` in `parameters`"
        )
    if not method.over_base and (shared.lambda_ != 1 or shared.lines):
        key = "lines" if shared.lines else "lambda"
        raise ValueError(f"`{key}` scales shifts from a base, and {name} has none: take it out")
    if method.thin is not drop and recipe.seed is not None:
        raise ValueError(f"`seed` is for what DARE drops, and {name} drops nothing: take it out")


def _refuse_foreign(raw: object) -> None:
    """Names what mergekit would understand and this does not."""
    if isinstance(raw, Mapping):
        for key, value in raw.items():
            if key in FOREIGN:
                raise ValueError(f"`{key}` of mergekit is not supported: {FOREIGN[key]}")
            if key in SCALARS and isinstance(value, list | dict):
                raise ValueError(
                    f"`{key}` must be one value: mergekit's gradients over layers and filters of "
                    "tensors are not supported (`lines` scales with depth)"
                )
            if key != "sha256":
                _refuse_foreign(value)
    elif isinstance(raw, list):
        for each in raw:
            _refuse_foreign(each)
