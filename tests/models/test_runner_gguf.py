"""GGUF files: the model of the folder that they were made of, or a sentence that says why not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import ggufs
import pytest
import tiny
import torch
from conftest import dlf
from runners import VOCAB, Oracle, Schedule, close, follow, make_plan, runner
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlf_ray import Family
from dlf_ray.config import EngineConfig, ModelSpec
from dlf_ray.models.inspect import inspect
from dlf_ray.models.loading import load_model, load_tokenizer
from dlf_ray.models.vllm_runner import check_source

IDS = torch.tensor([[1, 2, 3, 40, 50, 299]])
TEXT = "Question: what is 12 times 7? Answer: 84.\n\nEach model sees the same tokens."


@pytest.fixture(scope="module")
def llama(folders):
    return folders["llama"]


@pytest.fixture(scope="module")
def file(llama, tmp_path_factory):
    return ggufs.write(llama, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_file_is_the_model_of_its_folder(llama, file):
    made = runner(file)
    assert made.vocab == VOCAB
    assert made.describe().eos_token_ids == runner(llama).describe().eos_token_ids
    assert follow(made, Oracle(llama), Schedule(0, 4, 64), steps=15) > 10
    own, theirs = load_tokenizer(ModelSpec(model=str(file))), AutoTokenizer.from_pretrained(llama)
    assert own.get_vocab() == theirs.get_vocab()
    assert own(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
    assert own.eos_token == tiny.EOS


def test_another_tokenizer(llama, file, tmp_path):
    tiny.tokenizer(tmp_path, 290)
    assert len(load_tokenizer(ModelSpec(model=str(file), tokenizer=str(tmp_path)))) == 290
    both = ModelSpec(model=str(llama), tokenizer=str(file))
    assert len(load_tokenizer(both)) == VOCAB


def test_what_lies_beside_a_file_is_not_its_own(file, tmp_path):
    tiny.tokenizer(tmp_path, 290)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    beside = shutil.copy(file, tmp_path)
    tokenizer = load_tokenizer(ModelSpec(model=str(beside)))
    assert len(tokenizer) == VOCAB
    assert not tokenizer.chat_template


@pytest.mark.parametrize(
    ("kind", "auto"), [("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "float32")]
)
def test_types_of_weights(llama, tmp_path, kind, auto):
    file = ggufs.write(llama, tmp_path / "tiny.gguf", kind)
    model = load_model(ModelSpec(model=str(file)))
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, auto)}
    full = ModelSpec(model=str(file), dtype="float32")
    with torch.inference_mode():
        logits = load_model(full)(IDS).logits
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=file.name, dtype="float32"
        )
        assert torch.equal(logits, theirs(IDS).logits)
        # Near the unrounded ones, which another order of the rows would not be.
        expected = AutoModelForCausalLM.from_pretrained(llama)(IDS).logits
    off = (logits - expected).norm() / expected.norm()
    assert 0 < off < 0.05
    half = load_model(ModelSpec(model=str(file), dtype="bfloat16"))
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


def test_an_unpacked_model_is_as_any(llama, tmp_path, capsys):
    file = ggufs.write(llama, tmp_path / "tiny.gguf", "Q8_0")
    model = load_model(ModelSpec(model=str(file)))
    assert "%|" not in capsys.readouterr().err  # no bar in an actor's log
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer")
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.inference_mode():
        assert torch.equal(saved(IDS).logits, model(IDS).logits)


def refused(spec: ModelSpec, words: str) -> None:
    """By loading, and by the check in the same words."""
    with pytest.raises(ValueError, match=words) as caught:
        load_model(spec)
    assert len(str(caught.value).splitlines()) == 1
    told = [each.text for each in inspect(spec, EngineConfig()).problems if each.kind == "error"]
    assert str(caught.value) in told


@pytest.mark.parametrize("kept", [0, 3, 20, 500, 3000, 0.5, -1])
def test_a_file_that_was_cut_off(file, tmp_path, kept):
    whole = file.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    refused(ModelSpec(model=str(cut)), r"cut\.gguf is damaged, incomplete, or no GGUF file.*again")


def test_what_is_no_such_file(llama, tmp_path):
    other = tmp_path / "other.gguf"
    shutil.copy(llama / "model.safetensors", other)
    refused(ModelSpec(model=str(other)), "no GGUF file")
    refused(ModelSpec(model=str(tmp_path / "none.gguf")), r"there is no file .*none\.gguf")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"arch": "grok"}, "does not convert GGUF files of architecture grok"),
        ({"fields": {"split.count": 3}}, "is one of 3 files of a model: join them with"),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, r"scales its positions \(rope.*: yarn"),
        (
            {"more": {"rope_freqs.weight": torch.tensor([1.0, 3.0, 2.0, 8.0])}},
            r"scales its positions \(rope_freqs",
        ),
        ({"without": "model.layers.1.mlp.up_proj.weight"}, r"lacks 1 weights.*1\.mlp\.up_proj"),
    ],
    ids=["architecture", "one of several", "scaled", "frequencies", "a weight less"],
)
def test_files_that_would_be_another_model(llama, tmp_path, how, words):
    file = ggufs.write(llama, tmp_path / "odd.gguf", **how)
    spec = ModelSpec(model=str(file))
    if "without" in how:  # seen once the weights are placed
        with pytest.raises(ValueError, match=words):
            load_model(spec)
    else:
        refused(spec, words)


def test_positions_of_llama_3(tmp_path):
    """A file holds the factors worked out, for each frequency."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    how = {"head_dim": 32, "max_position_embeddings": 131072, "rope_parameters": scaling}
    folder = tiny.model(tmp_path / "model", **how)
    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
    factors = plain / model.model.rotary_emb.inv_freq
    assert 7.9 < factors.max() < 8.1
    assert len({round(factor, 3) for factor in factors.tolist()}) > 2
    file = ggufs.write(folder, tmp_path / "llama3.gguf", more={"rope_freqs.weight": factors})
    ids = torch.arange(200)[None]
    with torch.inference_mode():
        close(load_model(ModelSpec(model=str(file)))(ids).logits, model(ids).logits)
    told, of_folder = (
        inspect(ModelSpec(model=str(path)), EngineConfig()) for path in (file, folder)
    )
    assert (told.weight_bytes, told.context) == (of_folder.weight_bytes, of_folder.context)


def test_without_the_library(file, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(ModelSpec(model=str(file)), r'tiny\.gguf is a GGUF file: pip install "dlf_ray\[gguf\]"')


def test_a_folder_of_files(file, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file, tmp_path / name)
    tiny.tokenizer(tmp_path)
    refused(ModelSpec(model=str(tmp_path)), r"no config\.json but 2 GGUF files.*`model: .*a\.gguf`")


def test_vllm_is_not_given_one(llama, file):
    for spec in (ModelSpec(model=str(file)), ModelSpec(model=str(llama), tokenizer=str(file))):
        with pytest.raises(ValueError, match=r"tiny\.gguf is a GGUF file, which vLLM does not"):
            check_source(spec)
    facts = inspect(ModelSpec(model=str(file), backend="vllm"), EngineConfig())
    assert any("is a GGUF file" in each.text for each in facts.problems)


def test_a_family_of_files(llama, file, tmp_path, monkeypatch):
    """Named relative to the family file, and by the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("near.gguf", "home.gguf"):
        shutil.copy(file, tmp_path / name)
    family = tmp_path / "family.yaml"
    family.write_text(
        "large: {model: near.gguf, num_cpus: 0.1}\n"
        "base: {model: ~/home.gguf, num_cpus: 0.1}\n"
        f"experts: {{same: {{model: {llama}, tokenizer: ~/home.gguf, num_cpus: 0.1}}}}\n"
        "engine: {max_num_seqs: 4, max_model_len: 64}\n"
    )
    read = Family.from_yaml(family)
    assert read.large.model == str(tmp_path / "near.gguf")
    assert read.base.model == read.experts["same"].tokenizer == str(tmp_path / "home.gguf")
    shown = dlf("check", family)
    assert shown.exit_code == 0, shown.output
    for name in ("large", "base"):
        assert re.search(rf"{name} +file +LlamaForCausalLM +yes", shown.output)


def test_texts_that_may_be_cut_otherwise(llama, tmp_path, caplog):
    file = ggufs.write(llama, tmp_path / "tiny.gguf", splits="smollm")
    words = f"{file} cuts texts as `smollm` does, which transformers"
    load_model(ModelSpec(model=str(file)))
    assert words in caplog.text
    facts = inspect(ModelSpec(model=str(file)), EngineConfig())
    assert [(each.kind, words in each.text) for each in facts.problems] == [("warning", True)]
    assert facts.transformers.takes
    known = inspect(ModelSpec(model=str(file), tokenizer=str(llama)), EngineConfig())
    assert known.problems == ()


def test_what_the_check_knows_of_one(llama, file):
    told = inspect(ModelSpec(model=str(file)), EngineConfig())
    of_folder = inspect(ModelSpec(model=str(llama)), EngineConfig())
    assert told.problems == ()
    assert told.where == "file"
    for name in ("tokens", "vocabulary", "context", "dtype", "weight_bytes", "position_bytes"):
        assert getattr(told, name) == getattr(of_folder, name), name
    assert (told.end_tokens, told.architecture) == (of_folder.end_tokens, "LlamaForCausalLM")
    half = inspect(ModelSpec(model=str(file), dtype="bfloat16"), EngineConfig())
    assert (half.dtype, 2 * half.weight_bytes) == ("bfloat16", told.weight_bytes)


def test_an_adapter_over_a_file(llama, file, tmp_path):
    peft = pytest.importorskip("peft")
    how = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), how).eval()
    adapted.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        (tmp_path / "adapter_config.json").read_text().replace(str(llama), str(file))
    )
    got = runner(Path(tmp_path)).forward(make_plan((0, 0, IDS[0].tolist(), 6)))
    with torch.inference_mode():
        close(got, adapted(input_ids=IDS).logits[0])
