"""Models and LoRA adapters on disk, as what a merge takes of them: one tensor at a time.

Weights come from safetensors only, since pickled ones can run code when they are loaded. Nothing
here is ever a model that could compute: names, shapes, and numbers once they are asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from dlf_ray.models.adapters import CONFIG as ADAPTER_CONFIG
from dlf_ray.models.adapters import WEIGHTS as ADAPTER_WEIGHTS
from dlf_ray.models.adapters import beyond_lora, config_of, tensors_of_adapter
from dlf_ray.models.files import (
    INDEX,
    WHOLE,
    Tensors,
    check_configured,
    files_of,
    folder_of,
    header,
    tensors_of,
)
from dlf_ray.models.vocabulary import differences
from dlf_ray.training.merging import layer_of

CONFIG = "config.json"
TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.jinja", "additional_chat_templates/*", "*.model", "*.tiktoken"),
)
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The types whose numbers are merged, by the name that safetensors has for them."""
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
SIZES |= {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of a number of each type that models have which are not quantised."""
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
"""What may be tied to them, and then stands in a file once or twice."""
ALIKE = (
    *("model_type", "hidden_act", "num_attention_heads", "n_head", "num_key_value_heads"),
    *("head_dim", "sliding_window", "rope_theta", "rope_parameters", "rope_scaling"),
    "tie_word_embeddings",
)
"""Settings that change what weights of the same shapes compute."""


class Stored(NamedTuple):
    """Where a tensor is, and what it is like."""

    file: Path
    dtype: str
    """By the name that safetensors has for it."""
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


class Model:
    """A whole model in a folder. Raises `ValueError`, saying what to do, where there is none."""

    def __init__(self, source: str, folder: Path) -> None:
        self.source, self.folder = source, folder
        check_configured(folder)
        self.config: Mapping[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors_of(folder, source)  # whether all are there, and whole
        self.files = files_of(folder, source)
        self.tensors = {
            name: stored
            for file in self.files
            for name, stored in _stored(file, header(file)).items()
        }
        types = {each.dtype for each in self.tensors.values()}
        if "quantization_config" in self.config or types - SIZES.keys():
            raise ValueError(f"{source} is quantised: merge it as it was before that")
        self.embedding = next((name for name in self.tensors if name.endswith(EMBEDDINGS)), None)
        self.head = next((name for name in self.tensors if name in HEADS), None)
        self._called: dict[str, str] = {}

    @property
    def tied(self) -> bool:
        """Whether the output embeddings are the input ones, which then stand in its files once or
        twice."""
        return bool(self.config.get("tie_word_embeddings")) or not (self.embedding and self.head)

    @property
    def names(self) -> list[str]:
        """Its tensors; of two that are tied, one."""
        doubled = self.head if self.tied and self.embedding else None
        return [name for name in self.tensors if name != doubled]

    @property
    def layers(self) -> int:
        return 1 + max((layer_of(name) or 0 for name in self.tensors), default=0)

    def read(self, name: str) -> Tensor:
        """A tensor as it is saved. The file is opened for each, since what was read of an open one
        stays in memory."""
        name = self._called.get(name, name)
        with safe_open(self.tensors[name].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def value(self, name: str, base: Tensor) -> Tensor:
        """Its own tensor, float32."""
        return self.read(name).float()

    def shift(self, name: str, base: Tensor) -> Tensor:
        """Its tensor minus that of the base, float32."""
        return self.read(name).float() - base

    def check(self, base: Model) -> None:
        """Raises `ValueError` where it cannot have come from the base, with what differs first."""
        for name in base.names:
            stored = base.tensors[name]
            if stored.dtype in FLOATS:
                self._check_tensor(name, stored, base)
        tied = [name for name in (self.embedding, self.head) if name and base.tied]
        if len(tied) == 2 and not torch.equal(*map(self.read, tied)):
            raise ValueError(f"{self.source} has a {tied[1]} of its own, which {base.source} lacks")
        for name in sorted(self.tensors.keys() - {*base.tensors, *tied}):
            if self.tensors[name].dtype in FLOATS:
                raise ValueError(f"{self.source} has {name}, which {base.source} lacks")
        if key := next((key for key in ALIKE if _differ(self.config, base.config, key)), None):
            raise ValueError(
                f"{base.source} and {self.source} are models of different kinds: `{key}` in "
                f"{CONFIG} is {base.config[key]} in one and {self.config[key]} in the other"
            )

    def _check_tensor(self, name: str, stored: Stored, base: Model) -> None:
        other = self.embedding or self.head
        if name not in self.tensors and base.tied and name in (base.embedding, base.head) and other:
            self._called[name] = other
        own = self.tensors.get(self._called.get(name, name))
        if not own:
            raise ValueError(f"{self.source} lacks {name}, which {base.source} has")
        if own.dtype not in FLOATS or own.shape != stored.shape:
            raise ValueError(
                f"{name} is {_said(stored)} in {base.source} and {_said(own)} in {self.source}: "
                "only models that were trained from one base can be merged"
            )


class Adapter:
    """A LoRA adapter, whose shift is a product of two matrices for each module that it changes."""

    def __init__(self, source: str, folder: Path) -> None:
        self.source, self.folder = source, folder
        self.config = config_of(source, folder)
        self.files = [folder / ADAPTER_WEIGHTS, folder / ADAPTER_CONFIG]
        beyond = "sets `lora_bias`" if self.config.get("lora_bias") else beyond_lora(self.config)
        if beyond:
            raise self._unmerged(beyond)
        self.tensors = _stored(self.files[0], tensors_of_adapter(source, folder))
        self._factors: dict[str, tuple[str, str, float]] = {}

    def value(self, name: str, base: Tensor) -> Tensor:
        """What the base's tensor is with the adapter, float32."""
        return base + self.shift(name, base)

    def shift(self, name: str, base: Tensor) -> Tensor:
        """What the adapter adds to a tensor of the base, float32: scale B A (arXiv 2106.09685)."""
        if name not in self._factors:
            return torch.zeros_like(base)
        first, second, scale = self._factors[name]
        with safe_open(self.files[0], framework="pt") as file:
            product: Tensor = file.get_tensor(second).float() @ file.get_tensor(first).float()
        return scale * (product.T if self.config.get("fan_in_fan_out") else product)

    def check(self, base: Model) -> None:
        """Raises `ValueError` where it does not fit the base, or says that it has another."""
        self._check_base(base)
        for key in self.tensors:
            prefix, _, end = key.rpartition(".lora_")
            if end not in ("A.weight", "B.weight"):
                raise self._unmerged(f"has {key}, which is more than a product for each module")
            self._add(prefix, base)

    def _add(self, prefix: str, base: Model) -> None:
        first, second = f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"
        module = prefix.removeprefix("base_model.model.")
        name = f"{module}.weight"
        if name not in base.tensors:  # files of some bases leave the model's own name out
            name = name.partition(".")[2]
        if base.tied and (name in HEADS or name.endswith(EMBEDDINGS)):
            raise self._unmerged(f"changes {module}, which {base.source} has tied to another")
        if name not in base.tensors:
            raise ValueError(
                f"the adapter {self.source} changes {module}, and {base.source} has none: set "
                "`base_model` to the model that it was trained over"
            )
        if missing := [key for key in (first, second) if key not in self.tensors]:
            raise ValueError(f"{self.source} has no {missing[0]}: copy it again")
        rank, scale = self._scale(module)
        if odd := [key for key in (first, second) if len(self.tensors[key].shape) != 2]:
            raise self._unmerged(f"has {odd[0]}, which is no matrix")
        (ranks, inputs), (outputs, same) = (self.tensors[key].shape for key in (first, second))
        shape = (inputs, outputs) if self.config.get("fan_in_fan_out") else (outputs, inputs)
        if base.tensors[name].shape != shape or not ranks == same == rank:
            raise ValueError(
                f"{name} is {_said(base.tensors[name])} in {base.source}, and the adapter "
                f"{self.source} has {_said(self.tensors[second])} times "
                f"{_said(self.tensors[first])} of rank {rank} for it: set `base_model` to the "
                "model that it was trained over"
            )
        self._factors[name] = (first, second, scale)

    def _scale(self, module: str) -> tuple[int, float]:
        """The rank and the scale of a module, as PEFT has them."""

        def of(pattern: str, otherwise: str) -> Any:
            for key, value in (self.config.get(pattern) or {}).items():
                if re.match(rf"(.*\.)?({key})$", module):
                    return value
            return self.config.get(otherwise, 8)

        rank, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
        return rank, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _check_base(self, base: Model) -> None:
        """By the folder, by what is in it if that is another one here, else by the name's end."""
        said = str(self.config.get("base_model_name_or_path") or "")
        if not said or Path(said).resolve() == base.folder.resolve():
            return
        if (Path(said) / CONFIG).is_file():
            same = digest(Model(said, Path(said)).files) == digest(base.files)
        else:
            same = Path(said).name.lower() == Path(base.source).name.lower()
        if not same:
            raise ValueError(
                f"the adapter {self.source} was trained over {said}, not over {base.source}: set "
                "`base_model` to that model, or, if they are the same, correct "
                f"`base_model_name_or_path` in its {ADAPTER_CONFIG}"
            )

    def _unmerged(self, why: str) -> ValueError:
        return ValueError(
            f"the adapter {self.source} {why}: merge it into a copy of its base with peft first, "
            "and give that instead"
        )


def open_model(source: str) -> Model | Adapter:
    """What a folder or a hub id has. Raises `ValueError`, saying what to do, where it has none."""
    folder = _folder(source)
    whole = any((folder / name).is_file() for name in (WHOLE, INDEX))
    if (folder / ADAPTER_CONFIG).is_file() and not whole:
        return Adapter(source, folder)
    return Model(source, folder)


def digest(files: Iterable[Path], on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """The SHA-256 of files, one after the other."""
    found = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                found.update(chunk)
                on_bytes(len(chunk))
    return found.hexdigest()


def check_tokenizers(base: Model, other: Model | Adapter) -> None:
    """Raises `ValueError` unless both give the same tokens the same ids; one that has no tokenizer
    uses the base's."""
    ours, theirs = (each.folder / "tokenizer.json" for each in (base, other))
    if ours.is_file() and theirs.is_file():
        names = base.source, other.source
        if told := differences(_vocabulary(ours), _vocabulary(theirs), names)[1]:
            raise ValueError(f"{names[0]} and {names[1]} do not share a tokenizer: {told}")
        return
    for name in ("tokenizer.model", "vocab.json", "vocab.txt"):
        ours, theirs = base.folder / name, other.folder / name
        if ours.is_file() and theirs.is_file() and ours.read_bytes() != theirs.read_bytes():
            raise ValueError(
                f"{base.source} and {other.source} do not share a tokenizer: {name} differs"
            )


def copied(base: Model) -> list[Path]:
    """What a model has beside its weights: settings and tokenizer, relative to its folder."""
    patterns = (CONFIG, "generation_config.json", *TOKENIZER, "*.py", "LICENSE*", "NOTICE*")
    found = {path for pattern in patterns for path in base.folder.glob(pattern)}
    return sorted(path.relative_to(base.folder) for path in found if path.is_file())


def _vocabulary(path: Path) -> Mapping[str, int]:
    try:
        vocabulary: Mapping[str, int] = Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # the library has no narrower one
        raise ValueError(f"{path} cannot be read as a tokenizer ({error})") from error
    return vocabulary


def _folder(source: str) -> Path:
    if "+" in source and not Path(source).is_dir():
        raise ValueError(
            f"{source}: mergekit's BASE+ADAPTER is not supported; give the adapter alone, and its "
            "base as `base_model`"
        )
    patterns = [CONFIG, "generation_config.json", "*.safetensors", INDEX, ADAPTER_CONFIG]
    return folder_of(source, [*patterns, *TOKENIZER])


def _stored(file: Path, tensors: Tensors) -> dict[str, Stored]:
    return {name: Stored(file, each.dtype, each.shape) for name, each in tensors.items()}


def _differ(a: Mapping[str, Any], b: Mapping[str, Any], key: str) -> bool:
    """Whether both say something, and not the same: what is not said is the kind's habit."""
    return None not in (a.get(key), b.get(key)) and a[key] != b[key]


def _said(stored: Stored) -> str:
    return f"{stored.dtype} {list(stored.shape)}"
