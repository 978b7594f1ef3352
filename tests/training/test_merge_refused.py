"""What a merge cannot do is said in one sentence, before anything is written."""

import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from conftest import EXPERTS, adapted
from merges import edit, rewrite, source, tensors
from safetensors.torch import save_file

from dlf_ray.training.merge import merge
from dlf_ray.training.recipe import Recipe


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return adapted(tmp_path_factory.mktemp("adapted"))


@pytest.fixture
def family(folder, tmp_path):
    """A family of one's own, to be spoilt."""
    return shutil.copytree(folder, tmp_path / "family")


def two(weight=0.5, **parameters):
    return [source(f"family/{name}", weight=weight, **parameters) for name in EXPERTS[:2]]


def refusal(tmp_path, **keys):
    """What is said of a recipe; nothing may have been written by then."""
    keys = {"merge_method": "task_arithmetic", "models": two(), "base_model": "family/base", **keys}
    file, output = tmp_path / "recipe.yaml", tmp_path / "new" / "out"
    file.write_text(
        yaml.safe_dump({key: value for key, value in keys.items() if value is not None})
    )
    with pytest.raises(ValueError, match=r".") as caught:
        merge(Recipe.from_yaml(file), output)
    assert not output.parent.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"models": []}, "`models` is empty"),
        ({"models": None}, "missing required field `models`"),
        ({"merge_method": None}, "missing required field `merge_method`"),
        ({"merge_method": "slerp"}, "'slerp' - at `$.merge_method`; valid values: linear, task_"),
        ({"merge_method": "linear", "models": two()[:1]}, "linear merges 2 models or more, and"),
        ({"base_model": None}, "set `base_model`"),
        ({"models": two() + two()}, "family/math stands twice"),
        ({"models": [source("family/base")]}, "1 models or more beside the base"),
        ({"models": [*two(), source("family/base", weight=1)]}, "family/base is the base, of"),
        ({"models": [source("family/math")]}, "family/math has no `weight`"),
        ({"models": [source("", weight=1)]}, "`model` is empty"),
        ({"models": two("much")}, "Expected `float | null`, got `str` - at `$.models"),
        ({"models": two(True)}, "Expected `float | null`, got `bool` - at `$.models"),
        ({"models": two(float("nan"))}, "`weight` must be a number, not nan"),
        ({"models": two(float("inf"))}, "`weight` must be a number, not inf"),
        ({"models": two(density=0.5)}, "`density` belongs to ties, dare_linear, dare_ties; task_"),
        ({"merge_method": "ties", "models": two(density=0.0)}, "`density` must be above 0 and at"),
        ({"merge_method": "ties", "models": two(density=1.1)}, "at most 1, not 1.1"),
        ({"merge_method": "ties", "models": two(density=-0.5)}, "at most 1, not -0.5"),
        ({"merge_method": "ties"}, "family/math has no `density`, the share"),
        ({"merge_method": "ties", "parameters": {"density": 2}}, "at most 1, not 2"),
        ({"merge_method": "linear", "models": two(0)}, "0 or more, and not all 0"),
        ({"merge_method": "linear", "models": two(-1)}, "0 or more, and not all 0"),
        ({"merge_method": "linear", "parameters": {"lambda": 2}}, "`lambda` scales shifts from"),
        (
            {"merge_method": "linear", "parameters": {"lines": {"alpha": 0, "beta": 1}}},
            "`lines` scales shifts from a base, and linear has none",
        ),
        ({"parameters": {"lambda": float("nan")}}, "`lambda` must be a number"),
        ({"parameters": {"lines": {"alpha": 1}}}, "missing required field `beta`"),
        ({"parameters": {"lines": {"alpha": 1, "beta": float("inf")}}}, "`beta` must be a number"),
        (
            {"parameters": {"lines": {"alpha": 1, "beta": 1, "gama": 1}}},
            "unknown field `gama` - at `$.parameters.lines`; valid keys there: alpha, beta",
        ),
        (
            {"parameters": {"lamda": 1}},
            "valid keys there: density, lambda, lines, normalize, weight",
        ),
        ({"models": [{"model": "x", "wieght": 1}]}, "`wieght`"),
        ({"models": [{"model": "x", "wieght": 1}]}, "valid keys there: model, parameters"),
        ({"models": [source("x", weigth=1)]}, "valid keys there: density, weight"),
        ({"bas_model": "x"}, "valid keys there: base_model, dtype, merge_method, models, param"),
        ({"seed": 1}, "`seed` is for what DARE drops"),
        ({"dtype": "int8"}, "valid values: float32, bfloat16, float16"),
        ({"sha256": {"other": "ab"}}, "`sha256` names other"),
        ({"slices": []}, "`slices` of mergekit is not supported: models are merged whole"),
        ({"tokenizer_source": "union"}, "`tokenizer_source` of mergekit is not supported"),
        ({"tokenizer": {"source": "base"}}, "`tokenizer` of mergekit"),
        ({"chat_template": "auto"}, "`chat_template` of mergekit"),
        ({"out_dtype": "float16"}, "`out_dtype` of mergekit is not supported: `dtype`"),
        ({"modules": {}}, "`modules` of mergekit"),
        ({"parameters": {"int8_mask": True}}, "`int8_mask` of mergekit"),
        ({"parameters": {"rescale": False}}, "`rescale` of mergekit"),
        ({"models": two(gamma=0.01)}, "`gamma` of mergekit"),
        ({"models": two([0.1, 0.9])}, "`weight` must be one value: mergekit's gradients"),
        ({"models": two([{"filter": "mlp", "value": 1}])}, "`weight` must be one value"),
        ({"models": [source("family/base+family/lora", weight=1)]}, "mergekit's BASE+ADAPTER"),
        ({"models": [source("./nowhere", weight=1)]}, "./nowhere: there is no such folder"),
    ],
    ids=str,
)
def test_a_wrong_recipe(family, tmp_path, keys, said):
    assert said in refusal(tmp_path, **keys)


def test_a_recipe_that_is_none(tmp_path):
    for text, said in (("- a", r"Expected .object."), ("a: [", r"is not valid YAML")):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(ValueError, match=said):
            Recipe.from_yaml(tmp_path / "recipe.yaml")
    with pytest.raises(FileNotFoundError, match=r"no such file: nowhere\.yaml"):
        Recipe.from_yaml("nowhere.yaml")


def test_models_of_other_shapes(family, tmp_path):
    tiny.model(family / "math", hidden=48)
    said = refusal(tmp_path)
    name = said.partition(" ")[0]
    for folder in (family / "base", family / "math"):
        assert f"F32 {list(tensors(folder)[name].shape)} in {folder}" in said
    assert "only models that were trained from one base can be merged" in said


def test_models_with_more_and_fewer_tensors(family, tmp_path):
    tiny.model(family / "math", layers=3)
    assert "family/math has model.layers.2." in refusal(tmp_path)
    tiny.model(family / "math", layers=1)
    assert "family/math lacks model.layers.1." in refusal(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", 2), ("model_type", "mistral"), ("rope_parameters", {"rope_theta": 5})],
)
def test_models_that_compute_otherwise(family, tmp_path, key, value):
    edit(family / "math" / "config.json", **{key: value})
    said = refusal(tmp_path)
    assert f"`{key}` in config.json is " in said
    assert str(value) in said


def test_a_head_of_its_own_over_a_tied_base(family, tmp_path):
    tiny.model(family / "base", seed=2, tie_word_embeddings=True)
    for name in EXPERTS:
        edit(family / name / "config.json", tie_word_embeddings=None)
    assert "has a lm_head.weight of its own" in refusal(tmp_path)


def test_another_tokenizer(family, tmp_path):
    tiny.tokenizer(family / "facts", corpus="other words altogether, in another order")
    assert "ids differ: id " in refusal(tmp_path)
    (family / "facts" / "tokenizer.json").write_text("{}")
    assert "cannot be read as a tokenizer" in refusal(tmp_path)
    (family / "facts" / "tokenizer.json").unlink()
    for name in ("base", "facts"):
        (family / name / "vocab.json").write_text(name)
    assert "do not share a tokenizer: vocab.json differs" in refusal(tmp_path)


def test_damaged_files(family, tmp_path):
    weights = family / "math" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "is damaged or incomplete" in refusal(tmp_path)
    weights.unlink()
    (family / "math" / "pytorch_model.bin").touch()
    assert "family/math has no weights in safetensors" in refusal(tmp_path)
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    edit(family / "base" / "config.json")
    (family / "math" / "model.safetensors.index.json").write_text(yaml.safe_dump(index))
    assert "model.safetensors.index.json cannot be read" in refusal(tmp_path)
    (family / "math" / "model.safetensors.index.json").write_text(str(index).replace("'", '"'))
    said = refusal(tmp_path)
    assert "lacks 1 of its 1 safetensors files, model-00001-of-00002.safetensors first" in said
    (family / "math" / "config.json").unlink()
    assert "family/math has no config.json" in refusal(tmp_path)


def test_quantised_models(family, tmp_path):
    edit(family / "base" / "config.json", quantization_config={"quant_method": "gptq"})
    assert "family/base is quantised" in refusal(tmp_path)
    eighth = torch.ones(32).to(torch.float8_e4m3fn)
    rewrite(family / "math", lambda weights: weights.update({"model.norm.weight": eighth}))
    assert "family/math is quantised" in refusal(tmp_path)


def test_weights_that_the_type_cannot_hold(family, tmp_path):
    rewrite(family / "math", lambda weights: weights["model.norm.weight"].fill_(1e6))
    keys = {"merge_method": "linear", "models": two(), "dtype": "float16"}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**keys, "base_model": "family/base"}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight would hold .* `dtype: float32`"):
        merge(Recipe.from_yaml(file), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"family", "recipe.yaml"}


def test_a_folder_that_is_there(family, tmp_path):
    file = tmp_path / "recipe.yaml"
    keys = {"merge_method": "linear", "models": two()}
    file.write_text(yaml.safe_dump(keys))
    with pytest.raises(ValueError, match="family exists already: name a new folder"):
        merge(Recipe.from_yaml(file), family)


def test_no_room_on_the_disk(family, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    said = refusal(tmp_path)
    assert "the merged model takes 0.00 GB, and" in said
    assert "make room" in said


def over(lora, tmp_path, **config):
    """A copy of an adapter with other settings, and the recipe's models with it."""
    copy = shutil.copytree(lora / "math-adapter", tmp_path / "lora", dirs_exist_ok=True)
    edit(copy / "adapter_config.json", **config)
    return {"models": [source(copy, weight=1)], "base_model": str(lora / "base")}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "sets `use_dora`"),
        ({"modules_to_save": ["lm_head"]}, "sets `modules_to_save`"),
        ({"trainable_token_indices": [1]}, "sets `trainable_token_indices`"),
        ({"lora_bias": True}, "sets `lora_bias`"),
        ({"bias": "all"}, "has biases of its own (`bias: all`)"),
        ({"init_lora_weights": "pissa"}, "changes its base (`init_lora_weights: pissa`)"),
        ({"peft_type": "LOHA"}, "is of type LOHA, not LORA"),
        ({"r": 8}, "of rank 8 for it: set `base_model`"),
        ({"base_model_name_or_path": "some/other"}, "was trained over some/other, not over"),
    ],
    ids=str,
)
def test_adapters_that_are_more_or_of_another_base(lora, tmp_path, config, said):
    keys = over(lora, tmp_path, **config)
    assert said in refusal(tmp_path, **keys)


def test_an_adapter_over_a_folder_with_other_weights(lora, tmp_path):
    """Of the same name, but what is in it is looked at."""
    other = tiny.model(tmp_path / "base", seed=7)
    keys = over(lora, tmp_path, base_model_name_or_path=str(other))
    assert f"was trained over {other}, not over {lora / 'base'}" in refusal(tmp_path, **keys)
    shutil.rmtree(other)
    shutil.copytree(lora / "base", other)  # the same model in two places is fine
    merge(Recipe.from_yaml(tmp_path / "recipe.yaml"), tmp_path / "out")


def test_adapters_that_do_not_fit_the_base(lora, tmp_path):
    keys = over(lora, tmp_path, base_model_name_or_path=None)
    wide, flat = tiny.model(tmp_path / "wide", hidden=48), tiny.model(tmp_path / "flat", layers=1)
    assert "of rank 4 for it: set" in refusal(tmp_path, **{**keys, "base_model": str(wide)})
    said = refusal(tmp_path, **{**keys, "base_model": str(flat)})
    assert f"changes model.layers.1.mlp.up_proj, and {flat} has none" in said
    keys = {**keys, "base_model": str(lora / "math-adapter")}
    assert "is an adapter: set `base_model`" in refusal(tmp_path, **keys)


def test_adapters_with_other_tensors(lora, tmp_path):
    def changed(change):
        keys = over(lora, tmp_path)
        weights = tensors(tmp_path / "lora")
        change(weights, next(iter(weights)))
        save_file(weights, tmp_path / "lora" / "adapter_model.safetensors")
        return refusal(tmp_path, **keys)

    said = changed(
        lambda weights, key: weights.update({"base_model.model.lm_head.weight": weights[key] + 1})
    )
    assert "has base_model.model.lm_head.weight, which is more than" in said
    for gone in ("lora_A", "lora_B"):
        said = changed(lambda weights, key: weights.pop(key.replace("lora_A", gone)))  # noqa: B023
        assert f"has no base_model.model.model.layers.0.mlp.up_proj.{gone}.weight" in said
    keys = over(lora, tmp_path)
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors: save it" in refusal(tmp_path, **keys)
    (tmp_path / "lora" / "adapter_model.bin").touch()
    assert "can run code when loaded" in refusal(tmp_path, **keys)
