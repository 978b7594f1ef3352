"""GGUF files of tiny models: what llama.cpp's converter makes of a folder, by its own library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NORMAL, CONTROL = 1, 3
"""Kinds of tokens."""


def write(
    folder: Path,
    to: Path,
    kind: str = "F32",
    *,
    arch: str = "llama",
    fields: Mapping[str, Any] | None = None,
    more: Mapping[str, torch.Tensor] | None = None,
    without: str | None = None,
    splits: str = "default",
) -> Path:
    """Writes a Llama model with its tokenizer, matrices as `kind`, `more` tensors or one less."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, writer = model.config, gguf.GGUFWriter(to, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for name, value in (fields or {}).items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_string
        add(name, value)
    _tokenizer(writer, folder, splits)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    weights = {
        names.get_name(key, try_suffixes=(".weight",)): _as_ggml(key, weight, config)
        for key, weight in model.state_dict().items()
        if key != without
    }
    for name, weight in {**weights, **(more or {})}.items():
        values = weight.float().numpy()
        as_what = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        packed = gguf.quantize(values, as_what)
        writer.add_tensor(name, np.ascontiguousarray(packed), raw_dtype=as_what)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


def _as_ggml(key: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Queries and keys are turned pair by pair there, not half by half."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((heads[part] for part in heads if part in key), None)
    if count is None:
        return weight
    return weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _tokenizer(writer: gguf.GGUFWriter, folder: Path, splits: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    special = set(tokenizer.all_special_tokens)
    state = tokenizer.backend_tokenizer.model.__getstate__()
    merges = json.loads(state)["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splits)
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([CONTROL if token in special else NORMAL for token, _ in vocab])
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    writer.add_token_merges(pairs)
    for add in (writer.add_eos_token_id, writer.add_bos_token_id, writer.add_unk_token_id):
        add(tokenizer.eos_token_id)  # transformers wants all of them
