"""Checkpoints with quantised weights under vLLM, against transformers with what these stand for."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from runners import Oracle, close, make_plan
from safetensors.torch import load_file, save_file
from vllms import HEAD, Apart, needs_vllm

pytestmark = needs_vllm
GROUP, MOST_FP8 = 32, 448
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of eight numbers in a word."""


def rounded(weight, bits, group):
    """Integers and the scale of each group of inputs, [out, in] and [out, groups]."""
    parts = weight.view(len(weight), -1, group)
    top = 2 ** (bits - 1) - 1
    scale = parts.abs().amax(-1, keepdim=True) / top
    return (parts / scale).round().clamp(-top, top).view_as(weight).int(), scale[..., 0]


def packed(numbers, order=range(8)):
    """Eight numbers of 4 bits in each word, along the last dimension."""
    eights = numbers.view(*numbers.shape[:-1], -1, 8)
    return sum(eights[..., n] << 4 * at for at, n in enumerate(order)).to(torch.int32)


def int8(weight):
    whole, scale = rounded(weight, 8, weight.shape[1])
    return {"weight": whole.to(torch.int8), "weight_scale": scale}, whole * scale


def fp8(weight):
    scale = weight.abs().amax(-1, keepdim=True) / MOST_FP8
    eighths = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": eighths, "weight_scale": scale}, eighths.float() * scale


def w4a16(weight):
    whole, scale = rounded(weight, 4, GROUP)
    scale = scale.bfloat16()
    saved = {"weight_packed": packed(whole + 8), "weight_scale": scale}
    saved["weight_shape"] = torch.tensor(weight.shape)
    return saved, whole * scale.float().repeat_interleave(GROUP, 1)


def awq(weight):
    whole, scale = rounded(weight, 4, GROUP)
    scale = scale.half()
    zeros = torch.full(scale.T.shape, 8, dtype=torch.int32)
    saved = {"qweight": packed((whole.T + 8).contiguous(), AWQ_ORDER)}
    saved |= {"qzeros": packed(zeros, AWQ_ORDER), "scales": scale.T}
    return saved, whole * scale.float().repeat_interleave(GROUP, 1)


def compressed(form, weights, activations=None):
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    if activations:
        group["input_activations"] = {"symmetric": True, "dynamic": True, **activations}
    config = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    return {**config, "format": form, "ignore": ["lm_head"], "config_groups": {"group_0": group}}


KINDS = {
    "int8": (
        int8,
        compressed(
            "int-quantized",
            {"num_bits": 8, "type": "int", "strategy": "channel"},
            {"num_bits": 8, "type": "int", "strategy": "token"},
        ),
    ),
    "fp8": (
        fp8,
        compressed(
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "channel"},
            {"num_bits": 8, "type": "float", "strategy": "token"},
        ),
    ),
    "w4a16": (
        w4a16,
        compressed(
            "pack-quantized",
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP},
        ),
    ),
    "awq": (
        awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
    ),
}


def checkpoint(to, kind):
    """A model with all but its embeddings quantised, and one with the weights that it has then."""
    quantise, config = KINDS[kind]
    plain = tiny.model(to / "plain", **HEAD)
    shutil.copytree(plain, to / kind)
    weights = load_file(plain / "model.safetensors")
    saved = dict(weights)
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        tensors, weights[name] = quantise(saved.pop(name))
        stem = name.removesuffix("weight")
        saved |= {stem + part: each.contiguous() for part, each in tensors.items()}
    for folder, tensors in ((plain, weights), (to / kind, saved)):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = to / kind / "config.json"
    told = {**json.loads(file.read_text()), "quantization_config": config}
    file.write_text(json.dumps(told))
    return to / kind, plain


def in_int8(row):
    scale = row.abs().amax(-1, keepdim=True) / 127
    return (row / scale).round() * scale


def in_fp8(row):
    scale = row.abs().amax(-1, keepdim=True) / MOST_FP8
    return (row / scale).to(torch.float8_e4m3fn).float() * scale


def rounding(oracle, rounded):
    """Quantises the input of every quantised layer, as kernels that multiply in 8 bits do."""
    for name, module in oracle.model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
    return oracle


@pytest.mark.parametrize(
    ("kind", "dtype", "inputs", "tolerance"),
    # A number between two of 8 bits may go either way; bfloat16 rounds in every layer.
    [
        ("int8", "float32", in_int8, 0.02),
        ("fp8", "float32", in_fp8, 0.02),
        ("w4a16", "bfloat16", None, 0.15),
        ("awq", "bfloat16", None, 0.15),
    ],
    ids=["int8", "fp8", "w4a16", "awq"],
)
def test_rows_are_those_of_what_the_weights_stand_for(tmp_path, kind, dtype, inputs, tolerance):
    folder, plain = checkpoint(tmp_path, kind)
    run, oracle = Apart(folder, spec={"dtype": dtype}), Oracle(plain)
    assert run.description.dtype == dtype
    if inputs:
        rounding(oracle, inputs)
    text = np.random.default_rng(0).integers(0, 300, 60).tolist()
    expected = oracle(text)
    got = run.forward(make_plan((0, 0, text, 60))).float()
    close(got, expected, tolerance)
    # In pieces, of two sequences beside each other, the second from a copy.
    run.forward(make_plan((1, 0, text[:30], 0)))
    plan = make_plan((1, 30, text[30:50], 20), (2, 25, text[25:26], 1), sources=(-1, 1))
    got = run.forward(plan).float()
    close(got, torch.cat([expected[30:50], expected[25:26]]), tolerance)
    run.close()
