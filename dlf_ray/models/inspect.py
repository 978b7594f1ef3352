"""What can be known of a model without its weights: whether it is whole, and who can compute it.

Read are configurations, tokenizers, and the headers of safetensors files. The rules are those of
`loading`, `runner`, `adapters` and `vllm_runner`, as far as they can be told before anything loads;
what only a forward pass shows is left to them.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from dlf_ray.config import EngineConfig, ExpertSpec, ModelSpec, is_gguf
from dlf_ray.models import gguf
from dlf_ray.models.adapters import (
    CONFIG,
    HEADS,
    WEIGHTS,
    check_peft,
    config_of,
    find_adapter,
    tensors_of_adapter,
)
from dlf_ray.models.facts import Facts, Lora, Problem, Verdict
from dlf_ray.models.files import (
    FRACTIONS,
    Tensors,
    files_of,
    has_tokenizer,
    pickled,
    tensors_of,
)
from dlf_ray.models.hub import find, tensors_on_hub
from dlf_ray.models.loading import (
    base_of,
    causal_class,
    check_causal,
    check_quantized,
    configuration,
    context_of,
    end_tokens,
    load_tokenizer,
    placed,
    unused_weights,
    weights_problem,
    windows_of,
)
from dlf_ray.models.merging import check_mergeable
from dlf_ray.models.vllm_runner import ROLLED_BACK, check_adapter, check_source, check_version
from dlf_ray.models.vocabulary import split
from dlf_ray.models.worker import backend_of
from dlf_ray.plans import ALL


def inspect(
    spec: ModelSpec, engine: EngineConfig, base: ModelSpec | None = None, *, quick: bool = False
) -> Facts:
    """The facts of one model. `base` is the family's, for an expert that is an `adapter` over it.

    `quick` leaves out what takes long: the hub, of which the local cache has to do, and vLLM's
    registry. Nothing is raised: what is wrong is among the `problems`.
    """
    if isinstance(spec, ExpertSpec) and spec.shares_base:
        assert base is not None, "an adapter has a base"
        return _Look(spec.source, base, engine, quick).shared()
    return _Look(spec.source, spec, engine, quick).whole()


class _Look:
    """What is found out of one model, step by step."""

    def __init__(self, source: str, spec: ModelSpec, engine: EngineConfig, quick: bool) -> None:
        """`spec` is that of the worker which computes it."""
        self.source, self.spec, self.engine, self.quick = source, spec, engine, quick
        self.where: Any = ""
        self.folder: Path | None = None
        self.common: list[Problem] = []
        """What is wrong with the model itself, whoever computes it."""
        self.transformers: list[Problem] = []
        self.vllm: list[Problem] = []
        self.notes: list[Problem] = []
        """What may surprise, while it is computed all the same."""
        self.facts: dict[str, Any] = {}
        self.tensors: Tensors = {}
        self.quantized = False

    def whole(self) -> Facts:
        """Of what stands under `model:`; that may be an adapter, which is merged at loading."""
        if folder := self._find():
            given = isinstance(self.spec, ExpertSpec) and self.spec.adapter
            if given or (folder / CONFIG).is_file():
                self._merged(folder)
            else:
                self._tokenizer(folder)
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
            problems=(*self.common, *own, *self.notes),
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

    def _ask(
        self, of: list[Problem], what: Callable[..., Any], *args: object, here: bool = False
    ) -> Any:
        """What loading asks as well; where that raises, it is a problem, and None comes back."""
        try:
            return what(*args)
        except ValueError as error:
            problem = Problem("error", self._named(error), here=here)
            of += [problem] if problem not in of else []  # several questions may have one answer
            return None

    def _named(self, error: Exception) -> str:
        """What is said of a folder in a cache is said of what the family file names."""
        return str(error).replace(str(self.folder or self.source), self.source)

    def _find(self) -> Path | None:
        """The file or the folder that the model, or what has been fetched of it, is in."""
        self.where, self.folder, problem = find(
            self.source, self.spec.trust_remote_code, self.quick
        )
        if problem:
            self.common.append(problem)
        return self.folder

    def _plain(self, path: Path) -> ModelSpec:
        """The spec of what is found there, by itself."""
        own = {name: getattr(self.spec, name) for name in ModelSpec.__struct_fields__}
        return ModelSpec(**{**own, "model": str(path)})

    def _tokenizer(self, folder: Path) -> None:
        spec = self._plain(folder)
        if spec.tokenizer:
            _, own, problem = find(spec.tokenizer, spec.trust_remote_code, self.quick)
            if problem:
                self.common.append(replace(problem, text=f"its tokenizer: {problem.text}"))
            if own is None:
                return
            spec = msgspec.structs.replace(spec, tokenizer=str(own))
        tokenizer = self._ask(self.common, load_tokenizer, spec)
        if tokenizer is None:
            return
        source = spec.tokenizer or spec.model
        if is_gguf(source) and (surprise := gguf.surprise(source)):
            self.notes.append(Problem("warning", surprise))
        template: Any = getattr(tokenizer, "chat_template", None)
        eos = tokenizer.eos_token_id
        self.facts["vocabulary"] = tokenizer.get_vocab()
        self.facts["split"] = split(tokenizer)
        self.facts["tokens"] = len(tokenizer)
        self.facts["chat_template"] = json.dumps(template) if template else None
        self.facts["end_tokens"] = () if eos is None else (int(eos),)

    def _model(self, folder: Path) -> None:
        """Of a file, or of a folder that has a configuration and weights of its own."""
        config = self._ask(self.common, configuration, self._plain(folder))
        if self.where != "file":
            self.tensors = self._weights(folder)
        if config is not None:
            text = config.get_text_config(decoder=True)
            self._architecture(config, text)
            self._ends(folder, text)
            self._sizes(config, text)
            if self.where != "file":
                spec = self._plain(folder)
                self._ask(self.transformers, check_quantized, config, spec, here=True)
                self._place(config)
            self._vllm_here(self.facts["architecture"])
        self._ask(self.vllm, check_source, self._plain(folder))
        self._weigh()

    def _place(self, config: Any) -> None:
        """Whether every weight of the architecture is there, and has a use."""
        wrong = any(each.kind == "error" for each in (*self.common, *self.transformers))
        if self.quick or self.quantized or wrong or not self.tensors:
            return
        told = placed(config, self.tensors)
        if problem := told and weights_problem(self.source, told):
            self._error(problem)
        elif unused := told and unused_weights(self.source, told):
            self.notes.append(Problem("warning", unused))

    def _architecture(self, config: Any, text: Any) -> None:
        """Whether it is a causal LM, and whether its layers can be."""
        named = (getattr(config, "architectures", None) or [None])[0]
        known = causal_class(config)
        own = known or getattr(config, "is_encoder_decoder", False) or hasattr(config, "auto_map")
        name = self.facts["architecture"] = named or (known and known.__name__) or config.model_type
        title = f"{self.source} ({name})"
        spec = msgspec.structs.replace(self._plain(Path()), model=self.source)
        self._ask(self.common if own else self.transformers, check_causal, config, spec)
        if known and named and known.__name__ != named:
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
        if self.where == "file":
            dtype = gguf.dtype_of(self.spec)
        elif dtype == "auto":
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
        """Of all files, which have to be there and whole; those of a hub's model can be fetched."""
        if self.where == "folder":
            return self._ask(self.common, tensors_of, folder, self.source) or {}
        files = self._ask(self.common, files_of, folder, self.source) or []
        if files and all(file.is_file() for file in files):
            return self._ask(self.common, tensors_of, folder, self.source) or {}
        if self.where == "hub":
            from huggingface_hub.errors import NotASafetensorsRepoError

            try:
                return tensors_on_hub(self.source)
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
        if self.where == "file" and itemsize:
            self.facts["weight_bytes"] = itemsize * gguf.check_gguf(self.source).numbers
            return
        sizes = [each.nbytes(itemsize) for each in self.tensors.values()]
        self.facts["weight_bytes"] = sum(sizes) or None

    def _adapter(self, folder: Path) -> None:
        """What an adapter says of itself, and its weights."""
        try:
            said = config_of(self.source, folder)
            ranks = [said.get("r"), *(said.get("rank_pattern") or {}).values()]
            targets = said.get("target_modules") or ()
            self.facts["adapter"] = Lora(
                kind=str(said.get("peft_type")),
                rank=max((each for each in ranks if isinstance(each, int)), default=None),
                targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
                over=str(said.get("base_model_name_or_path") or ""),
            )
            self.tensors = tensors_of_adapter(self.source, folder)
        except (ValueError, AttributeError, TypeError):
            return  # the backends' checks say so

    def _peft(self) -> bool:
        """Whether what adapters need is here."""
        try:
            check_peft(self.source)
        except ValueError as error:
            kind: Any = "warning" if self.spec.runtime_env else "error"
            self.transformers.append(Problem(kind, str(error), here=True))
            return False
        return True

    def _merged(self, folder: Path) -> None:
        """Of an adapter that is merged into a copy of its base."""
        self._adapter(folder)
        self._peft()
        own = has_tokenizer(str(folder)) or self.spec.tokenizer
        if own:
            self._tokenizer(folder)
        self._refusals(self.common, check_mergeable, self.source, folder)
        self._ask(self.vllm, check_source, self.spec)
        if "adapter" not in self.facts:
            return
        spec = self.spec
        if not (isinstance(spec, ExpertSpec) and spec.adapter):
            spec = self._plain(folder)
        try:
            spec = base_of(spec, self.source)
        except ValueError as error:
            return self._error(self._named(error), here=True)
        below = _Look(spec.model, spec, self.engine, self.quick)
        if under := below._find():
            if not own:
                below._tokenizer(under)
            below._model(under)
            self._fit(below)
        for mine, theirs in (
            (self.common, below.common),
            (self.transformers, below.transformers),
            (self.vllm, below.vllm),
            (self.notes, below.notes),
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
            if weight is None and name.split(".")[-1] in HEADS:
                continue  # tied to the input embeddings
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


@functools.cache
def _vllm_registry() -> frozenset[str] | str:
    """The architectures that vLLM knows; why it cannot be asked else."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm import ModelRegistry

        return frozenset(ModelRegistry.get_supported_archs())
    except Exception as error:  # of a build for another machine, say
        return f"{type(error).__name__}: {error}"
