"""An adapter of PEFT, merged into a copy of its base.

What PEFT saves is many things: whatever is merged here answers as PEFT itself does unmerged, which
is looked at, and all else is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dlf_ray.models.adapters import CONFIG, WEIGHTS, check_peft, config_of, tensors_of_adapter
from dlf_ray.models.files import folder_of

LEARNED_PROMPTS = (
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"),
    *("ADAPTION_PROMPT", "CPT", "CARTRIDGE"),
)
"""Adapters that are no change of weights."""
MIXTURES = ("XLORA", "POLY")
"""Whose change of weights is another one for each text."""
LOOKED_AT = 24
"""Tokens, from all over the vocabulary, that are computed before and after."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Of the logits' length; of half precision, whose merged weights are rounded, `ROUNDED`."""
ROUNDED = 0.1


def check_mergeable(source: str, folder: Path) -> None:
    """Reads no weights. Raises `ValueError`, saying what to do, for what cannot be merged."""
    kind = config_of(source, folder).get("peft_type")
    if kind in LEARNED_PROMPTS:
        raise ValueError(
            f"{source} is of type {kind}, learned prompts, which cannot be merged into weights: "
            "use an adapter that changes weights, such as LoRA"
        )
    if kind in MIXTURES:
        raise ValueError(
            f"{source} is of type {kind}, another change for each text, which cannot be merged "
            "into weights: use an adapter that changes weights, such as LoRA"
        )
    tensors_of_adapter(source, folder)


@torch.no_grad()
def merged(model: Any, adapter: str, base: str) -> Any:
    """The model `base` with the adapter in its weights, which are changed in place.

    Raises `ValueError`, saying what to do, for an adapter of another base, and for what would
    answer otherwise merged.
    """
    check_peft(adapter)
    folder = folder_of(adapter, [CONFIG, WEIGHTS])
    check_mergeable(adapter, folder)
    misfit = f"the adapter {adapter} does not fit {base}"
    _check_rows(model, adapter, folder, misfit)
    wrapped = _wrapped(model, folder, misfit)
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(0, rows - 1, min(rows, LOOKED_AT), device=model.device).long()[None]
    try:
        expected = wrapped.eval()(input_ids=ids, use_cache=False).logits.float()
        _untie(model)
        whole = wrapped.merge_and_unload().eval()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each type of adapter, and each quantized layer, has its own
        raise ValueError(f"the adapter {adapter} cannot be merged into {base}: {error}") from error
    got = whole(input_ids=ids, use_cache=False).logits.float()
    off = (got - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm()
    if expected.isfinite().all() and not off <= TOLERANCE.get(model.dtype, ROUNDED):
        raise ValueError(
            f"the adapter {adapter}, merged into {base}, answers otherwise than PEFT does "
            "unmerged: merge it yourself, and give the folder as `model:`"
        )
    return whole


def _wrapped(model: Any, folder: Path, misfit: str) -> Any:
    """The model with the adapter beside its weights, every number of it in its place."""
    from peft import PeftConfig, PeftModel

    hint = "use the model that it was trained over"
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        wrapped = PeftModel(model, config)
        read = wrapped.load_adapter(str(folder), "default", torch_device=str(model.device))
    except torch.OutOfMemoryError:
        raise
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS} of {folder} is damaged ({error}): copy it again") from error
    except KeyError as error:
        raise ValueError(f"{misfit}: {error} is not in its {WEIGHTS}; {hint}") from error
    except Exception as error:  # of any kind, by the type of the adapter
        raise ValueError(f"{misfit} ({' '.join(str(error).split())}): {hint}") from error
    for keys, what in (
        (read.missing_keys, f"is not in its {WEIGHTS}"),
        (read.unexpected_keys, "has no place there"),
    ):
        if keys:
            raise ValueError(f"{misfit}: {keys[0].replace('.default', '')} {what}; {hint}")
    return wrapped


def _check_rows(model: Any, adapter: str, folder: Path, misfit: str) -> None:
    """Raises `ValueError` for an adapter that brings embeddings of another vocabulary."""
    rows, size = model.get_input_embeddings().weight.shape
    for key, tensor in tensors_of_adapter(adapter, folder).items():
        shape = tensor.shape
        whole = "lora_" not in key and key.endswith(".weight") and len(shape) == 2
        if whole and shape[1] == size and "embed" in key and shape[0] != rows:
            raise ValueError(
                f"{misfit}: it was trained over a vocabulary of {shape[0]} rows, the base has "
                f"{rows}; resize the base's embeddings (resize_token_embeddings), save it, and "
                f"name it: `{{model: RESIZED, adapter: {adapter}}}`"
            )


def _untie(model: Any) -> None:
    """Gives the output embeddings weights of their own where the adapter changes either side: what
    is merged into shared ones would change both."""
    sides = [model.get_input_embeddings(), model.get_output_embeddings()]
    below = [_below(side) for side in sides]
    if None in below or sides == below or below[0].weight is not below[1].weight:
        return
    own = below[1].weight.detach().clone()
    below[1].weight = torch.nn.Parameter(own, requires_grad=False)


def _below(module: Any) -> Any:
    """The layer that an adapter has wrapped, or the same."""
    while module is not None:
        inner = getattr(module, "original_module", None) or getattr(module, "base_layer", None)
        if inner is None:
            break
        module = inner
    return module
