"""From a folder or a hub id to a model and its tokenizer, and what to do where that fails.

Weights come from safetensors only, since pickled ones can run code when they are loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from dlf_ray.config import ModelSpec
from dlf_ray.plans import ALL

NOWHERE = "there is no such folder, and the Hugging Face hub did not give it either"

if not sys.stderr.isatty():  # in an actor's log each move of a progress bar would be a line
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises `ValueError`, saying what to do, where there is none."""
    where = spec.tokenizer or spec.model
    check_folder(where)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            where, trust_remote_code=spec.trust_remote_code
        )
    except Exception as error:  # tokenizers of every kind, each failing in its own way
        hint = "set `tokenizer:` in the family file to a folder or hub id that has one"
        reason = hint if Path(where).is_dir() else NOWHERE
        raise ValueError(f"{where} gives no tokenizer: {reason} ({error})") from error
    return tokenizer


def vocabulary_difference(
    a: PreTrainedTokenizerBase | Mapping[str, int],
    b: PreTrainedTokenizerBase | Mapping[str, int],
    name_a: str,
    name_b: str,
) -> str | None:
    """None if both give the same tokens the same ids, else a sentence on the first difference."""
    tokens_a, tokens_b = (
        {i: token for token, i in (v if isinstance(v, Mapping) else v.get_vocab()).items()}
        for v in (a, b)
    )
    for i in sorted(tokens_a.keys() | tokens_b.keys()):
        if tokens_a.get(i) != tokens_b.get(i):
            said = [repr(t[i]) if i in t else "nothing" for t in (tokens_a, tokens_b)]
            return (
                f"{name_a} ({len(tokens_a)} tokens) and {name_b} ({len(tokens_b)} tokens) do not "
                f"share a vocabulary: id {i} is {said[0]} in {name_a} and {said[1]} in {name_b}"
            )
    return None


def digest(vocab: Mapping[str, int]) -> str:
    """Equal for vocabularies that give the same tokens the same ids."""
    pairs = sorted((i, token) for token, i in vocab.items())
    return hashlib.sha256(msgspec.json.encode(pairs)).hexdigest()[:16]


def load_model(spec: ModelSpec) -> Any:
    """The model in evaluation mode, on its device; an adapter is merged into its base."""
    if spec.num_gpus > 0 and not torch.cuda.is_available():
        raise ValueError(
            f"{spec.model} asks for {spec.num_gpus:g} GPUs, but torch sees no CUDA device: set "
            "`num_gpus: 0` in the family file, or install a CUDA build of torch and its driver"
        )
    check_folder(spec.model)
    if adapter := find_adapter_config_file(spec.model):
        return _load_adapter(spec, Path(adapter))
    folder = Path(spec.model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a model saved by transformers")
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise ValueError(pickled(spec.model))
    check_weights(folder)
    too_large = (
        f"{spec.model} does not fit in the memory of its {spec.num_gpus:g} GPUs: raise `num_gpus` "
        "in the family file, or set `dtype: bfloat16`"
    )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            spec.model,
            dtype=spec.dtype,
            device_map="auto" if spec.num_gpus > 1 else "cuda:0" if spec.num_gpus else "cpu",
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(too_large) from error
    except SafetensorError as error:
        raise ValueError(
            f"a safetensors file of {spec.model} is damaged or incomplete ({error}): "
            "download or copy it again"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = pickled(spec.model) if "safetensors" in str(error) else error
        where = "" if folder.is_dir() else f" ({NOWHERE})" if isinstance(error, OSError) else ""
        raise ValueError(f"{spec.model} could not be loaded{where}: {reason}") from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        # transformers would go on with random numbers in their place.
        raise ValueError(
            f"{spec.model} lacks {len(missing)} weights of its architecture, {missing[0]} first: "
            "download or copy it again"
        )
    if spec.num_gpus > 1 and {"cpu", "disk"} & {str(d) for d in model.hf_device_map.values()}:
        raise ValueError(too_large)
    return model.eval()


def _load_adapter(spec: ModelSpec, adapter: Path) -> Any:
    """A PEFT adapter merged into the base that it names."""
    base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"{spec.model} is an adapter of {base}: pip install peft to load it")
    check_weights(Path(spec.model))
    if not base:
        raise ValueError(f"{adapter} names no `base_model_name_or_path` to put the adapter on")
    from peft import PeftModel

    model = load_model(msgspec.structs.replace(spec, model=base))
    try:
        merged = PeftModel.from_pretrained(model, spec.model, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot put the adapter {spec.model} on {base}: {error}") from error
    return merged.merge_and_unload().eval()


def check_weights(folder: Path) -> None:
    """Raises `ValueError` for a file that was cut off, before the others are read for minutes."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):  # compares its header with its size
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{file} is damaged or incomplete ({error}): download or copy it again"
            ) from error


def check_folder(name: str) -> None:
    """Raises `ValueError` for what reads like a folder and is none."""
    path = Path(name)
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if is_path and not path.is_dir():
        raise ValueError(f"{name} is neither a folder nor a model of the Hugging Face hub")


def pickled(source: str) -> str:
    """What to say of a model without weights in safetensors."""
    return (
        f"{source} has no weights in safetensors. Pickled ones can run code when loaded; if you "
        'trust them, convert them once: python -c "from transformers import AutoModelForCausalLM '
        f"as M; M.from_pretrained('{source}', use_safetensors=False)"
        ".save_pretrained('NEW_FOLDER')\", and copy the tokenizer's files there"
    )


def folder_of(source: str, patterns: Sequence[str]) -> Path:
    """A local folder, or where the files of a hub's model are that match one of `patterns`.

    Raises `ValueError` where there is neither.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except Exception as error:  # of a name that cannot be a hub's, or of many kinds from the net
        raise ValueError(f"{source}: {NOWHERE} ({error})") from error


def end_tokens(eos: int | Sequence[int] | None, tokenizer: Any) -> tuple[int, ...]:
    """What ends a text: as generation is configured, else as the tokenizer says."""
    found = tokenizer.eos_token_id if eos is None else eos
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)


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
