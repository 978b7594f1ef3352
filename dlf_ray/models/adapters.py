"""LoRA adapters over one copy of a model's weights: which can be, and whose each row of a pass is.

PEFT computes batches in which every row has an adapter of its own or none. What it cannot mix is
refused here, and so is what would change the weights of the base, whose rows are in the same batch.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dlf_ray.models.files import Tensors, check_weights, folder_of, header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
UNMIXED = (
    *("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters"),
    *("alora_invocation_tokens", "arrow_config", "use_bdlora", "use_qalora", "kasa_config"),
    *("monteclora_config", "velora_config", "layer_replication", "megatron_config"),
)
"""Settings of variants of LoRA, and of what changes more than a row's own way through a layer."""
INITS = (True, False, "gaussian", "eva", "orthogonal")
"""How training may have begun; with others (PiSSA, OLoRA, ...) PEFT alters the base's weights."""
HEADS = ("lm_head", "embed_out")
"""Output embeddings: they get wanted positions only, of all rows as one."""
log = logging.getLogger("dlf_ray")


@dataclass(frozen=True)
class Adapter:
    """An adapter whose rows can be in one batch with others."""

    source: str
    """A folder or a hub id, as the family names it."""
    folder: Path
    trained_over: str
    """What it says that its base is."""


def find_adapter(source: str, base: str) -> Adapter:
    """Reads no more than what an adapter says of itself.

    Raises `ValueError`, saying what to do, where it is none, or one that needs a model of its own.
    """
    check_peft(source)
    folder = folder_of(source, [CONFIG, WEIGHTS])
    config = config_of(source, folder)
    if why := beyond_lora(config):
        raise unmixed(source, why)
    for key in tensors_of_adapter(source, folder):
        if outside(key):
            raise unmixed(source, f"has {key}, and so changes more than the layers between")
    trained_over = str(config.get("base_model_name_or_path") or "a base that it does not name")
    if Path(trained_over).name != Path(base).name:
        log.warning("the adapter %s was trained over %s, not over %s", source, trained_over, base)
    return Adapter(source, folder, trained_over)


def beyond_lora(config: Mapping[str, Any]) -> str | None:
    """What of an adapter's settings makes it more, or other, than matrices beside those of its
    base."""
    kind = config.get("peft_type")
    if kind != "LORA":
        return f"is of type {kind}, not LORA"
    if names := [name for name in UNMIXED if config.get(name)]:
        return f"sets `{names[0]}`"
    if (bias := config.get("bias", "none")) != "none":
        return f"has biases of its own (`bias: {bias}`)"
    if (init := config.get("init_lora_weights", True)) not in INITS:
        return f"changes its base (`init_lora_weights: {init}`)"
    return None


def outside(key: str) -> bool:
    """Whether a weight of an adapter is not LoRA's, or not of a layer between the embeddings."""
    return not re.search(r"\.lora_[AB]\.(weight|bias)$", key) or key.split(".")[-3] in HEADS


def unmixed(source: str, why: str) -> ValueError:
    """What to raise for an adapter that needs a copy of the weights."""
    return ValueError(
        f"the adapter {source} {why}: it cannot share the weights of the base; give it as `model:` "
        "instead of `adapter:`, to be merged into a copy of them"
    )


class Adapters:
    """The adapters in the layers of a model, which is changed in place, and whose each row is."""

    def __init__(self, model: Any, adapters: Sequence[Adapter], base: str) -> None:
        """Loads them, in the types of the layers. Raises `ValueError` for one that does not fit."""
        self._names = ["__base__", *(f"adapter_{i}" for i in range(len(adapters)))]
        self._rows: list[str] = []
        if not adapters:
            return
        from peft import LoraConfig, PeftModel
        from peft.tuners.lora import LoraLayer

        wrapped: Any = None
        for adapter, name in zip(adapters, self._names[1:], strict=True):
            folder = str(adapter.folder)
            misfit = f"the adapter {adapter.source}, trained over {adapter.trained_over}, does not "
            misfit += f"fit {base}: set `base:` to the model that it was trained over"
            try:
                if wrapped is None:
                    config = LoraConfig.from_pretrained(folder)
                    wrapped = PeftModel(model, config, name, autocast_adapter_dtype=False)
                read = wrapped.load_adapter(
                    folder, name, torch_device=str(model.device), autocast_adapter_dtype=False
                )
            except torch.OutOfMemoryError:
                raise
            except (OSError, TypeError, ValueError, RuntimeError, KeyError) as error:
                raise ValueError(f"{misfit} ({error})") from error
            if read.missing_keys or read.unexpected_keys:
                key = [*read.missing_keys, *read.unexpected_keys][0]
                raise ValueError(f"{misfit} ({key} is in one of them only)")
        model.eval()
        modules: Iterable[torch.nn.Module] = model.modules()
        for module in modules:
            if isinstance(module, LoraLayer):
                module.register_forward_pre_hook(self._tell, with_kwargs=True)

    def point(self, models: Iterable[int]) -> None:
        """Says whose each row of the next pass is: 0 the base's, k the k-th adapter's."""
        self._rows = [self._names[model] for model in models]

    def _tell(
        self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A hook that stays: PEFT's own are put on every layer anew in each pass."""
        return args, {**kwargs, "adapter_names": self._rows}


def check_peft(source: str) -> None:
    """Raises `ValueError` where what adapters need is not here."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f'the adapter {source} needs peft: pip install "dlf_ray[adapters]"')


def config_of(source: str, folder: Path) -> Mapping[str, Any]:
    """What an adapter says of itself. Raises `ValueError` for what is none."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "a whole model goes to `model:`"
        raise ValueError(f"{source} has no {CONFIG}, so it is no adapter: {hint}") from None
    except ValueError as error:
        raise ValueError(f"{CONFIG} of {source} is not JSON ({error}): copy it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} of {source} holds no settings: copy it again")
    return config


def tensors_of_adapter(source: str, folder: Path) -> Tensors:
    """Its weights, of which none is read. Raises `ValueError` where there are none in safetensors,
    or not whole."""
    if (folder / WEIGHTS).is_file():
        check_weights(folder)
        return header(folder / WEIGHTS)
    if (folder / PICKLED).is_file():
        raise ValueError(
            f"the adapter {source} has no {WEIGHTS}. Pickled weights can run code when loaded; "
            'convert them once, without that: python -c "import torch; from safetensors.torch '
            f"import save_file; save_file(torch.load('{folder / PICKLED}', weights_only=True), "
            f"'{folder / WEIGHTS}')\""
        )
    raise ValueError(f"the adapter {source} has no {WEIGHTS}: save it with save_pretrained of peft")
