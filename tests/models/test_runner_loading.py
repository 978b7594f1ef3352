"""The errors of what cannot be loaded, and what is loaded nevertheless."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import tiny
import torch
from runners import VOCAB, close, make_plan, runner
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
)

from dlf_ray.config import EngineConfig, ModelSpec
from dlf_ray.models.inspect import inspect
from dlf_ray.models.loading import load_model


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of a good model, to be broken."""
    return shutil.copytree(folders["llama"], tmp_path / "model")


def edit(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a model of the Hugging Face hub"):
        runner(tmp_path / "none")


def test_no_configuration(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        runner(folder)


def test_no_tokenizer(folder, folders):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="set `tokenizer:` in the family file"):
        runner(folder)
    assert runner(folder, tokenizer=str(folders["llama"])).vocab == VOCAB


def test_another_models_tokenizer(tmp_path, folders):
    tiny.tokenizer(tmp_path, 400)
    with pytest.raises(ValueError, match="ids beyond the model's 300"):
        runner(folders["llama"], tokenizer=str(tmp_path))


def test_pickled_weights(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="convert them once: python -c"):
        runner(folder)


def test_a_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete"):
        runner(folder)


def test_of_many_files_the_cut_one_is_named_before_any_is_read(folder, monkeypatch):
    whole = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="30KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[-1].write_bytes(shards[-1].read_bytes()[:100])
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match=rf"{shards[-1].name} is damaged or incomplete"):
        runner(folder)


def refused(folder, words, **spec):
    """In one sentence, and the check says the same."""
    spec = ModelSpec(model=str(folder), **spec)
    with pytest.raises(ValueError, match=words) as caught:
        load_model(spec)
    assert len(str(caught.value).splitlines()) == 1, str(caught.value)
    assert str(folder) in str(caught.value)
    told = [each.text for each in inspect(spec, EngineConfig()).problems if each.kind == "error"]
    assert told == [str(caught.value)]


def test_weights_of_other_shapes(folder):
    edit(folder, intermediate_size=48)
    words = r"has 6 weights of other shapes than its config\.json says"
    refused(folder, words + r".*\[32, 64\] instead of \[32, 48\]")


def test_a_weight_that_is_not_there(folder):
    edit(folder, num_hidden_layers=3)
    refused(folder, r"lacks 9 weights of its architecture, model\.layers\.2")


def test_weights_that_are_not_used(folder, caplog):
    edit(folder, num_hidden_layers=1)
    words = "has 9 weights that its architecture does not use, model.layers.1"
    assert runner(folder).vocab == VOCAB
    assert words in caplog.text
    caplog.clear()
    told = inspect(ModelSpec(model=str(folder)), EngineConfig()).problems
    assert [(each.kind, words in each.text) for each in told] == [("warning", True)]
    assert not caplog.text


def test_weights_that_nobody_misses(folder, caplog):
    """Buffers that older releases saved."""
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert runner(folder).vocab == VOCAB
    assert "does not use" not in caplog.text
    assert inspect(ModelSpec(model=str(folder)), EngineConfig()).problems == ()


@pytest.fixture
def shards(folder):
    """The same in several files."""
    whole = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="30KB")
    assert runner(folder).vocab == VOCAB
    return folder


def test_one_of_several_files_is_missing(shards):
    last = sorted(shards.glob("model-*.safetensors"))[-1]
    last.unlink()
    refused(shards, rf"lacks 1 of its \d safetensors files, {last.name} first")


def test_nothing_says_what_several_files_are(shards):
    (shards / "model.safetensors.index.json").unlink()
    refused(shards, r"has neither model\.safetensors nor model\.safetensors\.index\.json")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}'])
def test_an_index_that_cannot_be_read(shards, content):
    (shards / "model.safetensors.index.json").write_text(content)
    refused(shards, r"model\.safetensors\.index\.json cannot be read.*copy it again")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", r"config\.json cannot be read .*copy it again"),
        ("", r"config\.json cannot be read .*copy it again"),
        ("[]", r"config\.json cannot be read .*copy it again"),
        ("{}", r"has no configuration that transformers \S+ reads: .*`model_type`"),
        ('{"model_type": "lama"}', "reads: .*model type `lama`, which it does not know"),
    ],
)
def test_a_configuration_that_cannot_be_read(folder, content, words):
    (folder / "config.json").write_text(content)
    refused(folder, words)
    with pytest.raises(ValueError, match=words):  # not that it has no tokenizer
        runner(folder)


def test_a_type_of_numbers_that_is_none(folder):
    edit(folder, dtype="floaty16")
    refused(folder, "reads: its `dtype` is none of torch's .*floaty16")


@pytest.mark.parametrize(
    ("settings", "library"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, "gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
    ],
    ids=["gptq", "awq", "4 bit", "8 bit"],
)
def test_packed_weights_without_their_library(folder, settings, library):
    if importlib.util.find_spec(library):
        pytest.skip(f"{library} is installed here")
    edit(folder, quantization_config=settings)
    refused(folder, rf"is quantized \({settings['quant_method']}\), and .*pip install.*{library}")


def configured(folder, kind, name, **settings):
    AutoConfig.for_model(kind, architectures=[name], **settings).save_pretrained(folder)


def test_models_that_do_not_go_on_with_a_text(folder):
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    configured(folder, "clip_vision_model", "CLIPVisionModel", **vision)
    refused(folder, r"\(CLIPVisionModel\) is not a causal LM: transformers has none of this type")
    configured(folder, "llava", "LlavaForConditionalGeneration")
    refused(folder, r"\(LlavaForConditionalGeneration\) is not a causal LM")
    small = {"d_model": 32, "vocab_size": VOCAB}
    configured(folder, "t5", "T5ForConditionalGeneration", num_layers=1, **small)
    refused(folder, "has an encoder and a decoder")
    configured(folder, "bart", "BartForConditionalGeneration", decoder_layers=1, **small)
    refused(folder, "has an encoder and a decoder")


def test_a_model_that_sees_is_asked_for_texts(tmp_path):
    parts = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    text = {**parts, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
    vision = {**parts, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model(
        "gemma3", text_config={**text, "vocab_size": VOCAB}, vision_config=vision, eos_token_id=0
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path)
    tiny.tokenizer(tmp_path, VOCAB)
    assert inspect(ModelSpec(model=str(tmp_path)), EngineConfig()).problems == ()
    got = runner(tmp_path).forward(make_plan((0, 0, [1, 2, 3, 50], 4)))
    with torch.inference_mode():
        close(got, model.eval()(input_ids=torch.tensor([[1, 2, 3, 50]])).logits[0])


def test_an_encoder(folder):
    config = AutoConfig.for_model(
        "bert", hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=VOCAB,
        num_attention_heads=4, architectures=["BertForMaskedLM"],
    )  # fmt: skip
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    refused(folder, r"\(BertForMaskedLM\) is an encoder")


def test_the_home_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    spec = ModelSpec(model="~/model", tokenizer="~/model")
    assert spec.model == spec.tokenizer == str(folder)
    assert runner("~/model").vocab == VOCAB


def test_a_file_in_the_place_of_a_folder(folder):
    refused(folder / "model.safetensors", "is a file: name the folder that it is in")


def test_weights_that_are_not_finite(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[3] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="not finite"):
        runner(folder)


def test_layers_with_another_kind_of_state(tmp_path):
    config = AutoConfig.for_model(
        "lfm2", hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=VOCAB,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"],
        eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer(tmp_path, VOCAB)
    with pytest.raises(ValueError, match="layers of type conv"):
        runner(tmp_path)


def test_an_architecture_that_masks_by_itself(tmp_path):
    # Its local layers take the length of the cache for the length of every sequence.
    config = AutoConfig.for_model(
        "gpt_neo", hidden_size=32, num_layers=2, num_heads=4, vocab_size=VOCAB, window_size=5,
        attention_types=[[["global", "local"], 1]], initializer_range=0.4, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer(tmp_path, VOCAB)
    with pytest.raises(ValueError, match="answers otherwise with a slot cache"):
        runner(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpus_that_are_not_there(folders):
    with pytest.raises(ValueError, match="num_gpus: 0"):
        runner(folders["llama"], num_gpus=1)
