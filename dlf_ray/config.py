"""The family file: which models speak together, how they are fused, how the engine runs.

One YAML becomes one frozen `Family`. Every default stands here, once; an unknown key or a wrong
type is a `ValueError` that names the place and lists what is valid there. msgspec does the typed
decoding (it also encodes everything on the wire, see `messages`), so there is one validator.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml

from dlf_ray.params import MAX_WEIGHT, check_candidates
from dlf_ray.rules import RULES, Rule, Select

DType = Literal["auto", "float32", "bfloat16", "float16"]
Backend = Literal["auto", "transformers", "vllm"]

LOGITS_BYTES = 2**25
"""Of one model in one step."""
PATHS = ("model", "tokenizer", "adapter")
"""The fields of a model that may name a folder or a file, relative to the family file."""
LARGE, BASE = "large", "base"
"""The fixed names of two models of every family; all other names are experts."""
GPU_SHARE = 0.1
"""What the coordinator takes of the large model's GPU, unless the file says what it has."""


def is_gguf(source: str) -> bool:
    """Whether what stands for a model, or for a tokenizer, is a GGUF file."""
    return source.lower().endswith(".gguf")


def check_bounds(bounds: tuple[float, float]) -> None:
    if not -math.inf < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"`bounds` must be [low, high] with low < high, not {list(bounds)}")
    if max(map(abs, bounds)) > MAX_WEIGHT:
        raise ValueError(f"`bounds` must be within -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}")


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A mapping in the family file."""


class ActorOptions(_Section, frozen=True):
    """What an actor asks of the cluster, in Ray's words for it."""

    num_cpus: float | None = None
    """CPUs; torch uses as many threads (at least one). If not given, one; where the cluster is one
    machine that has too few, an equal share of them."""
    memory: int | None = None
    """Main memory in bytes, where the node has to have room for it."""
    accelerator_type: str | None = None
    """Which GPU, by Ray's name for it, such as `A100`."""
    resources: dict[str, float] = {}
    """Custom resources that the node has to have, and how much of them is taken."""
    label_selector: dict[str, str] = {}
    """Labels that the node has to have; only Ray's second autoscaler starts nodes for them."""

    def __post_init__(self) -> None:
        if self.num_cpus is not None and not self.num_cpus > 0:
            raise ValueError("`num_cpus` must be above 0 (fractions are fine)")
        if self.memory is not None and self.memory < 1:
            raise ValueError(f"`memory` is a number of bytes above 0, not {self.memory}")
        for name, amount in self.resources.items():
            own = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}.get(name)
            if own:
                raise ValueError(f"`resources` are custom ones: {name} is set by `{own}`")
            if not 0.0001 <= amount < math.inf:
                raise ValueError(f"`resources` must be 0.0001 or more, not {name}: {amount}")


def _check_gpus(num_gpus: float) -> None:
    if not 0 <= num_gpus < math.inf:
        raise ValueError("`num_gpus` must be 0 or more (fractions are fine)")
    if num_gpus > 1 and num_gpus != int(num_gpus):
        raise ValueError(f"`num_gpus` above 1 must be a whole number, not {num_gpus}")


def _defaults(cls: type[msgspec.Struct]) -> dict[str, Any]:
    """What each field is where the file does not say."""
    return {
        each.name: each.default if each.default is not msgspec.NODEFAULT else each.default_factory()
        for each in msgspec.structs.fields(cls)
        if not each.required
    }


class ModelSpec(ActorOptions, frozen=True, kw_only=True):
    """One causal language model of the Hugging Face kind, and what its actor may use."""

    model: str
    """A local folder (relative to the family file), a Hugging Face hub id, or a GGUF file."""
    num_gpus: float = 0
    """GPUs; 0 runs on CPU, a fraction shares one, more than 1 spreads a model's layers. A process
    is held to its share of the memory."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not beside the weights."""
    dtype: DType = "auto"
    """`auto` is what the checkpoint says; float32 for a GGUF file whose weights are packed."""
    trust_remote_code: bool = False
    backend: Backend | None = None
    """What computes it; the engine's if not given."""
    runtime_env: dict[str, Any] = {}
    """The environment of its actor, as Ray takes it: `py_executable`, `pip`, `conda`, ..."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in PATHS:  # of this user, wherever the actor runs
            value = getattr(self, name, None)
            if value and value.startswith("~"):
                msgspec.structs.force_setattr(self, name, os.path.expanduser(value))
        _check_gpus(self.num_gpus)
        self._check_source()

    def _check_source(self) -> None:
        if not self.model:
            raise ValueError("`model` is empty: give a local folder or a hub id")

    @property
    def source(self) -> str:
        """Where it comes from, for people: a folder or a hub id."""
        return self.model


class ExpertSpec(ModelSpec, frozen=True):
    """A small fine-tuned model; its weight stays within `bounds`."""

    model: str = ""
    adapter: str | None = None
    """Instead of `model`: a LoRA adapter over the base. It is computed by the base's worker, in one
    batch with the base and its other adapters, over one copy of the weights. Beside `model`: an
    adapter that is merged into a copy of that model, in a worker of its own."""
    bounds: tuple[float, float] = (0.0, 2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self.bounds)

    def _check_source(self) -> None:
        if self.adapter is None:
            return super()._check_source()
        if not self.adapter:
            raise ValueError("`adapter` is empty: give a local folder or a hub id")
        if self.model:
            return
        for name, default in _defaults(type(self)).items():
            if name not in ("adapter", "bounds") and getattr(self, name) != default:
                raise ValueError(
                    f"`{name}` is the base's, whose worker computes the adapter: leave it out, or "
                    "name the base as `model` for a worker of its own"
                )

    @property
    def shares_base(self) -> bool:
        """Whether it is an adapter that the base's worker computes."""
        return self.adapter is not None and not self.model

    @property
    def source(self) -> str:
        return self.adapter or self.model


class Fusion(_Section, frozen=True):
    """How weights are found at each step; the defaults are the paper's."""

    rule: Rule = "grid"
    """How the weights are found; `rules.RULES` has them all."""
    step: float = 0.1
    """Distance between two candidates of the grid."""
    select: Select = "paper"
    """Which of several experts speaks; `rules.SELECTS` has them all."""
    weights: dict[str, float] = {}
    """For `static`: the weight of each expert; an expert not named has 1.0 (proxy tuning)."""

    @classmethod
    def checked(cls, **values: object) -> Fusion:
        """From values of unknown types; errors as in `Family.from_dict`."""
        return converted(values, cls)

    def __post_init__(self) -> None:
        if not 0 < self.step <= 2:
            raise ValueError(f"`step` must be above 0 and at most 2, not {self.step}")
        if not all(abs(weight) <= MAX_WEIGHT for weight in self.weights.values()):
            raise ValueError(
                f"`weights` must be within -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}, not {self.weights}"
            )
        if self.weights and not RULES[self.rule].given:
            raise ValueError(f"`weights` belong to rule static; rule {self.rule} finds its own")


class EngineConfig(ActorOptions, frozen=True):
    """Limits of one engine, and what its coordinator asks of the cluster.

    The coordinator fuses on a GPU if it has one.
    """

    backend: Backend = "auto"
    """What computes the models: `transformers`, `vllm`, or `auto`, which takes vLLM where that is
    installed and the model has a GPU."""
    num_gpus: float | None = None
    """GPUs; 0 fuses on CPU. If not given, a share of the large model's: `Family.with_gpu_share`."""
    max_num_seqs: int = 64
    """Sequences decoded together (slots in every model's cache)."""
    max_model_len: int = 4096
    """Tokens of a sequence, prompt included; a model with a shorter context lowers it."""
    max_num_batched_tokens: int = 2048
    """Tokens that one model computes in one step; longer prompts are cut into chunks."""
    enable_prefix_caching: bool = True
    """Sequences that begin alike start from a copy of what another has computed."""
    generation_config: Literal["auto", "none"] = "none"
    """Sampling of requests that say nothing of it: with `auto`, as the large model's
    generation_config.json recommends."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    placement_timeout_s: float = 60.0
    """How long to wait for resources that others are using, and for nodes that are started."""
    step_timeout_s: float = 300.0
    """A model that has not answered a step for so long hangs: its process is killed, and restarted
    like any that died."""
    start_timeout_s: float = 3600.0
    """How long the models may take to load, downloads included."""
    on_expert_loss: Literal["wait", "drop"] = "wait"
    """While an expert restarts, its requests wait for it, or go on without it."""

    def max_rows(self, vocab: int) -> int:
        """Rows of logits that a model gives in one step: one for each running sequence, and more
        for scoring, as far as `LOGITS_BYTES` hold them in float32."""
        return max(self.max_num_seqs, min(self.max_num_batched_tokens, LOGITS_BYTES // (4 * vocab)))

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_gpus(self.num_gpus or 0)
        for name in ("max_num_seqs", "max_model_len", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"`max_num_batched_tokens` ({self.max_num_batched_tokens}) must be at least "
                f"`max_num_seqs` ({self.max_num_seqs}): every running sequence decodes one token"
            )


class Family(_Section, frozen=True):
    """A large model, the small base, and the small experts that were fine-tuned from the base."""

    large: ModelSpec
    base: ModelSpec
    experts: dict[str, ExpertSpec]
    fusion: Fusion = Fusion()
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        for name in self.experts:
            if name in (LARGE, BASE) or not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(
                    f"`{name}` cannot name an expert: use letters, digits, `.`, `_`, `-`, "
                    f"and neither `{LARGE}` nor `{BASE}`"
                )
        if unknown := set(self.fusion.weights) - set(self.experts):
            raise ValueError(
                f"`fusion.weights` names {sorted(unknown)}, which are not experts of the family; "
                f"its experts are {sorted(self.experts)}"
            )
        if RULES[self.fusion.rule].searches:
            check_candidates([each.bounds for each in self.experts.values()], self.fusion.step)

    @property
    def models(self) -> dict[str, ModelSpec]:
        """Every model by name: large, base, then the experts in the order of the file."""
        return {LARGE: self.large, BASE: self.base, **self.experts}

    def title(self, name: str) -> str:
        """A model, for people: its name, and where it comes from."""
        return f"{name} ({self.models[name].source})"

    @property
    def workers(self) -> dict[str, tuple[str, ...]]:
        """The models that each worker serves, by its name, which is that of the first: adapters are
        served with the base."""
        adapters = tuple(name for name, spec in self.experts.items() if spec.shares_base)
        own = {name: (name,) for name in self.models if name not in adapters}
        return {**own, BASE: (BASE, *adapters)}

    @property
    def with_gpu_share(self) -> Family:
        """The family with `engine.num_gpus` set, if it was not.

        The share is taken from the large model's, so that a family that fits a cluster still does.
        There is none where the large model has no GPU or several (Ray gives those whole), or where
        the coordinator is to be in another place.
        """
        large, engine = self.large, self.engine
        if engine.num_gpus is not None:
            return self
        apart = engine.placement_strategy == "STRICT_SPREAD" or any(
            getattr(engine, place) and getattr(engine, place) != getattr(large, place)
            for place in ("accelerator_type", "resources", "label_selector")
        )
        share = 0.0 if apart or large.num_gpus > 1 else min(GPU_SHARE, large.num_gpus / 2)
        return msgspec.structs.replace(
            self,
            large=msgspec.structs.replace(large, num_gpus=round(large.num_gpus - share, 4)),
            engine=msgspec.structs.replace(engine, num_gpus=round(share, 4)),
        )

    @property
    def digest(self) -> str:
        """A hash of everything the file says, for provenance."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:16]

    @classmethod
    def from_yaml(cls, path: str | Path) -> Family:
        """Reads a family file; local model folders are relative to it.

        Raises `FileNotFoundError` without the file, and `ValueError` where its content is not a
        family: the message names the place and lists what is valid there.
        """
        path = Path(path)
        raw = read_yaml(path)
        try:
            family = cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return family._resolved(path.parent)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Family:
        """A family from nested mappings, as YAML or JSON give them; errors as in `from_yaml`."""
        return converted(raw, cls)

    def _resolved(self, folder: Path) -> Family:
        def resolve(spec: Any) -> Any:
            def path(value: str) -> str:
                local = folder / value
                return str(local.resolve()) if local.exists() else value

            own = {name: path(getattr(spec, name)) for name in PATHS if getattr(spec, name, None)}
            return msgspec.structs.replace(spec, **own)

        return msgspec.structs.replace(
            self,
            large=resolve(self.large),
            base=resolve(self.base),
            experts={name: resolve(spec) for name, spec in self.experts.items()},
        )


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML forbids it, PyYAML would silently keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(
                    f"`{key.value}` stands twice in one mapping, in line {lines[key.value]} and "
                    f"in line {line}: rename or remove one"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Raises `FileNotFoundError` and `ValueError` that name the file."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except yaml.YAMLError as error:
        hint = " (indent with spaces, not tabs)" if "\\t" in str(error) else ""
        raise ValueError(f"{path} is not valid YAML{hint}: {error}") from None


_T = TypeVar("_T")


def converted(raw: object, cls: type[_T]) -> _T:
    """`raw` as `cls`; the `ValueError` lists valid keys or values, msgspec's names the place."""
    try:
        return msgspec.convert(raw, cls)
    except msgspec.ValidationError as error:
        message = str(error)
    match = re.search(r"`(\$[^`]*)`", message)
    section: Any = cls
    for part in re.findall(r"\.(\w+)|\[[^]]+\]", match.group(1) if match else "$"):
        section = _below(section, part)
    if "unknown field" in message and isinstance(section, type):
        valid = sorted(field.encode_name for field in msgspec.structs.fields(section))
        message += f"; valid keys there: {', '.join(valid)}"
    elif "Invalid enum value" in message and get_args(section):
        message += f"; valid values: {', '.join(map(str, get_args(section)))}"
    raise ValueError(message)


def _below(section: Any, key: str) -> Any:
    """The type of what stands under `key` in a section, or of each part of a container."""
    if not key:
        parts = [each for each in get_args(section) if each is not Ellipsis]
        return parts[-1] if parts else None
    if not (isinstance(section, type) and issubclass(section, msgspec.Struct)):
        return None
    names = {each.encode_name: each.name for each in msgspec.structs.fields(section)}
    hint = get_type_hints(section).get(names.get(key, key))
    given = [each for each in get_args(hint) if each is not type(None)]
    return given[0] if get_origin(hint) in (Union, UnionType) and len(given) == 1 else hint
