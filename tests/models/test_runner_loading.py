"""What the runner loads: adapters, and the errors of what cannot be loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from runners import VOCAB, Oracle, close, make_plan, runner
from transformers import AutoConfig, AutoModelForCausalLM


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


def test_missing_weights_are_not_made_up(folder):
    edit(folder, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"lacks 9 weights.*layers\.2"):
        runner(folder)


def test_weights_of_other_shapes(folder):
    edit(folder, intermediate_size=48)
    with pytest.raises(ValueError, match="could not be loaded"):
        runner(folder)


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


def test_an_adapter_is_merged_into_its_base(folders, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(folders["llama"])
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.save_pretrained(tmp_path)
    tiny.tokenizer(tmp_path, VOCAB)
    with torch.inference_mode():
        expected = adapted.eval()(torch.tensor([[1, 2, 3]])).logits[0]
    got = runner(tmp_path).forward(make_plan((0, 0, [1, 2, 3], 3)))
    close(got, expected)
    assert not torch.allclose(got, Oracle(folders["llama"])([1, 2, 3]), atol=0.1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install peft"):
        runner(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpus_that_are_not_there(folders):
    with pytest.raises(ValueError, match="num_gpus: 0"):
        runner(folders["llama"], num_gpus=1)
