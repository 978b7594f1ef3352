"""From a folder, a hub id or a GGUF file to a model and its tokenizer, and what to do where that
fails.

Weights come from safetensors or GGUF files only: pickled ones can run code when they are loaded.
"""

from __future__ import annotations

import contextlib
import json
import logging as log_of
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    modeling_gguf_pytorch_utils,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from dlf_ray.config import ExpertSpec, ModelSpec, is_gguf
from dlf_ray.models import gguf
from dlf_ray.models.adapters import CONFIG, config_of
from dlf_ray.models.files import (
    KINDS,
    NOWHERE,
    Tensors,
    check_configured,
    check_folder,
    folder_of,
    has_tokenizer,
    pickled,
    tensors_of,
)
from dlf_ray.models.merging import merged
from dlf_ray.plans import ALL

log = log_of.getLogger("dlf_ray")

if not sys.stderr.isatty():  # in an actor's log each move of a progress bar would be a line
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # It has a bar that this would not disable.
    modeling_gguf_pytorch_utils.tqdm = logging.tqdm  # type: ignore[attr-defined]


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: an adapter's own, if it has one, else that of its base.

    Raises `ValueError`, saying what to do, where there is none.
    """
    where = spec.tokenizer or spec.model
    if not spec.tokenizer and (adapter := adapter_of(spec)):
        if not has_tokenizer(adapter):
            return load_tokenizer(base_of(spec, adapter))
        where = adapter
    if is_gguf(where):
        return gguf.tokenizer(where)
    check_folder(where)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            where, trust_remote_code=spec.trust_remote_code
        )
    except Exception as error:  # tokenizers of every kind, each failing in its own way
        if (Path(where) / "config.json").is_file():  # it says which kind
            configuration(msgspec.structs.replace(spec, model=where))
        hint = "set `tokenizer:` in the family file to a folder or hub id that has one"
        reason = hint if Path(where).is_dir() else NOWHERE
        raise ValueError(f"{where} gives no tokenizer: {reason} ({error})") from error
    return tokenizer


def adapter_of(spec: ModelSpec) -> str | None:
    """The adapter that is merged when the model is loaded, if there is one: that of a spec which
    names its base as well, or what stands in the place of a model."""
    if isinstance(spec, ExpertSpec) and spec.adapter:
        return spec.adapter
    return spec.model if _adapter_config(spec.model) else None


def _adapter_config(source: str) -> Path | None:
    """Where an adapter says what it is, None for what is no adapter."""
    if is_gguf(source):
        return None
    try:
        found = find_adapter_config_file(source)
    except (OSError, ValueError):  # nothing of that name: loading says so
        return None
    return Path(found) if found else None


def base_of(spec: ModelSpec, adapter: str) -> ModelSpec:
    """The model that an adapter is put on: what the spec names beside it, or else the adapter.

    Raises `ValueError` where neither names one that is there.
    """
    if isinstance(spec, ExpertSpec) and spec.adapter:
        return msgspec.structs.replace(spec, adapter=None)
    file = _adapter_config(adapter)
    assert file is not None, "it is an adapter"
    said = config_of(adapter, file.parent)
    base = said.get("base_model_name_or_path")
    instead = f"name it in the family file, of an expert as `{{model: BASE, adapter: {adapter}}}`"
    if not base:
        raise ValueError(
            f"{CONFIG} of {adapter} names no `base_model_name_or_path` to put the adapter on: "
            f"{instead}"
        )
    base = os.path.expanduser(base)
    try:
        if not is_gguf(base):
            check_folder(base)
        if Path(base).resolve() == Path(adapter).resolve():
            raise ValueError(f"{base} is the adapter itself")
    except ValueError as error:
        raise ValueError(
            f"the base of the adapter {adapter} is not where that says: {error}; {instead}"
        ) from error
    return msgspec.structs.replace(spec, model=base)


def load_model(spec: ModelSpec) -> Any:
    """The model in evaluation mode, on its device; an adapter is merged into its base."""
    if spec.num_gpus > 0 and not torch.cuda.is_available():
        raise ValueError(
            f"{spec.model} asks for {spec.num_gpus:g} GPUs, but torch sees no CUDA device: set "
            "`num_gpus: 0` in the family file, or install a CUDA build of torch and its driver"
        )
    if adapter := adapter_of(spec):
        base = base_of(spec, adapter)
        return merged(load_model(base), adapter, base.model)
    model, told = _load_file(spec) if is_gguf(spec.model) else _load_folder(spec)
    if problem := weights_problem(spec.model, told):
        raise ValueError(problem)
    if unused := unused_weights(spec.model, told):
        log.warning(unused)
    if spec.num_gpus > 1 and {"cpu", "disk"} & {str(d) for d in model.hf_device_map.values()}:
        raise ValueError(_too_large(spec))
    return model.eval()


def _load_file(spec: ModelSpec) -> tuple[Any, Mapping[str, Any]]:
    """Of a GGUF file, its weights unpacked."""
    config = configuration(spec)
    check_causal(config, spec)
    how = {"config": config, "dtype": gguf.dtype_of(spec), **gguf.unpacked()}
    with gguf.loading(spec.model) as where:
        model, told = _from_pretrained(spec, **where, **how)
    gguf.make_plain(model)
    if not spec.tokenizer and (surprise := gguf.surprise(spec.model)):
        log.warning(surprise)
    return model, told


def _load_folder(spec: ModelSpec) -> tuple[Any, Mapping[str, Any]]:
    """Of a folder or a hub id."""
    check_folder(spec.model)
    folder = Path(spec.model)
    config = configuration(spec)
    check_causal(config, spec)
    if folder.is_dir():
        tensors_of(folder, spec.model)
    check_quantized(config, spec)
    try:
        return _from_pretrained(
            spec,
            pretrained_model_name_or_path=spec.model,
            config=config,
            dtype=spec.dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are told of instead
        )
    except SafetensorError as error:
        raise ValueError(
            f"a safetensors file of {spec.model} is damaged or incomplete ({error}): "
            "download or copy it again"
        ) from error
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError) as error:
        reason = pickled(spec.model) if "safetensors" in str(error) else _line(error)
        where = "" if folder.is_dir() else f" ({NOWHERE})" if isinstance(error, OSError) else ""
        raise ValueError(f"{spec.model} could not be loaded{where}: {reason}") from error


def _from_pretrained(spec: ModelSpec, **arguments: Any) -> tuple[Any, Mapping[str, Any]]:
    """The model on its device, and what transformers says of its weights."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **arguments,
            device_map=_device_map(spec),
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(_too_large(spec)) from error
    model, told = loaded
    return model, told


def _device_map(spec: ModelSpec) -> str:
    return "auto" if spec.num_gpus > 1 else "cuda:0" if spec.num_gpus else "cpu"


def _too_large(spec: ModelSpec) -> str:
    return (
        f"{spec.model} does not fit in the memory of its {spec.num_gpus:g} GPUs: raise `num_gpus` "
        "in the family file, or set `dtype: bfloat16`"
    )


def configuration(spec: ModelSpec) -> Any:
    """What a model says of itself. Raises `ValueError` for what transformers cannot read."""
    if is_gguf(spec.model):
        return gguf.configuration(spec.model)
    if Path(spec.model).is_dir():
        check_configured(Path(spec.model))
    try:
        return AutoConfig.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # configurations of every kind, each failing in its own way
        reason = _line(error)
        if "does not recognize this architecture" in reason:
            reason = f"{reason.split(' but ')[0]}, which it does not know"
        elif "module 'torch' has no attribute" in reason:
            reason = f"its `dtype` is none of torch's ({reason})"
        if isinstance(error, OSError) and not Path(spec.model).is_dir():
            raise ValueError(f"{spec.model} could not be loaded ({NOWHERE}): {reason}") from error
        raise ValueError(
            f"{spec.model} has no configuration that transformers {transformers.__version__} "
            f"reads: {reason}"
        ) from error


def causal_class(config: Any) -> Any:
    """What transformers has for the configuration, None if nothing."""
    try:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except (KeyError, ImportError):
        return None
    return found[0] if isinstance(found, tuple | list) else found


def check_causal(config: Any, spec: ModelSpec) -> None:
    """Raises `ValueError` for a model that is no causal LM of transformers."""
    known = causal_class(config)
    named = (getattr(config, "architectures", None) or [None])[0]
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    title = f"{spec.model} ({named or (known and known.__name__) or config.model_type})"
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{title} has an encoder and a decoder: use a decoder-only model")
    if remote and not known and not spec.trust_remote_code:
        raise ValueError(f"{title} is code of its own: set `trust_remote_code: true` to run that")
    if not known and not remote:
        raise ValueError(f"{title} is not a causal LM: transformers has none of this type")
    other = known and named and named != known.__name__
    if other and getattr(config, "is_decoder", True) is False:
        raise ValueError(f"{title} is an encoder, not a causal LM: use a decoder-only model")


def check_quantized(config: Any, spec: ModelSpec) -> None:
    """Raises `ValueError` where what computes packed weights is not here."""
    packed = getattr(config, "quantization_config", None)
    if packed is None:
        return
    # It brings half of torch's compiler with it, two seconds of every process that imports it.
    from transformers.quantizers.auto import AutoHfQuantizer

    kind = packed.get("quant_method") if isinstance(packed, dict) else packed.quant_method
    try:
        quantizer = AutoHfQuantizer.from_config(packed, pre_quantized=True)
        place = _device_map(spec)
        quantizer.validate_environment(device_map=place if place == "auto" else {"": place})
    except Exception as error:  # each kind has libraries and conditions of its own
        kind = getattr(kind, "value", kind)
        raise ValueError(
            f"{spec.model} is quantized ({kind}), and cannot be computed here: {_line(error)}"
        ) from error


def placed(config: Any, tensors: Tensors) -> Mapping[str, Any] | None:
    """What transformers would say of weights when it loads them, of which only names and shapes are
    known; None where it cannot be asked so."""
    kind = causal_class(config)
    if kind is None or not all(each.dtype in KINDS for each in tensors.values()):
        return None
    empty = {
        name: torch.empty(each.shape, dtype=getattr(torch, KINDS[each.dtype]), device="meta")
        for name, each in tensors.items()
    }
    try:
        with _silence():
            _, told = kind.from_pretrained(
                None,
                config=config,
                state_dict=empty,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # of code that did not think of this
        log.debug("the weights cannot be placed before they are loaded: %r", error)
        return None
    return dict(told)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """transformers reports nothing by itself meanwhile."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def weights_problem(source: str, told: Mapping[str, Any]) -> str | None:
    """What is wrong with the weights of a model, by what transformers says when it loads them."""
    if wrong := sorted(told["mismatched_keys"], key=str):
        key, found, wanted = wrong[0]
        return (
            f"{source} has {len(wrong)} weights of other shapes than its config.json says, {key} "
            f"first ({list(found)} instead of {list(wanted)}): download or copy it again"
        )
    if missing := sorted(told["missing_keys"]):
        # transformers would go on with random numbers in their place.
        return (
            f"{source} lacks {len(missing)} weights of its architecture, {missing[0]} first: "
            "download or copy it again"
        )
    return None


def unused_weights(source: str, told: Mapping[str, Any]) -> str | None:
    """What may surprise of the weights of a model."""
    if not (unused := sorted(told["unexpected_keys"])):
        return None
    return (
        f"{source} has {len(unused)} weights that its architecture does not use, {unused[0]} "
        "first: is its config.json its own?"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def end_tokens(*said: int | Sequence[int] | None) -> tuple[int, ...]:
    """What ends a text, as configuration, generation configuration and tokenizer say together:
    transformers' `generate` goes by the second, chat checkpoints often rely on the others."""
    ids = [[each] if isinstance(each, int) else each or [] for each in said]
    return tuple(sorted({id for some in ids for id in some}))


RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def sampling_of(generation: Mapping[str, Any]) -> dict[str, Any]:
    """What a generation configuration recommends, by the names of `SamplingParams`; as vLLM reads
    it, whatever `do_sample` says."""
    return {name: generation[name] for name in RECOMMENDED if generation.get(name) is not None}


def chat_templates(tokenizer: Any, adapters: Sequence[str] = ()) -> tuple[str | None, ...]:
    """The chat template of a model, and of each adapter over it: what lies in its folder, else the
    model's."""
    try:
        own: str | None = str(tokenizer.get_chat_template())
    except ValueError:  # there is none
        own = None
    return own, *(_adapters_template(each) or own for each in adapters)


def _adapters_template(source: str) -> str | None:
    """As tokenizers are saved; an adapter's folder need not hold the rest of one."""
    name, config = "chat_template.jinja", "tokenizer_config.json"
    folder = folder_of(source, [name, config])
    if (folder / name).is_file():
        return (folder / name).read_text(encoding="utf-8")
    if not (folder / config).is_file():
        return None
    found = json.loads((folder / config).read_text(encoding="utf-8")).get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {each["name"]: each["template"] for each in found}.get("default")
    return found and str(found)


def context_of(config: Any) -> int:
    """Positions that the model was made for."""
    context = getattr(config, "max_position_embeddings", None) or ALL
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond its original length it turns all positions of a batch at once, other sequences'
        # and cached ones too.
        context = rope.get("original_max_position_embeddings") or context
    return int(context)


def windows_of(config: Any, name: str, length: int) -> dict[str, int | None]:
    """How many positions each kind of layer sees, itself included; None for all of `length`."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # then a window, if there is one, is every layer's
        kinds = ["full_attention" if window is None else "sliding_attention"]
    if others := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise ValueError(
            f"{name} has layers of type {', '.join(others)}, which a slot cache cannot hold: use a "
            "model whose layers are all full_attention or sliding_attention"
        )
    seen = window if window is not None and window < length else None
    return {kind: seen if kind == "sliding_attention" else None for kind in sorted(set(kinds))}
