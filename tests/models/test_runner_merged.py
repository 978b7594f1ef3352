"""Whatever PEFT saves: merged it answers as PEFT does unmerged, or a sentence says why not."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import tiny
import torch
from runners import VOCAB, close, make_plan, runner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dlf_ray.config import EngineConfig, ExpertSpec, ModelSpec
from dlf_ray.models.inspect import inspect
from dlf_ray.models.loading import load_model, load_tokenizer

peft = pytest.importorskip("peft")
IDS = torch.arange(0, VOCAB, 7)[None]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ATTENTION = ["q_proj", "v_proj"]
BOTH = ["embed_tokens", "lm_head"]


def lora(**how):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **how})


MERGED = {
    "LoRA": lora(),
    "rsLoRA": lora(use_rslora=True),
    "DoRA": lora(use_dora=True),
    "LoRA with biases of its own": lora(lora_bias=True),
    "biases of LoRA's layers": lora(bias="lora_only"),
    "all biases": lora(bias="all"),
    "ranks that differ": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "every linear layer": lora(target_modules="all-linear"),
    "the head": lora(target_modules=["lm_head", "q_proj"]),
    "the embeddings": lora(target_modules=["embed_tokens", "q_proj"]),
    "both": lora(target_modules=BOTH),
    "the head saved whole": lora(modules_to_save=["lm_head"]),
    "the embeddings saved whole": lora(modules_to_save=["embed_tokens"]),
    "both saved whole": lora(modules_to_save=BOTH),
    "a norm saved whole": lora(modules_to_save=["norm"]),
    "some tokens": lora(trainable_token_indices=[3, 7, 14]),
    "IA3": peft.IA3Config(
        target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}
"""What people have; all of it has to be merged."""
OTHERS = {
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=ATTENTION),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=ATTENTION),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, target_modules=ATTENTION),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=ATTENTION),
    "AdaLoRA": lambda: peft.AdaLoraConfig(total_step=10, target_modules=ATTENTION),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=ATTENTION),
    "LN": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=20, target_modules=ATTENTION),
    "ROAD": lambda: peft.RoadConfig(group_size=4, target_modules=ATTENTION),
    "tokens only": lambda: peft.TrainableTokensConfig(token_indices=[3, 7, 14]),
    "a layer twice": lambda: lora(layer_replication=[[0, 2], [1, 2]]),
    "after some tokens": lambda: lora(alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM"),
    "PiSSA": lambda: lora(init_lora_weights="pissa"),
    "parameters": lambda: lora(target_parameters=["mlp.up_proj.weight"]),
}
"""The rest, which may be refused."""
PROMPTS = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P_TUNING": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By whether input and output embeddings are one."""
    root = tmp_path_factory.mktemp("bases")
    return {
        tied: tiny.model(root / str(tied), tie_word_embeddings=tied, attention_bias=True)
        for tied in (False, True)
    }


def save(base, config, folder, **options):
    """An adapter that changes what it can."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, copy.deepcopy(config))
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad and weight.is_floating_point():
                weight += 0.2 * torch.randn(weight.shape).to(weight.dtype)
    adapted.save_pretrained(folder, **options)
    return folder


@torch.no_grad()
def of_peft(base, folder, **options):
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    return peft.PeftModel.from_pretrained(model, folder).eval()(input_ids=IDS).logits


@torch.no_grad()
def ours(folder, **spec):
    model = load_model(ModelSpec(model=str(folder), **spec))
    assert type(model).__name__ == "LlamaForCausalLM"
    return model(input_ids=IDS).logits


def refusal(spec) -> str:
    """One sentence, and the check says the same where it reads no more than headers."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_model(spec)
    assert len(str(caught.value).splitlines()) == 1, str(caught.value)
    return str(caught.value)


def checked(spec) -> str:
    problems = inspect(spec, EngineConfig()).problems
    return "\n".join(each.text for each in problems if each.kind == "error")


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("kind", MERGED)
def test_it_answers_as_peft_does(bases, tmp_path, kind, tied):
    folder = save(bases[tied], MERGED[kind], tmp_path)
    expected = of_peft(bases[tied], folder)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(bases[tied])(IDS).logits
    assert (expected - plain).abs().max() > 0.1
    close(ours(folder), expected)
    assert checked(ModelSpec(model=str(folder))) == ""


@pytest.mark.parametrize("modules", ["target_modules", "modules_to_save"])
def test_embeddings_that_an_adapter_keeps_tied(bases, tmp_path, modules):
    how = lora(**{modules: ["embed_tokens"], "ensure_weight_tying": True})
    folder = save(bases[True], how, tmp_path)
    close(ours(folder), of_peft(bases[True], folder))


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("kind", OTHERS)
def test_it_answers_as_peft_does_or_is_refused(bases, tmp_path, kind, tied):
    try:
        folder = save(bases[tied], OTHERS[kind](), tmp_path)
        expected = of_peft(bases[tied], folder)
    except Exception as error:
        pytest.skip(f"PEFT itself does not: {error!r}")
    try:
        got = ours(folder)
    except ValueError:
        assert str(folder) in refusal(ModelSpec(model=str(folder)))
    else:
        close(got, expected)


def test_half_precision(bases, tmp_path):
    folder = save(bases[True], lora(target_modules=[*BOTH, *ATTENTION]), tmp_path)
    expected = of_peft(bases[True], folder, dtype=torch.bfloat16)
    close(ours(folder, dtype="bfloat16"), expected, 0.1)


@pytest.mark.parametrize("kind", PROMPTS)
def test_learned_prompts(bases, tmp_path, kind):
    spec = ModelSpec(model=str(save(bases[False], PROMPTS[kind](), tmp_path)))
    words = refusal(spec)
    assert f"of type {kind}, learned prompts, which cannot be merged" in words
    assert words in checked(spec)


@pytest.mark.parametrize("kind", ["XLORA", "POLY"])
def test_another_change_for_each_text(bases, tmp_path, kind):
    folder = save(bases[False], lora(), tmp_path)
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": kind}))
    words = refusal(ModelSpec(model=str(folder)))
    assert f"of type {kind}, another change for each text, which cannot be merged" in words
    assert words in checked(ModelSpec(model=str(folder)))


@pytest.mark.parametrize("other", [{"hidden": 64}, {"layers": 1}, {"layers": 3}, {"arch": "gpt2"}])
def test_another_base(bases, tmp_path, other):
    folder = save(bases[False], lora(target_modules=[*ATTENTION, "up_proj"]), tmp_path / "adapter")
    base = tiny.model(tmp_path / "base", **other)
    spec = ExpertSpec(model=str(base), adapter=str(folder))
    assert f"the adapter {folder} does not fit {base}" in refusal(spec)


@pytest.mark.parametrize("kind", ["LoRA", "both saved whole", "some tokens", "DoRA", "the head"])
@pytest.mark.parametrize("change", ["one less", "one more"])
def test_weights_that_do_not_match(bases, tmp_path, kind, change):
    folder = save(bases[False], MERGED[kind], tmp_path)
    weights = load_file(folder / WEIGHTS)
    key = sorted(key for key in weights if "base_layer" not in key)[0]
    if change == "one less":
        del weights[key]
    else:
        weights[key.replace("base_model.model", "base_model.other")] = weights[key].clone()
    save_file(weights, folder / WEIGHTS)
    assert "does not fit" in refusal(ModelSpec(model=str(folder)))


def test_a_resized_vocabulary(bases, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(bases[False])
    model.resize_token_embeddings(VOCAB + 8)
    adapted = peft.get_peft_model(model, lora(init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")  # it saves the embeddings, too
    spec = ModelSpec(model=str(tmp_path / "adapter"))
    words = refusal(spec)
    assert f"over a vocabulary of {VOCAB + 8} rows, the base has {VOCAB}" in words
    assert "resize_token_embeddings" in words
    model = AutoModelForCausalLM.from_pretrained(bases[False])
    model.resize_token_embeddings(VOCAB + 8)
    model.save_pretrained(tmp_path / "base")
    spec = ExpertSpec(model=str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    with torch.no_grad():
        close(load_model(spec)(IDS).logits, adapted.eval()(input_ids=IDS).logits)


def test_pickled_weights(bases, tmp_path):
    folder = save(bases[False], lora(), tmp_path, safe_serialization=False)
    assert not (folder / WEIGHTS).exists()
    spec = ModelSpec(model=str(folder))
    words = refusal(spec)
    assert "Pickled weights can run code when loaded; convert them once" in words
    assert words in checked(spec)
    exec(words.split('python -c "')[1].rstrip('"'), {})
    close(ours(folder), of_peft(bases[False], folder))


def test_the_tokenizer_is_the_adapters_own_or_its_bases(bases, tmp_path):
    folder = save(bases[False], lora(), tmp_path)
    spec = ModelSpec(model=str(folder))
    assert len(load_tokenizer(spec)) == VOCAB
    assert inspect(spec, EngineConfig()).tokens == VOCAB
    tiny.tokenizer(folder, 290)
    assert len(load_tokenizer(spec)) == 290
    assert inspect(spec, EngineConfig()).tokens == 290
    given = ModelSpec(model=str(folder), tokenizer=str(bases[False]))
    assert len(load_tokenizer(given)) == VOCAB


def test_a_base_that_has_moved(bases, tmp_path):
    old, new = shutil.copytree(bases[True], tmp_path / "old"), tmp_path / "new"
    folder = save(old, lora(target_modules=BOTH), tmp_path / "adapter")
    expected = of_peft(old, folder)
    old.rename(new)
    spec = ModelSpec(model=str(folder))
    words = refusal(spec)
    assert f"the base of the adapter {folder} is not where that says: {old} is neither" in words
    assert f"`{{model: BASE, adapter: {folder}}}`" in words
    assert words in checked(spec)
    spec = ExpertSpec(model=str(new), adapter=str(folder))
    assert not spec.shares_base
    got = runner(new, adapter=str(folder), kind=ExpertSpec)
    close(got.forward(make_plan((0, 0, IDS[0].tolist(), IDS.shape[1]))), expected[0])
    assert checked(spec) == ""
    facts = inspect(spec, EngineConfig())
    assert (facts.source, facts.tokens, facts.adapter.kind) == (str(folder), VOCAB, "LORA")


def test_a_base_that_is_the_adapter(bases, tmp_path):
    folder = save(bases[False], lora(), tmp_path)
    file = folder / CONFIG
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(folder)})
    )
    words = refusal(ModelSpec(model=str(folder)))
    assert f"{folder} is the adapter itself" in words
    assert words in checked(ModelSpec(model=str(folder)))


def test_no_base_is_named(bases, tmp_path):
    folder = save(bases[False], lora(), tmp_path)
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    spec = ModelSpec(model=str(folder))
    words = refusal(spec)
    assert "names no `base_model_name_or_path` to put the adapter on" in words
    assert words in checked(spec)
    close(
        load_model(ExpertSpec(model=str(bases[False]), adapter=str(folder)))(IDS).logits,
        of_peft(bases[False], folder),
    )


def test_an_adapter_over_an_adapter(bases, tmp_path):
    one = save(bases[False], lora(), tmp_path / "one")
    first = load_model(ModelSpec(model=str(one)))
    first.save_pretrained(tmp_path / "whole")
    two = save(tmp_path / "whole", lora(target_modules=["up_proj"]), tmp_path / "two")
    spec = ExpertSpec(model=str(one), adapter=str(two))
    with torch.no_grad():
        close(load_model(spec)(IDS).logits, of_peft(tmp_path / "whole", two))


def test_without_the_library(bases, tmp_path, monkeypatch):
    folder = save(bases[False], lora(), tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'needs peft: pip install "dlf_ray[adapters]"' in refusal(ModelSpec(model=str(folder)))
