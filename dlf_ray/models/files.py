"""Where the files of a model are, and whether they are whole: what their headers tell.

Loading and the check before it ask here, so that they say the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

NOWHERE = "there is no such folder, and the Hugging Face hub did not give it either"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""One of these is in a folder that has a tokenizer."""
FRACTIONS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The types of weights that are turned into the model's own, by their names in a header."""
KINDS = {
    **FRACTIONS,
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}


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


def header(file: Path) -> dict[str, Tensor]:
    """The weights of one file, of which none is read."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        lines: dict[str, Any] = msgspec.json.decode(opened.read(length))
    lines.pop("__metadata__", None)
    return msgspec.convert(lines, dict[str, Tensor])


def files_of(folder: Path, source: str) -> list[Path]:
    """The files that hold a model's weights by what its folder says, whether they are there or not.

    Raises `ValueError` where the folder does not say.
    """
    index = folder / INDEX
    if (folder / WHOLE).is_file() or not index.is_file():
        if not (folder / WHOLE).is_file() and (found := sorted(folder.glob("*.safetensors"))):
            raise ValueError(
                f"{source} has neither {WHOLE} nor {INDEX}, which says what {found[0].name} is "
                "part of: download or copy it again"
            )
        return [folder / WHOLE]
    return [folder / name for name in sorted(set(_places(index).values()))]


def tensors_of(folder: Path, source: str) -> Tensors:
    """All weights of a folder. Raises `ValueError`, saying what to do, where some are missing or
    a file is not whole, before any is read for minutes."""
    if not (list(folder.glob("*.safetensors")) or (folder / INDEX).is_file()):
        raise ValueError(pickled(source))
    check_weights(folder)
    files = files_of(folder, source)
    if absent := [file for file in files if not file.is_file()]:
        raise ValueError(
            f"{source} lacks {len(absent)} of its {len(files)} safetensors files, "
            f"{absent[0].name} first: download or copy it again"
        )
    headers = {file.name: header(file) for file in files}
    if WHOLE not in headers:
        places = _places(folder / INDEX)
        if lost := [key for key, name in places.items() if key not in headers[name]]:
            raise ValueError(
                f"{source} lacks {len(lost)} weights that its index lists, {lost[0]} first: "
                "download or copy it again"
            )
    return {key: tensor for each in headers.values() for key, tensor in each.items()}


def _places(index: Path) -> dict[str, str]:
    """In which file each weight is."""
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return msgspec.convert(places, dict[str, str])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} cannot be read ({error!r}): copy it again") from error


def check_weights(folder: Path) -> None:
    """Raises `ValueError` for a file that was cut off."""
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
    if path.is_file():
        raise ValueError(
            f"{name} is a file: name the folder that it is in (of GGUF files, which end in .gguf, "
            "the file itself)"
        )
    if is_path and not path.is_dir():
        raise ValueError(f"{name} is neither a folder nor a model of the Hugging Face hub")


def check_configured(folder: Path) -> None:
    """Raises `ValueError` for a folder that is no model's."""
    config = folder / "config.json"
    if config.is_file():
        try:
            msgspec.json.decode(config.read_bytes(), type=dict[str, Any])
        except ValueError as error:
            again = "download or copy it again"
            raise ValueError(f"{config} cannot be read ({error}): {again}") from error
        return
    if files := sorted(folder.glob("*.gguf")):
        raise ValueError(
            f"{folder} has no config.json but {len(files)} GGUF file{'s' * (len(files) > 1)}: name "
            f"one, as `model: {files[0]}`"
        )
    raise ValueError(f"{folder} has no config.json: it is not a model saved by transformers")


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


def has_tokenizer(source: str) -> bool:
    """Whether a folder or a hub's model has a tokenizer of its own."""
    if Path(source).is_dir():
        return any((Path(source) / name).is_file() for name in TOKENIZERS)
    quiet = {"_raise_exceptions_for_missing_entries": False}
    quiet["_raise_exceptions_for_connection_errors"] = False
    return any(cached_file(source, name, **quiet) for name in TOKENIZERS)
