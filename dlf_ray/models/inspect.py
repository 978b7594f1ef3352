"""What can be known of a model without its weights: whether it is whole, and who can compute it.

Read are configurations, tokenizers, and the headers of safetensors files. The rules are those of
`loading`, `runner`, `adapters` and `vllm_runner`, as far as they can be told before anything loads;
what only a forward pass shows is left to them.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from dlf_ray.config import EngineConfig, ExpertSpec, ModelSpec
from dlf_ray.models.adapters import CONFIG, WEIGHTS, find_adapter
from dlf_ray.models.loading import (
    NOWHERE,
    check_folder,
    check_weights,
    context_of,
    end_tokens,
    load_tokenizer,
    pickled,
    windows_of,
)
from dlf_ray.models.vllm_runner import ROLLED_BACK, check_adapter, check_version
from dlf_ray.models.vocabulary import split
from dlf_ray.models.worker import backend_of
from dlf_ray.plans import ALL

HUB_TIMEOUT_S = 3.0
"""For the hub's first word; the local cache has to do where it takes longer."""
INDEX = "model.safetensors.index.json"
SMALL = (
    *("config.json", "generation_config.json", INDEX, CONFIG, "added_tokens.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("chat_template.jinja", "chat_template.json"),
)
"""What is fetched of a model on the hub."""
LEARNED_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
"""Adapters that are no change of weights."""
FRACTIONS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The types of weights that are turned into the model's own, by their names in a header."""


@dataclass(frozen=True)
class Problem:
    """Something about a family: an `error` has to change, a `warning` is what may surprise."""

    kind: Literal["error", "warning"]
    text: str
    model: str | None = None
    """Its name in the family; None where it is about the whole."""
    here: bool = False
    """Whether it may be otherwise on another machine: a folder, or a library, that is not here."""


@dataclass(frozen=True)
class Verdict:
    """Whether a backend takes a model."""

    problems: tuple[Problem, ...] = ()
    """Errors are why not; warnings, why that cannot be said."""

    @property
    def takes(self) -> bool | None:
        """None if that cannot be said."""
        kinds = {each.kind for each in self.problems}
        return False if "error" in kinds else None if kinds else True


@dataclass(frozen=True)
class Lora:
    """What an adapter says of itself."""

    kind: str
    rank: int | None
    """The highest, where layers differ."""
    targets: tuple[str, ...]
    """The modules that it changes, or one pattern of their names."""
    over: str
    """The base that it was trained over, as it names it; empty if it does not."""


@dataclass(frozen=True)
class Facts:
    """One model, as far as it is known; None is what is not."""

    source: str
    where: Literal["folder", "cache", "hub", ""] = ""
    """Where it was found: nowhere if empty."""
    architecture: str | None = None
    backend: str = "transformers"
    """Which one would compute it, in this process."""
    transformers: Verdict = Verdict()
    vllm: Verdict = Verdict()
    tokens: int | None = None
    """Of its tokenizer; an adapter over the family's base has the base's."""
    vocabulary: Mapping[str, int] | None = field(default=None, repr=False)
    split: tuple[int, ...] = field(default=(), repr=False)
    """How its tokenizer splits a sample of text."""
    chat_template: str | None = field(default=None, repr=False)
    end_tokens: tuple[int, ...] = ()
    context: int | None = None
    """Positions it was made for; None also where it does not say."""
    dtype: str | None = None
    """In which it is computed."""
    weight_bytes: int | None = None
    """In that type; of an adapter over the family's base, what comes to the base's."""
    position_bytes: int | None = None
    """Of one token's keys and values in all layers."""
    adapter: Lora | None = None
    problems: tuple[Problem, ...] = ()
    """With those of the backend that would compute it."""


class Tensor(msgspec.Struct, frozen=True):
    """A weight, by its line in a safetensors header."""

    shape: tuple[int, ...]
    dtype: str
    data_offsets: tuple[int, int]

    def nbytes(self, itemsize: int | None) -> int:
        """Once it is loaded, where numbers with a fraction get `itemsize` bytes each; as stored
        without."""
        if itemsize and self.dtype in FRACTIONS:
            return prod(self.shape) * itemsize
        return self.data_offsets[1] - self.data_offsets[0]


Tensors = Mapping[str, Tensor]


def inspect(
    spec: ModelSpec, engine: EngineConfig, base: ModelSpec | None = None, *, quick: bool = False
) -> Facts:
    """The facts of one model. `base` is the family's, for an expert that is an `adapter` over it.

    `quick` leaves out what takes long: the hub, of which the local cache has to do, and vLLM's
    registry. Nothing is raised: what is wrong is among the `problems`.
    """
    if isinstance(spec, ExpertSpec) and spec.adapter is not None:
        assert base is not None, "an adapter has a base"
        return _Look(spec.adapter, base, engine, quick).shared()
    return _Look(spec.model, spec, engine, quick).whole()


class _Look:
    """What is found out of one model, step by step."""

    def __init__(self, source: str, spec: ModelSpec, engine: EngineConfig, quick: bool) -> None:
        """`spec` is that of the worker which computes it."""
        self.source, self.spec, self.engine, self.quick = source, spec, engine, quick
        self.where: Any = ""
        self.common: list[Problem] = []
        """What is wrong with the model itself, whoever computes it."""
        self.transformers: list[Problem] = []
        self.vllm: list[Problem] = []
        self.facts: dict[str, Any] = {}
        self.tensors: Tensors = {}
        self.quantized = False

    def whole(self) -> Facts:
        """Of what stands under `model:`; that may be an adapter, which is merged at loading."""
        if folder := self._find():
            self._tokenizer(folder)
            if (folder / CONFIG).is_file():
                self._merged(folder)
            else:
                self._model(folder)
        return self._told()

    def shared(self) -> Facts:
        """Of an adapter whose rows are in one batch with those of its base."""
        if folder := self._find():
            self._adapter(folder)
            if self._peft():
                self._refusals(self.transformers, find_adapter, str(folder), self.spec.model)
            self._refusals(self.vllm, check_adapter, str(folder), self.spec.model)
            self._vllm_here()
            lora, base = self.facts.get("adapter"), self.spec.model
            if lora and lora.over and Path(lora.over).name != Path(base).name:
                self._warn(
                    f"it was trained over {lora.over}, the family's base is {base}: these have to "
                    "be the same model"
                )
            below = _Look(base, self.spec, self.engine, self.quick)
            if under := below._find():
                below._model(under)
                self._fit(below)
                self.facts = {**below.facts, **self.facts, "end_tokens": ()}
            self._weigh()
        return self._told()

    def _told(self) -> Facts:
        backend = backend_of(self.spec, self.engine)
        own = self.vllm if backend == "vllm" else self.transformers
        if backend == "vllm" and (self.spec.backend or self.engine.backend) == "auto":
            hint = " (`backend: auto` takes vLLM here; `backend: transformers` does not)"
            own = [replace(each, text=each.text + hint) for each in own]
        return Facts(
            source=self.source,
            where=self.where,
            backend=backend,
            transformers=Verdict((*self.common, *self.transformers)),
            vllm=Verdict((*self.common, *self.vllm)),
            problems=(*self.common, *own),
            **self.facts,
        )

    def _warn(self, text: str, here: bool = False) -> None:
        self.common.append(Problem("warning", text, here=here))

    def _error(self, text: str, here: bool = False) -> None:
        self.common.append(Problem("error", text, here=here))

    def _refusals(self, of: list[Problem], check: Callable[..., object], *args: object) -> None:
        """Adds what a backend's own check of an adapter raises."""
        try:
            check(*args)
        except (ValueError, KeyError, TypeError) as error:
            text = str(error) if isinstance(error, ValueError) else f"{CONFIG} lacks {error}"
            if self.where != "folder" and f"has no {WEIGHTS}" in text:
                of.append(Problem("warning", f"{self.source}: {_to_come()}"))
            else:
                of.append(Problem("error", text))

    def _find(self) -> Path | None:
        """The folder that the model, or what has been fetched of it, is in."""
        self.where, folder, problem = _find(self.source, self.spec.trust_remote_code, self.quick)
        if problem:
            self.common.append(problem)
        return folder

    def _tokenizer(self, folder: Path) -> None:
        spec = msgspec.structs.replace(self.spec, model=str(folder))
        if spec.tokenizer:
            _, own, problem = _find(spec.tokenizer, spec.trust_remote_code, self.quick)
            if problem:
                self.common.append(replace(problem, text=f"its tokenizer: {problem.text}"))
            if own is None:
                return
            spec = msgspec.structs.replace(spec, tokenizer=str(own))
        try:
            tokenizer = load_tokenizer(spec)
        except ValueError as error:
            self._error(str(error))
            return
        template: Any = getattr(tokenizer, "chat_template", None)
        eos = tokenizer.eos_token_id
        self.facts["vocabulary"] = tokenizer.get_vocab()
        self.facts["split"] = split(tokenizer)
        self.facts["tokens"] = len(tokenizer)
        self.facts["chat_template"] = json.dumps(template) if template else None
        self.facts["end_tokens"] = () if eos is None else (int(eos),)

    def _model(self, folder: Path) -> None:
        """Of a folder that has a configuration and weights of its own."""
        config = self._config(folder)
        self.tensors = self._weights(folder)
        if config is not None:
            text = config.get_text_config(decoder=True)
            self._architecture(config, text)
            self._ends(folder, text)
            self._sizes(config, text)
            self._vllm_here(self.facts["architecture"])
        self._weigh()

    def _config(self, folder: Path) -> Any:
        if not (folder / "config.json").is_file():
            self._error(
                f"{self.source} has no config.json: it is not a model saved by transformers"
            )
            return None
        try:
            return AutoConfig.from_pretrained(
                str(folder), trust_remote_code=self.spec.trust_remote_code
            )
        except Exception as error:  # configurations of every kind, each failing in its own way
            self._error(f"{self.source} has no configuration that transformers reads: {error}")
            return None

    def _architecture(self, config: Any, text: Any) -> None:
        """Whether it is a causal LM, and whether its layers can be."""
        named = (getattr(config, "architectures", None) or [None])[0]
        known = _causal_class(config)
        remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
        name = self.facts["architecture"] = named or (known and known.__name__) or config.model_type
        title = f"{self.source} ({name})"
        if getattr(config, "is_encoder_decoder", False):
            self._error(f"{title} has an encoder and a decoder: use a decoder-only model")
        elif remote and not known and not self.spec.trust_remote_code:
            self._error(f"{title} is code of its own: set `trust_remote_code: true` to run that")
        elif not known and not remote:
            self._refuse(f"{title} is not a causal LM: transformers has none of this type")
        elif known and named and known.__name__ != named:
            text_of = f"{title} is loaded as {known.__name__}, whose weights it may lack"
            self.transformers.append(Problem("warning", text_of))
        context = self.facts["context"] = context_of(text)
        if context == ALL:
            self.facts["context"] = None
        attends = getattr(text, "num_attention_heads", None) is not None
        recurrent = getattr(known, "_is_stateful", False) or not attends
        try:
            windows_of(text, self.source, min(self.engine.max_model_len, context))
            if recurrent:
                self._refuse(
                    f"{title} has recurrent layers, which a slot cache cannot hold: use a model "
                    "whose layers are all full_attention or sliding_attention"
                )
        except ValueError as error:
            self._refuse(str(error))
        odd = set(getattr(text, "layer_types", None) or ()) - ROLLED_BACK
        if recurrent or odd:
            kinds = f"layers of type {', '.join(sorted(odd))}" if odd else "recurrent layers"
            self.vllm.append(
                Problem(
                    "error", f"{title} has {kinds}, which cannot go back to an earlier position"
                )
            )

    def _refuse(self, text: str) -> None:
        self.transformers.append(Problem("error", text))

    def _ends(self, folder: Path, text: Any) -> None:
        """What ends a text: see `loading.end_tokens`."""
        file = folder / "generation_config.json"
        said = [getattr(text, "eos_token_id", None), self.facts.get("end_tokens")]
        if file.is_file():
            try:
                said.append(json.loads(file.read_text(encoding="utf-8")).get("eos_token_id"))
            except (ValueError, AttributeError) as error:
                self._warn(f"{file} cannot be read ({error})")
        self.facts["end_tokens"] = end_tokens(*said)

    def _sizes(self, config: Any, text: Any) -> None:
        """The type that it is computed in, and what a position of its cache takes."""
        self.quantized = bool(getattr(config, "quantization_config", None))
        dtype: str | None = self.spec.dtype
        if dtype == "auto":
            own = getattr(config, "dtype", None) or getattr(text, "dtype", None)
            stored = (FRACTIONS[t.dtype] for t in self.tensors.values() if t.dtype in FRACTIONS)
            dtype = str(own).removeprefix("torch.") if own else next(stored, None)
        self.facts["dtype"] = dtype
        if not dtype:
            return
        heads: Any = getattr(text, "num_attention_heads", None)
        pairs: Any = getattr(text, "num_key_value_heads", None) or heads
        layers: Any = getattr(text, "num_hidden_layers", None)
        if not all(isinstance(each, int) and each for each in (heads, pairs, layers)):
            return
        size = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // heads
        self.facts["position_bytes"] = (
            2 * layers * pairs * size * getattr(torch, dtype).itemsize or None
        )

    def _weights(self, folder: Path) -> Tensors:
        """Of all files, which have to be there and whole."""
        files = {file.name for file in folder.glob("*.safetensors")}
        if not files:
            return self._weights_to_come()
        try:
            check_weights(folder)
            index = folder / INDEX
            if "model.safetensors" in files or not index.is_file():
                wanted = {"model.safetensors"} & files or files
                return {k: t for name in sorted(wanted) for k, t in _header(folder / name).items()}
            places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError) as error:
            self._error(str(error) if "damaged" in str(error) else f"{folder}: {error!r}")
            return {}
        shards = sorted(set(places.values()))
        if absent := [name for name in shards if name not in files]:
            if self.where != "folder":
                return self._weights_to_come()
            self._error(
                f"{self.source} lacks {len(absent)} of its {len(shards)} safetensors files, "
                f"{absent[0]} first: download or copy it again"
            )
            return {}
        headers = {name: _header(folder / name) for name in shards}
        if lost := [key for key, name in places.items() if key not in headers[name]]:
            self._error(
                f"{self.source} lacks {len(lost)} weights that its index lists, {lost[0]} first: "
                "download or copy it again"
            )
        return {key: each for header in headers.values() for key, each in header.items()}

    def _weights_to_come(self) -> Tensors:
        """There are none: an error of a folder, while those of a hub's model can be fetched."""
        if self.where == "folder":
            self._error(pickled(self.source))
        elif self.where == "hub":
            from huggingface_hub import get_safetensors_metadata
            from huggingface_hub.errors import NotASafetensorsRepoError

            try:
                told = get_safetensors_metadata(self.source, timeout=HUB_TIMEOUT_S)
                return {
                    key: Tensor(tuple(each.shape), each.dtype, each.data_offsets)
                    for file in told.files_metadata.values()
                    for key, each in file.tensors.items()
                }
            except NotASafetensorsRepoError:
                self._error(pickled(self.source))
            except Exception as error:  # of many kinds from the net
                self._warn(f"the hub does not say how large {self.source} is ({error})")
        else:
            self._warn(f"{self.source}: {_to_come()}")
        return {}

    def _weigh(self) -> None:
        dtype = self.facts.get("dtype")
        itemsize = getattr(torch, dtype).itemsize if dtype and not self.quantized else None
        sizes = [each.nbytes(itemsize) for each in self.tensors.values()]
        self.facts["weight_bytes"] = sum(sizes) or None

    def _adapter(self, folder: Path) -> None:
        """What an adapter says of itself, and its weights."""
        try:
            said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            ranks = [said.get("r"), *(said.get("rank_pattern") or {}).values()]
            targets = said.get("target_modules") or ()
            self.facts["adapter"] = Lora(
                kind=str(said.get("peft_type")),
                rank=max((each for each in ranks if isinstance(each, int)), default=None),
                targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
                over=str(said.get("base_model_name_or_path") or ""),
            )
        except FileNotFoundError:
            return  # the backends' checks say so
        except (ValueError, AttributeError, TypeError) as error:
            self._error(f"{CONFIG} of {self.source} cannot be read ({error}): copy it again")
            return
        try:
            check_weights(folder)
            self.tensors = _header(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else {}
        except (OSError, ValueError) as error:
            self._error(str(error))

    def _peft(self) -> bool:
        """Whether what adapters need is here."""
        if importlib.util.find_spec("peft") is not None:
            return True
        text = f'the adapter {self.source} needs peft: pip install "dlf_ray[adapters]"'
        kind: Any = "warning" if self.spec.runtime_env else "error"
        self.transformers.append(Problem(kind, text, here=True))
        return False

    def _merged(self, folder: Path) -> None:
        """Of an adapter that is merged into a copy of the base that it names."""
        self._adapter(folder)
        self._peft()
        self.vllm.append(
            Problem(
                "error",
                f"{self.source} is an adapter: vLLM takes it as `adapter:` over the family's base, "
                "not merged",
            )
        )
        lora = self.facts.get("adapter")
        if lora is None:
            return
        if lora.kind in LEARNED_PROMPTS:
            self._error(
                f"{self.source} is of type {lora.kind}, which cannot be merged into weights"
            )
        if not self.tensors and self.where == "folder" and not (folder / WEIGHTS).is_file():
            self._error(f"{self.source} has no {WEIGHTS}: save it with save_pretrained of peft")
        if not lora.over:
            self._error(f"{folder / CONFIG} names no `base_model_name_or_path` to put it on")
            return
        spec = msgspec.structs.replace(self.spec, model=lora.over)
        below = _Look(lora.over, spec, self.engine, self.quick)
        if under := below._find():
            below._model(under)
            self._fit(below)
        for mine, theirs in (
            (self.common, below.common),
            (self.transformers, below.transformers),
            (self.vllm, below.vllm),
        ):
            mine += [replace(each, text=f"its base: {each.text}") for each in theirs]
        self.facts = {**self.facts, **below.facts}

    def _fit(self, base: _Look) -> None:
        """Whether the adapter's weights go with those of the base, as far as names match."""
        modules: dict[str, dict[str, int]] = {}
        for key, tensor in self.tensors.items():
            found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
            if found and len(tensor.shape) == 2:
                modules.setdefault(found[1], {})[found[2]] = tensor.shape[found[2] == "A"]
        weights = {name: base.tensors.get(f"{name}.weight") for name in modules}
        if base.quantized or not any(weights.values()):
            return  # packed, or saved under other names
        misfit = (
            f"the adapter {self.source} does not fit {base.source}: use the model that it was "
            f"trained over ({self.facts['adapter'].over or 'it names none'})"
        )
        for name, weight in weights.items():
            own = sorted(modules[name].values())
            if weight is None:
                return self._error(f"{misfit}; {name}, which it changes, is not there")
            if len(own) == 2 and own != sorted(weight.shape):
                return self._error(
                    f"{misfit}; {name} has {list(weight.shape)} numbers there, it expects {own} in "
                    "some order"
                )

    def _vllm_here(self, architecture: str | None = None) -> None:
        """Whether this environment has a vLLM that is known, and that knows the architecture."""
        try:
            check_version()
        except ValueError as error:
            kind: Any = "warning" if self.spec.runtime_env else "error"
            self.vllm.append(Problem(kind, str(error), here=True))
            return
        if self.quick or architecture is None:
            return
        registry = _vllm_registry()
        if isinstance(registry, str):
            text = f"vLLM is installed here, but cannot be imported: {registry}"
            self.vllm.append(Problem("warning", text, here=True))
        elif architecture not in registry:
            text = (
                f"{architecture} is not in vLLM's registry; vLLM may compute it by the code of "
                "transformers"
            )
            self.vllm.append(Problem("warning", text, here=True))


def _to_come() -> str:
    return "its weights are not in the local cache, they are fetched when it is loaded"


def _causal_class(config: Any) -> Any:
    """What transformers has for the configuration, None if nothing."""
    try:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except (KeyError, ImportError):
        return None
    return found[0] if isinstance(found, tuple | list) else found


def _header(file: Path) -> dict[str, Tensor]:
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        lines: dict[str, Any] = msgspec.json.decode(opened.read(length))
    lines.pop("__metadata__", None)
    return msgspec.convert(lines, dict[str, Tensor])


def _find(
    name: str, code: bool, quick: bool
) -> tuple[Literal["folder", "cache", "hub", ""], Path | None, Problem | None]:
    """Where a model is, the folder of what there is of it on this disk, and why there is none.

    `code` fetches a model's own code beside its configuration; `quick` asks no hub, and says of
    what is not in the cache only that it was not found.
    """
    try:
        check_folder(name)
    except ValueError as error:
        return "", None, Problem("error", str(error), here=True)
    if Path(name).is_dir():
        return "folder", Path(name), None
    from huggingface_hub import model_info, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    answers, silence = False, ""
    if not quick:
        try:
            model_info(name, timeout=HUB_TIMEOUT_S)
            answers = True
        except (HFValidationError, RepositoryNotFoundError) as error:
            return "", None, Problem("error", f"{name}: {NOWHERE} ({_line(error)})", here=True)
        except Exception as error:  # of many kinds from the net
            silence = _line(error)
    try:
        patterns = [*SMALL, *(["*.py"] if code else [])]
        folder = snapshot_download(
            name, allow_patterns=patterns, local_files_only=not answers, max_workers=2
        )
    except Exception as error:
        if quick:
            return "", None, None
        text = f"{name}: there is no such folder, and it is not in the local cache of the Hugging "
        text += f"Face hub, which does not give it either ({silence or _line(error)})"
        return "", None, Problem("error", text, here=True)
    return "hub" if answers else "cache", Path(folder), None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


@functools.cache
def _vllm_registry() -> frozenset[str] | str:
    """The architectures that vLLM knows; why it cannot be asked else."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm import ModelRegistry

        return frozenset(ModelRegistry.get_supported_archs())
    except Exception as error:  # of a build for another machine, say
        return f"{type(error).__name__}: {error}"
