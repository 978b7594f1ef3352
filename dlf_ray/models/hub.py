"""Where a model is: here, in the local cache of the Hugging Face hub, or on the hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

from dlf_ray.config import is_gguf
from dlf_ray.models.adapters import CONFIG
from dlf_ray.models.facts import Problem
from dlf_ray.models.files import INDEX, NOWHERE, TOKENIZERS, Tensor, Tensors, check_folder
from dlf_ray.models.gguf import check_gguf

HUB_TIMEOUT_S = 3.0
"""For the hub's first word; the local cache has to do where it takes longer."""
SMALL = (
    *("config.json", "generation_config.json", INDEX, CONFIG, *TOKENIZERS, "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
"""What is fetched of a model on the hub."""


def find(
    name: str, code: bool, quick: bool
) -> tuple[Literal["folder", "file", "cache", "hub", ""], Path | None, Problem | None]:
    """Where a model is, the folder of what there is of it on this disk, and why there is none.

    `code` fetches a model's own code beside its configuration; `quick` asks no hub, and says of
    what is not in the cache only that it was not found.
    """
    if is_gguf(name):
        try:
            check_gguf(name)
        except ValueError as error:
            missing = not Path(name).is_file() or importlib.util.find_spec("gguf") is None
            return "", None, Problem("error", str(error), here=missing)
        return "file", Path(name), None
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


def tensors_on_hub(name: str) -> Tensors:
    """The weights of a hub's model, of which none is fetched. Raises whatever the net raises, and
    `NotASafetensorsRepoError`."""
    from huggingface_hub import get_safetensors_metadata

    told = get_safetensors_metadata(name, timeout=HUB_TIMEOUT_S)
    return {
        key: Tensor(tuple(each.shape), each.dtype, each.data_offsets)
        for file in told.files_metadata.values()
        for key, each in file.tensors.items()
    }
