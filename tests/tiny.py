"""Tiny random models and tokenizers in local folders: everything a test needs of a checkpoint.

Weights are drawn with a large standard deviation, so that next-token distributions are peaked and
differ between seeds: with the usual 0.02 every model would answer alike and hide mistakes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

EOS, BOS = "<|end|>", "<|begin|>"
CORPUS = """\
The sum of two and three is five. If a train leaves at noon and runs for four hours, it arrives at
four. def add(a, b): return a + b. Question: what is 12 times 7? Answer: 84. Is the moon made of
cheese? No, the moon is made of rock. Each model sees the same tokens and gives its own logits.
"""

WINDOW = 5
"""Sliding windows are shorter than the tests' sequences, so that they matter."""

ARCHS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen2_sliding": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3": {"head_dim": 8},
    "gpt_neox": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral": {"sliding_window": WINDOW},
    "gpt2": {},
    "olmo2": {},
    "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
}
"""What each architecture adds to the common settings; the part before `_sliding` is its type."""


def tokenizer(
    folder: str | Path,
    vocab: int = 300,
    bos: bool = False,
    corpus: str = CORPUS,
    words: bool = True,
) -> PreTrainedTokenizerFast:
    """Saves a byte-level BPE tokenizer of at most `vocab` (at least 258) tokens, eos included.

    With `bos`, every text begins with `BOS`. Without `words`, tokens reach over anything, line
    breaks too.
    """
    bpe = ByteLevelBPETokenizer()
    if not words:
        bpe._tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    special = [EOS, BOS] if bos else [EOS]
    bpe.train_from_iterator([corpus], vocab, min_frequency=1, special_tokens=special)
    more = {}
    if bos:
        more["bos_token"] = BOS
        bpe._tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=EOS, **more)
    fast.save_pretrained(folder)
    return fast


def model(
    folder: str | Path,
    arch: str = "llama",
    hidden: int = 32,
    layers: int = 2,
    vocab: int = 300,
    seed: int = 0,
    std: float = 0.4,
    dtype: torch.dtype = torch.float32,
    bos: bool = False,
    **config: Any,
) -> Path:
    """Saves a random model of one of `ARCHS` with its tokenizer; returns the folder.

    4 attention heads, 2 of keys and values where the architecture has grouped ones. `vocab` is
    the number of rows of the embedding; `config` overrides single settings.
    """
    folder = Path(folder)
    eos = tokenizer(folder, vocab, bos).eos_token_id
    settings = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": vocab,
        "initializer_range": std,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": None,
        **ARCHS[arch],
        **config,
    }
    if arch in ("gpt_neox", "gpt2"):
        del settings["num_key_value_heads"]
    if arch == "gpt2":  # its embeddings are positional: nothing may move them but `position_ids`
        del settings["intermediate_size"]
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(arch.removesuffix("_sliding"), **settings), dtype=dtype
    )
    made.generation_config.eos_token_id = eos
    made.save_pretrained(folder)
    return folder
