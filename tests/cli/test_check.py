"""What `dlf check` says of families, good ones and those with one thing wrong."""

from __future__ import annotations

import json
import re
import shutil

import huggingface_hub
import peft
import pytest
import ray
import tiny
import torch
import yaml
from conftest import EXPERTS, dlf, family_of, settings_of
from processes import groups, settled
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dlf_ray import Family
from dlf_ray.engine import capacity, checks
from dlf_ray.models import inspect as looking

ARCH = "LlamaForCausalLM"


@pytest.fixture
def no_cluster(monkeypatch):
    """Whatever runs on this machine."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "local")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "family.yaml"


@pytest.fixture
def said(file, no_cluster):
    """What `dlf check --json` says of a family of settings, and that its exit code fits."""

    def of(settings):
        file.write_text(yaml.safe_dump(settings, sort_keys=False))
        shown = dlf("check", file, "--json")
        answer = json.loads(shown.stdout)
        assert shown.exit_code == (0 if answer["ok"] else 1)
        return answer

    return of


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of one of the family's models, to be broken."""
    return lambda name: shutil.copytree(folder / name, tmp_path / name)


def replaced(folder, name, path, **engine):
    """The family with another folder for one of its models."""
    settings = settings_of(folder, **engine)
    spec = settings[name] if name in settings else settings["experts"][name]
    spec["model"] = str(path)
    return settings


def texts(answer, kind, model=None):
    return [p["text"] for p in answer["problems"] if (p["kind"], p["model"]) == (kind, model)]


def error(answer, model=None):
    """The only error."""
    errors = [p for p in answer["problems"] if p["kind"] == "error"]
    assert len(errors) == 1, errors
    assert errors[0]["model"] == model
    return errors[0]["text"]


def lora(base, folder, **config):
    """Saves an adapter over a model."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], **config}
    model = AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(**settings)).save_pretrained(folder)
    return folder


def with_adapter(folder, path, backend="auto", **engine):
    settings = settings_of(folder, experts=("math",), backend=backend, **engine)
    return {**settings, "experts": {**settings["experts"], "lora": {"adapter": str(path)}}}


def test_a_good_family(folder, file, no_cluster):
    file.write_text(yaml.safe_dump(settings_of(folder), sort_keys=False))
    shown = dlf("check", file)
    assert shown.exit_code == 0, shown.output
    for name in ("large", "base", *EXPERTS):
        assert re.search(rf"{name} +folder +{ARCH} +yes \* +no ", shown.output)
    assert "no Ray cluster runs here; the family needs 0.6 CPU in total" in shown.output
    assert "note: large, base, math, facts, prose: vllm: " in shown.output
    assert "error" not in shown.output
    assert "warning: large: its tokenizer has no chat template" in shown.output


def test_what_scripts_get(folder, said):
    answer = said(settings_of(folder))
    assert answer["ok"]
    assert list(answer["models"]) == ["large", "base", *EXPERTS]
    large = answer["models"]["large"]
    assert large["source"] == str(folder / "large")
    expected = {"where": "folder", "architecture": ARCH, "dtype": "float32", "tokens": 300}
    assert {key: large[key] for key in expected} == expected
    assert (large["end_tokens"], large["context"]) == ([0], 512)
    assert large["chat_template"] is False
    assert large["backends"]["transformers"] == {"takes": True, "reasons": []}
    weights = sum(t.nbytes for t in load_file(folder / "large" / "model.safetensors").values())
    assert large["weight_bytes"] == weights
    # 2 of keys and values, 3 layers, 2 heads of 12, float32
    assert large["cache_bytes_per_position"] == 2 * 3 * 2 * 12 * 4
    actor = answer["actors"]["large"]
    assert actor["models"] == ["large"]
    assert actor["asks"] == {"CPU": 0.1}
    assert actor["weight_bytes"] == weights
    assert actor["cache_bytes"] == 8 * 256 * large["cache_bytes_per_position"]
    assert answer["actors"]["coordinator"]["asks"] == {"CPU": 0.1}
    assert answer["cluster"]["nodes"] == 0


def test_another_dtype_takes_other_memory(folder, said):
    settings = settings_of(folder)
    settings["base"]["dtype"] = "bfloat16"
    models = said(settings)["models"]
    assert models["base"]["dtype"] == "bfloat16"
    for key in ("weight_bytes", "cache_bytes_per_position"):
        assert 2 * models["base"][key] == models["math"][key]


def test_a_family_file_that_is_none(file):
    file.write_text("large: 3")
    shown = dlf("check", file, "--json")
    assert shown.exit_code == 1
    assert "large" in error(json.loads(shown.stdout))
    shown = dlf("check", file)
    assert shown.exit_code == 1
    assert "error: " in shown.output


def test_a_missing_folder(folder, said, tmp_path):
    answer = said(replaced(folder, "math", tmp_path / "none"))
    assert "none is neither a folder nor a model of the Hugging Face hub" in error(answer, "math")
    assert answer["models"]["math"]["where"] == ""


def test_a_hub_id_that_nobody_has(folder, said):
    answer = said(replaced(folder, "math", "nobody/nothing"))
    assert "not in the local cache of the Hugging Face hub" in error(answer, "math")


def test_no_configuration(folder, said, copy):
    path = copy("math")
    (path / "config.json").unlink()
    assert "no config.json" in error(said(replaced(folder, "math", path)), "math")


def test_no_tokenizer(folder, said, copy):
    path = copy("math")
    for each in path.glob("tokenizer*"):
        each.unlink()
    settings = replaced(folder, "math", path)
    assert "set `tokenizer:` in the family file" in error(said(settings), "math")
    settings["experts"]["math"]["tokenizer"] = str(folder / "base")
    assert said(settings)["ok"]


def test_another_tokenizer(folder, said, copy):
    path = copy("math")
    tiny.tokenizer(path, 290)
    text = error(said(replaced(folder, "math", path)), "math")
    assert f"large ({folder / 'large'}) (300 tokens) and math ({path}) (290 tokens)" in text
    assert re.search(r"id 290 is '.+' in large .* and nothing in math", text)


def test_pickled_weights(folder, said, copy):
    path = copy("math")
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")
    assert "convert them once: python -c" in error(said(replaced(folder, "math", path)), "math")


def test_a_truncated_file(folder, said, copy):
    path = copy("math")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    text = error(said(replaced(folder, "math", path)), "math")
    assert f"{weights} is damaged or incomplete" in text


@pytest.fixture
def shards(copy):
    path = copy("math")
    whole = AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    whole.save_pretrained(path, max_shard_size="30KB")
    return path


def test_of_many_files_one_is_missing(folder, said, shards):
    settings = replaced(folder, "math", shards)
    answer = said(settings)
    assert answer["ok"]
    sizes = [answer["models"][name]["weight_bytes"] for name in ("math", "facts")]
    assert sizes[0] == sizes[1]
    (*_, last) = sorted(shards.glob("model-*.safetensors"))
    last.unlink()
    words = rf"lacks 1 of its \d safetensors files, {last.name} first"
    assert re.search(words, error(said(settings), "math"))


def test_of_many_files_one_lacks_weights(folder, said, shards):
    (*_, last) = sorted(shards.glob("model-*.safetensors"))
    weights = load_file(last)
    lost = sorted(weights)[0]
    del weights[lost]
    save_file(weights, last, metadata={"format": "pt"})
    text = error(said(replaced(folder, "math", shards)), "math")
    assert f"lacks 1 weights that its index lists, {lost} first" in text


def mamba(path):
    config = AutoConfig.for_model(
        "mamba", hidden_size=32, num_hidden_layers=2, vocab_size=300, state_size=4, eos_token_id=0
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tiny.tokenizer(path, 300)
    return path


def test_recurrent_layers(folder, said, tmp_path):
    answer = said(replaced(folder, "math", mamba(tmp_path / "mamba")))
    # Releases of transformers differ in whether the configuration says it.
    what = r"(recurrent layers|layers of type \w+), which a slot cache cannot hold"
    assert re.search(what, error(answer, "math"))
    backends = answer["models"]["math"]["backends"]
    assert backends["transformers"]["takes"] is False
    assert any("cannot go back" in reason for reason in backends["vllm"]["reasons"])


def test_layers_with_another_kind_of_state(folder, said, tmp_path):
    config = AutoConfig.for_model(
        "lfm2", hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=300,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"],
        eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lfm2")
    tiny.tokenizer(tmp_path / "lfm2", 300)
    answer = said(replaced(folder, "math", tmp_path / "lfm2"))
    assert "has layers of type conv, which a slot cache cannot hold" in error(answer, "math")


def test_what_is_no_causal_lm(folder, said, copy):
    path = copy("math")
    settings = {"d_model": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 300}
    AutoConfig.for_model("t5", architectures=["T5Model"], **settings).save_pretrained(path)
    assert "has an encoder and a decoder" in error(said(replaced(folder, "math", path)), "math")
    AutoConfig.for_model("clip_vision_model", architectures=["CLIPVisionModel"]).save_pretrained(
        path
    )
    assert "is not a causal LM" in error(said(replaced(folder, "math", path)), "math")


def test_every_architecture_of_the_tests_is_taken(folders):
    engine = family_of(folders["llama"].parent, experts=()).engine
    for arch, path in folders.items():
        facts = looking.inspect(looking.ModelSpec(model=str(path)), engine)
        assert facts.problems == (), arch
        assert facts.transformers.takes, arch
        assert facts.position_bytes, arch


def test_a_shorter_context(folder, said):
    answer = said(settings_of(folder, max_model_len=1000))
    assert answer["ok"]
    for name in ("large", "base", *EXPERTS):
        assert any("made for 512 tokens" in text for text in texts(answer, "warning", name))
    actor = answer["actors"]["base"]
    assert actor["cache_bytes"] == 8 * 512 * answer["models"]["base"]["cache_bytes_per_position"]


def test_chat_templates_and_end_tokens(folder, said, copy):
    settings = settings_of(folder)
    for name in ("large", "math"):
        path = copy(name)
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = "{{ messages[0]['content'] }}" + name
        tokenizer.save_pretrained(path)
        (settings if name == "large" else settings["experts"])[name]["model"] = str(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    answer = said(settings)
    assert answer["models"]["large"]["chat_template"] is True
    assert answer["models"]["math"]["end_tokens"] == [0, 7]
    assert texts(answer, "warning", "large") == []
    assert "its chat template is another one" in texts(answer, "warning", "math")[0]
    (text,) = texts(answer, "warning")
    assert "math [0, 7]" in text
    assert "those of any model that a request asks for end it" in text


def test_an_adapter_shares_the_weights_of_its_base(folder, said, tmp_path):
    answer = said(with_adapter(folder, lora(folder / "base", tmp_path / "lora")))
    assert answer["ok"], answer["problems"]
    facts, base = answer["models"]["lora"], answer["models"]["base"]
    assert facts["adapter"] == {
        **{"kind": "LORA", "rank": 4, "targets": ["q_proj", "v_proj"]},
        "over": str(folder / "base"),
    }
    assert 0 < facts["weight_bytes"] < base["weight_bytes"] / 2
    actor = answer["actors"]["base"]
    assert actor["models"] == ["base", "lora"]
    assert actor["weight_bytes"] == base["weight_bytes"] + facts["weight_bytes"]
    assert actor["cache_bytes"] == 2 * answer["actors"]["math"]["cache_bytes"]
    assert "lora" not in answer["actors"]


def test_an_adapter_over_another_base(folder, said, tmp_path):
    path = lora(folder / "large", tmp_path / "lora")
    answer = said(with_adapter(folder, path))
    text = error(answer, "lora")
    assert f"the adapter {path} does not fit {folder / 'base'}: use the model that" in text
    assert str(folder / "large") in text
    (warning,) = texts(answer, "warning", "lora")
    assert "these have to be the same model" in warning
    # Of the same shapes: what it is over is known by its name only.
    answer = said(with_adapter(folder, lora(folder / "math", tmp_path / "like")))
    assert answer["ok"]
    assert f"trained over {folder / 'math'}" in texts(answer, "warning", "lora")[0]


def test_an_adapter_of_more_layers_than_the_base_has(folder, said, tmp_path):
    tiny.model(tmp_path / "base", layers=3, seed=2)
    text = error(said(with_adapter(folder, lora(tmp_path / "base", tmp_path / "lora"))), "lora")
    assert "model.layers.2.self_attn" in text


def test_a_dora_adapter(folder, said, tmp_path):
    path = lora(folder / "base", tmp_path / "dora", use_dora=True)
    answer = said(with_adapter(folder, path))
    assert "`use_dora`: it cannot share the weights of the base" in error(answer, "lora")
    vllm = answer["models"]["lora"]["backends"]["vllm"]
    assert vllm["takes"] is False
    assert any("DoRA" in reason for reason in vllm["reasons"])
    # Merged it can be.
    settings = settings_of(folder, experts=("math",))
    tiny.tokenizer(path)
    settings["experts"]["math"]["model"] = str(path)
    answer = said(settings)
    assert answer["ok"], answer["problems"]
    math, base = answer["models"]["math"], answer["models"]["base"]
    assert math["weight_bytes"] == base["weight_bytes"]
    assert math["architecture"] == ARCH
    assert answer["actors"]["base"]["models"] == ["base"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"r": 600}, "512 at most")],
    ids=str,
)
def test_adapters_that_vllm_cannot_compute(folder, said, tmp_path, monkeypatch, config, reason):
    monkeypatch.setattr(looking, "check_version", lambda: None)
    monkeypatch.setattr(looking, "_vllm_registry", lambda: frozenset([ARCH]))
    path = lora(folder / "base", tmp_path / "lora", **config)
    answer = said(with_adapter(folder, path, backend="vllm"))
    assert reason in error(answer, "lora")
    assert answer["models"]["base"]["backends"]["vllm"]["takes"] is True


def test_a_merged_adapter_without_its_base(folder, said, tmp_path):
    tiny.model(tmp_path / "base", seed=2)
    path = lora(tmp_path / "base", tmp_path / "lora")
    tiny.tokenizer(path)
    shutil.rmtree(tmp_path / "base")
    answer = said(replaced(folder, "math", path))
    text = error(answer, "math")
    assert f"{tmp_path / 'base'} is neither a folder" in text
    assert f"`{{model: BASE, adapter: {path}}}`" in text


def test_vllm_that_is_not_there(folder, said, monkeypatch):
    settings = settings_of(folder, experts=(), backend="vllm")
    answer = said(settings)
    for name in ("large", "base"):
        assert any("not installed here" in text for text in texts(answer, "error", name))
    for name in ("large", "base"):
        settings[name]["runtime_env"] = {"py_executable": "/opt/vllm/bin/python"}
    answer = said(settings)
    assert answer["ok"]
    assert any("not installed here" in text for text in texts(answer, "warning", "large"))


def test_what_the_registry_of_vllm_does_not_have(folder, said, monkeypatch):
    monkeypatch.setattr(looking, "check_version", lambda: None)
    monkeypatch.setattr(looking, "_vllm_registry", lambda: frozenset(["GPT2LMHeadModel"]))
    answer = said(settings_of(folder, experts=(), backend="vllm"))
    assert answer["models"]["large"]["backends"]["vllm"]["takes"] is None
    assert any("not in vLLM's registry" in text for text in texts(answer, "warning", "large"))


def test_memory_that_is_too_little_for_one_sequence(folder, said):
    settings = settings_of(folder)
    settings["large"]["memory"] = 100_000
    assert re.search(
        r"weights of .* MiB and the cache of one sequence make .*, its `memory` is 0.10 MiB",
        error(said(settings), "large"),
    )
    settings["large"]["memory"] = 1_000_000
    answer = said(settings)
    assert answer["ok"]
    assert "fewer are decoded together" in " ".join(texts(answer, "warning", "large"))


def test_a_machine_with_too_little_memory(folder, said, monkeypatch):
    monkeypatch.setattr("dlf_ray.models.memory.free_bytes", lambda device: 1000)
    answer = said(settings_of(folder))
    assert any("this machine has 0.00 MiB free" in text for text in texts(answer, "warning"))


def test_gpus_of_this_machine(folder, said, monkeypatch):
    settings = settings_of(folder, num_gpus=0.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answer = said(settings)
    assert any("torch sees none on this machine" in text for text in texts(answer, "warning"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device = type("Device", (), {"total_memory": 200_000})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    errors = texts(said(settings), "error", "large")
    assert any("0.5 GPUs of this machine have 0.10 MiB" in text for text in errors)


def check(file, settings):
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    return dlf("check", file)


@pytest.mark.usefixtures("ray_cluster")
def test_room_on_a_cluster(folder, file):
    shown = check(file, settings_of(folder))
    assert shown.exit_code == 0, shown.output
    assert "cluster: room now (0.6 CPU needed, 1 node)" in shown.output


@pytest.mark.usefixtures("ray_cluster")
def test_too_little_memory_on_a_cluster(folder, file):
    settings = settings_of(folder)
    settings["large"]["memory"] = 2**50
    shown = check(file, settings)
    assert shown.exit_code == 1
    assert "cluster: no room" in shown.output
    assert "error: the cluster is too small for the family" in shown.output
    assert "no node has room for large (0.1 CPU, " in shown.output
    assert not groups()


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_that_others_use(folder, file):
    group = ray.util.placement_group([{"CPU": 4}])
    try:
        assert settled(lambda: not capacity.present(free=True)[0].resources["CPU"])
        shown = check(file, settings_of(folder))
    finally:
        ray.util.remove_placement_group(group)
    assert shown.exit_code == 0, shown.output
    assert "cluster: room, but not now" in shown.output
    assert "warning: others hold some of what the family needs" in shown.output


@pytest.fixture
def cached(folder, tmp_path, monkeypatch):
    """A local cache of the hub that holds `tiny/math`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--tiny--math"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    return shutil.copytree(folder / "math", repo / "snapshots" / ("0" * 40))


def test_what_the_cache_of_the_hub_holds(folder, said, cached):
    settings = replaced(folder, "math", "tiny/math")
    answer = said(settings)
    assert answer["ok"], answer["problems"]
    assert answer["models"]["math"]["where"] == "cache"
    whole = answer["models"]["facts"]["weight_bytes"]
    assert answer["models"]["math"]["weight_bytes"] == whole
    (cached / "model.safetensors").unlink()
    answer = said(settings)
    assert answer["ok"]
    assert answer["models"]["math"]["weight_bytes"] is None
    assert answer["actors"]["math"]["weight_bytes"] is None
    assert any("they are fetched" in text for text in texts(answer, "warning", "math"))


def test_a_hub_that_answers_is_asked_for_sizes(folder, said, cached, monkeypatch):
    (cached / "model.safetensors").unlink()
    fetched = huggingface_hub.snapshot_download

    def download(name, *, allow_patterns, local_files_only, **options):
        assert not local_files_only
        assert not any("safetensors" in each for each in allow_patterns if "index" not in each)
        return fetched(name, local_files_only=True)

    info = huggingface_hub.utils.TensorInfo(dtype="F32", shape=[10, 10], data_offsets=(0, 400))
    file = type("File", (), {"tensors": {"a": info}})()
    told = type("Told", (), {"files_metadata": {"model.safetensors": file}})()
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name, timeout: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name, timeout: told)
    math = said(replaced(folder, "math", "tiny/math"))["models"]["math"]
    assert math["where"] == "hub"
    assert math["weight_bytes"] == 400


def test_what_is_certain_is_raised_before_a_start(folder, copy, tmp_path):
    checks.check_family(family_of(folder))
    path = copy("math")
    (path / "model.safetensors").unlink()
    other = copy("facts")
    tiny.tokenizer(other, 290)
    settings = settings_of(folder)
    settings["experts"]["math"]["model"] = str(path)
    settings["experts"]["facts"]["model"] = str(other)
    family = Family.from_dict(settings)
    with pytest.raises(ValueError, match="no weights in safetensors") as caught:
        checks.check_family(family)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"model 'math' ({path}): ")
    assert "do not share a vocabulary" in second
    checks.check_family(family, ["large", "base", "prose"])


def test_what_is_not_here_may_be_elsewhere(folder, tmp_path):
    family = Family.from_dict(replaced(folder, "math", tmp_path / "none"))
    with pytest.raises(ValueError, match="neither a folder"):
        checks.check_family(family)
    checks.check_family(family, elsewhere=True)
    family = Family.from_dict(settings_of(folder, backend="vllm"))
    with pytest.raises(ValueError, match="not installed here"):
        checks.check_family(family)
    checks.check_family(family, elsewhere=True)


def test_no_hub_is_asked_before_a_start(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "model_info", None)
    checks.check_family(Family.from_dict(replaced(folder, "math", "nobody/nothing")))
