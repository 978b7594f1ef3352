"""A family of real shapes with random weights, built where it runs: no checkpoint needed."""

import time

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import dlf_ray.models.runner
from dlf_ray import Family, LocalEngine, SamplingParams

LLAMA_2_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
TINY_LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
MINIATURE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VOCAB = 32000


def vocabulary(_):
    words = {f"t{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def built(spec):
    """Instead of loading: the shape of this name, seeded by it, on the device and in the dtype."""
    kind, seed = spec.model.split("/")
    shape = {"13b": LLAMA_2_13B, "1.1b": TINY_LLAMA, "mini": MINIATURE}[kind]
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCAB, max_position_embeddings=2048, eos_token_id=None, **shape
    )
    torch.manual_seed(int(seed))
    with torch.device("cuda" if spec.num_gpus else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, spec.dtype)).eval()


@pytest.mark.parametrize(
    ("large", "small", "dtype", "num_gpus", "rows"),
    [
        pytest.param("mini", "mini", "float32", 0, 4, id="miniature"),
        pytest.param("13b", "1.1b", "bfloat16", 0.2, 32, id="13b", marks=pytest.mark.gpu),
    ],
)
def test_a_family_of_real_shapes_decodes(monkeypatch, large, small, dtype, num_gpus, rows):
    monkeypatch.setattr(dlf_ray.models.runner, "load_model", built)
    monkeypatch.setattr(dlf_ray.models.runner, "load_tokenizer", vocabulary)
    monkeypatch.setattr("dlf_ray.models.loading.load_tokenizer", vocabulary)

    def spec(kind, seed):
        return {"model": f"{kind}/{seed}", "dtype": dtype, "num_gpus": num_gpus}

    family = Family.from_dict(
        {
            "large": spec(large, 0),
            "base": spec(small, 1),
            "experts": {name: spec(small, 2 + i) for i, name in enumerate("ab")},
            "engine": {"max_num_seqs": 32, "max_model_len": 512, "num_gpus": num_gpus},
        }
    )
    prompts = [[7 + row] * (3 + 5 * row) for row in range(rows)]
    sampling = SamplingParams(max_tokens=16, ignore_eos=True)
    with LocalEngine(family) as engine:
        engine.generate(prompts, sampling)  # warms up
        began = time.perf_counter()
        outputs = engine.generate(prompts, sampling)
        seconds = time.perf_counter() - began
        print(
            f"\n{rows} sequences, {16 * rows / seconds:.0f} tokens/s, {seconds / 16:.4f} s a step"
        )
        print(engine.coordinator.timings)
        assert all(len(output.token_ids) == 16 and not output.error for output in outputs)
        assert all(0 <= part < 100 for output in outputs for pair in output.kl for part in pair)
        assert any(output.weights[0]["a"] != output.weights[0]["b"] for output in outputs)
