"""GGUF files, those of llama.cpp: one file holds a model, its configuration and its tokenizer.

transformers makes a model of its own of one, whose weights are unpacked when it is loaded. Here is
what it leaves open: whether a file is whole, before it is read for long, and what it leaves out.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from tokenizers import Tokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dlf_ray.config import ModelSpec

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The types of weights that are not packed."""
FREQUENCIES = "rope_freqs.weight"
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""How Llama 3.1 and later scale positions, which such a file holds worked out."""
PLAIN = ("default", "gpt-2", "gpt2")
"""Ways to cut a text that are GPT-2's."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself before its weights."""

    architecture: str
    """As llama.cpp names it."""
    dtype: str
    """What `auto` is: the type of the weights, float32 if they are packed."""
    numbers: int
    """Of all weights."""
    tokens: int
    """In its vocabulary; 0 without one."""
    splits: str
    """How its tokenizer cuts texts before it joins bytes, by llama.cpp's name, if it does."""
    slower: tuple[float, ...] = ()
    """By how much each of the frequencies that tell positions apart is divided, if they are."""


def check_gguf(source: str) -> Header:
    """Reads all but the weights. Raises `ValueError`, saying what to do, for a file that is not
    there, not whole, or that would become another model."""
    file = Path(source)
    if not file.is_file():
        raise ValueError(
            f"there is no file {source}: a GGUF file is a local one, download it first"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f'{source} is a GGUF file: pip install "dlf_ray[gguf]" to load it')
    told = file.stat()
    return _read(str(file), told.st_mtime_ns, told.st_size)


@functools.lru_cache(maxsize=8)
def _read(source: str, changed: int, size: int) -> Header:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(source)  # it maps all weights, so it finds out where the file ends
        said = {name: field.contents() for name, field in reader.fields.items() if _short(field)}
        architecture = str(said["general.architecture"])
        sizes = {each.name: [int(n) for n in each.shape] for each in reader.tensors}
        types = {each.tensor_type.name for each in reader.tensors}
    except Exception as error:  # a file that was cut off fails anywhere, in any way
        raise ValueError(
            f"{source} is damaged, incomplete, or no GGUF file ({error or type(error).__name__}): "
            "download or copy it again"
        ) from error
    if (parts := int(said.get("split.count") or 1)) > 1:
        raise ValueError(
            f"{source} is one of {parts} files of a model: join them with "
            "`llama-gguf-split --merge` of llama.cpp"
        )
    slower = [each.data.tolist() for each in reader.tensors if each.name == FREQUENCIES]
    scaled = [name for name in sizes if name.startswith("rope_f") and name != FREQUENCIES]
    kind = said.get(f"{architecture}.rope.scaling.type", "none")
    if scaled or kind != "none":
        raise _scaled(source, scaled[0] if scaled else f"rope.scaling.type: {kind}")
    half = next((kind for kind in ("BF16", "F16") if kind in types), "F32")  # beside norms in F32
    dtype = FLOATS[half] if types <= FLOATS.keys() else "float32"
    vocabulary = reader.fields.get("tokenizer.ggml.tokens")
    tokens = len(vocabulary.data) if vocabulary else 0
    joins = said.get("tokenizer.ggml.model") == "gpt2"
    splits = str(said.get("tokenizer.ggml.pre", "")) if joins else ""
    numbers = sum(prod(size) for name, size in sizes.items() if name != FREQUENCIES)
    return Header(architecture, dtype, numbers, tokens, splits, *map(tuple, slower))


def _scaled(source: str, what: str) -> ValueError:
    return ValueError(
        f"{source} scales its positions ({what}) in a way that transformers does not read from "
        "GGUF files: use the model's folder of safetensors"
    )


def _short(field: Any) -> bool:
    """Whether it is worth the time to read, unlike a vocabulary."""
    return len(field.data) == 1


def configuration(source: str) -> Any:
    """What transformers makes of what a file says of itself. Raises `ValueError` as `loading`."""
    told = Path(source).stat() if Path(source).is_file() else None
    return copy.deepcopy(_configuration(source, told and told.st_mtime_ns, told and told.st_size))


@functools.lru_cache(maxsize=8)
def _configuration(source: str, changed: int | None, size: int | None) -> Any:
    with loading(source) as where:
        config: Any = transformers.AutoConfig.from_pretrained(**where)
    if slower := check_gguf(source).slower:
        plain = _frequencies(config)
        config.rope_parameters = {
            **config.rope_parameters,
            **{"rope_type": "llama3", "factor": max(slower), **LLAMA3},
        }
        divided = plain / torch.tensor(slower)
        if config.model_type != "llama" or not torch.allclose(_frequencies(config), divided, 1e-4):
            raise _scaled(source, FREQUENCIES)
    return config


def _frequencies(config: Any) -> torch.Tensor:
    """Those that tell the positions of a Llama model apart."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # only here needed

    frequencies: torch.Tensor = LlamaRotaryEmbedding(config).inv_freq
    return frequencies


@contextlib.contextmanager
def loading(source: str, what: str = "GGUF files of architecture") -> Iterator[dict[str, Any]]:
    """The arguments that make `from_pretrained` read the file, while this lasts.

    It stands by itself in a folder then: else transformers would take the tokenizer or the template
    of another model that lies beside it. Raises `ValueError`, saying what to do, for what
    transformers raises meanwhile.
    """
    header = check_gguf(source)
    with tempfile.TemporaryDirectory(prefix="dlf-gguf-") as folder:
        link = Path(folder) / "model.gguf"
        link.symlink_to(Path(source).resolve())
        try:
            yield {"pretrained_model_name_or_path": folder, "gguf_file": link.name}
        except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
            reason = " ".join(str(error).replace(str(link), source).split())
            raise ValueError(
                f"{source} could not be loaded: transformers {transformers.__version__} does not "
                f"convert {what} {header.architecture} ({reason}); name the original folder or hub "
                "id instead"
            ) from error


def surprise(source: str) -> str | None:
    """What may be otherwise than thought with the tokenizer of a file."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import (
            GGUF_PRE_TOKENIZER_SPLITS as known,
        )
    except ImportError:  # a release that takes GPT-2's way for all
        known = {}
    splits = check_gguf(source).splits
    if not splits or splits in (*known, *PLAIN):
        return None
    return (
        f"{source} cuts texts as `{splits}` does, which transformers {transformers.__version__} "
        "does not know: numbers, for one, may become other tokens than in training; set "
        "`tokenizer:` to the original folder or hub id"
    )


def tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a file. Raises `ValueError` as `loading`."""
    tokens = check_gguf(source).tokens
    with loading(source, "this tokenizer (`tokenizer:` names another) of architecture") as where:
        made: Any = transformers.AutoTokenizer.from_pretrained(**where)
    if tokens < len(made):  # GPT-2's class adds a token of that, which the model has no row for
        state = json.loads(made.backend_tokenizer.to_str())
        state["added_tokens"] = [each for each in state["added_tokens"] if each["id"] < tokens]
        made._tokenizer = Tokenizer.from_str(json.dumps(state))
    return cast(PreTrainedTokenizerBase, made)


def unpacked() -> dict[str, Any]:
    """The arguments that make `from_pretrained` unpack the weights. Releases of transformers that
    do not know them do nothing else."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def make_plain(model: Any) -> None:
    """Takes away the marks of a packed model from one whose weights were unpacked."""
    for holder, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.is_quantized = False


def dtype_of(spec: ModelSpec) -> str:
    """The type that the weights of a file become."""
    return check_gguf(spec.model).dtype if spec.dtype == "auto" else spec.dtype
