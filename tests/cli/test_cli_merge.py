"""`dlf merge` as its users run it, and what comes out as an expert of a family."""

import json

import pytest
from conftest import EXPERTS, dlf, family_of
from merges import recipe_file, source, tensors

from dlf_ray import LocalEngine, SamplingParams


def recipe(folder, path, **keys):
    models = [source(folder / name, weight=0.4) for name in EXPERTS]
    return recipe_file(path, "task_arithmetic", models, base_model=folder / "base", **keys)


def test_a_merged_model_is_an_expert(folder, tmp_path):
    shown = dlf("merge", recipe(folder, tmp_path / "merge.yaml"), "--output", tmp_path / "all")
    assert shown.exit_code == 0, shown.output
    assert f"3 models merged by task_arithmetic into {tmp_path / 'all'}: 21 tensors" in shown.output
    for name in ("large", "base"):
        (tmp_path / name).symlink_to(folder / name)
    family = family_of(tmp_path, experts=("all",))
    with LocalEngine(family) as engine:
        (answer,) = engine.generate("hello there", SamplingParams(max_tokens=5))
    assert len(answer.token_ids) == 5


def test_the_folder_is_named_like_the_recipe(folder, tmp_path):
    file = recipe(folder, tmp_path / "all.yaml", dtype="bfloat16")
    shown = dlf("merge", file)
    assert shown.exit_code == 0, shown.output
    assert {str(value.dtype) for value in tensors(tmp_path / "all").values()} == {"torch.bfloat16"}
    assert json.loads((tmp_path / "all" / "config.json").read_text())["dtype"] == "bfloat16"
    again = dlf("merge", file)
    assert again.exit_code == 1
    assert f"{tmp_path / 'all'} exists already" in " ".join(again.output.split())


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"parameters": {"density": 0.5}}, "`density` belongs to"),
        ({"slices": []}, "`slices` of mergekit"),
        ({"speed": 1}, "valid keys there"),
        (None, "no such file"),
    ],
    ids=str,
)
def test_mistakes_end_with_one_line_and_no_trace(folder, tmp_path, keys, said):
    file = tmp_path / "merge.yaml"
    if keys is not None:
        recipe(folder, file, **keys)
    shown = dlf("merge", file)
    assert shown.exit_code == 1
    assert said in " ".join(shown.output.split())
    assert "Traceback" not in shown.output
    assert not (tmp_path / "merge").exists()


def test_help_names_every_method():
    shown = dlf("merge", "--help")
    assert shown.exit_code == 0
    for name in ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "lines"):
        assert name in shown.output
