"""The family file: what it accepts, and what it says about what it does not."""

from typing import Literal

import msgspec
import pytest

from dlf_ray import Family
from dlf_ray.config import converted

M = {"model": "some/model"}
GOOD = {"large": M, "base": M, "experts": {"math": M, "facts": M}}


def test_defaults_are_the_papers():
    family = Family.from_dict(GOOD)
    assert (family.fusion.rule, family.fusion.step, family.fusion.select) == ("grid", 0.1, "paper")
    assert family.experts["math"].bounds == (0.0, 2.0)
    assert list(family.models) == ["large", "base", "math", "facts"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"expert": {}}, ["`expert`", "experts", "fusion"]),
        ({"large": {**M, "nmu_gpus": 1}}, ["`nmu_gpus`", "$.large", "num_gpus", "dtype"]),
        ({"experts": {"math": {**M, "bound": 1}}}, ["`bound`", "bounds"]),
        ({"fusion": {"rule": "gird"}}, ["gird", "$.fusion.rule", "grid", "exact", "static"]),
        ({"fusion": {"step": 0}}, ["`step`"]),
        ({"fusion": {"weights": {"math": 1.0}}}, ["static"]),
        ({"fusion": {"rule": "static", "weights": {"maths": 1.0}}}, ["maths", "math", "facts"]),
        ({"engine": {"max_num_seqs": "many"}}, ["int", "$.engine.max_num_seqs"]),
        ({"engine": {"max_num_seqs": 0}}, ["max_num_seqs"]),
        ({"engine": {"max_num_batched_tokens": 2}}, ["max_num_batched_tokens", "max_num_seqs"]),
        ({"experts": {"math": {**M, "bounds": [2, 1]}}}, ["bounds", "low < high"]),
        ({"experts": {"large": M}}, ["large", "expert"]),
        ({"experts": [M]}, ["object", "array", "$.experts"]),
        ({"base": {"model": ""}}, ["empty", "folder"]),
        ({"base": {**M, "num_cpus": 0}}, ["num_cpus"]),
        ({"base": {**M, "num_gpus": 1.5}}, ["whole number"]),
        ({"base": {**M, "dtype": "int8"}}, ["int8", "bfloat16"]),
        ({"base": {**M, "memory": 0}}, ["`memory`", "bytes"]),
        ({"base": {**M, "memory": "16GB"}}, ["int", "$.base.memory"]),
        ({"base": {**M, "resources": {"GPU": 1}}}, ["GPU", "`num_gpus`"]),
        ({"engine": {"resources": {"rack": 0}}}, ["`resources`", "rack: 0"]),
        ({"engine": {"label_selector": {"zone": 1}}}, ["str", "label_selector"]),
    ],
)
def test_mistakes_are_named_with_what_is_valid(change, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the words are checked below
        Family.from_dict({**GOOD, **change})
    for word in words:
        assert word in str(caught.value)


def test_what_is_valid_is_said_of_parts_of_lists_and_of_what_may_be_missing():
    class Part(msgspec.Struct, forbid_unknown_fields=True):
        kind: Literal["one", "two"] | None = None
        under: int = msgspec.field(default=0, name="over")

    class Whole(msgspec.Struct):
        parts: tuple[Part, ...]
        other: Part | None = None

    for raw in ({"parts": [{"x": 1}]}, {"parts": [], "other": {"x": 1}}):
        with pytest.raises(ValueError, match=r"`x`.*; valid keys there: kind, over$"):
            converted(raw, Whole)
    with pytest.raises(ValueError, match=r"'three'.*; valid values: one, two$"):
        converted({"parts": [{}, {"kind": "three"}]}, Whole)


def test_a_missing_model_is_named():
    with pytest.raises(ValueError, match="base"):
        Family.from_dict({"large": M, "experts": {}})


def test_files_name_themselves_in_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        Family.from_yaml(tmp_path / "nowhere.yaml")
    file = tmp_path / "family.yaml"
    file.write_text("large:\n\tmodel: x\n")
    with pytest.raises(ValueError, match=r"family\.yaml.*spaces, not tabs"):
        Family.from_yaml(file)
    file.write_text("large: {model: x}\nbase: {model: x}\nexperts: {}\nspeed: 3\n")
    with pytest.raises(ValueError, match=r"family\.yaml.*`speed`"):
        Family.from_yaml(file)


def test_a_key_that_stands_twice_is_refused_with_its_lines(tmp_path):
    file = tmp_path / "family.yaml"
    lines = ["large: &m {model: x}", "base: {<<: *m, model: y}", "experts:"]
    lines += ["  math: *m", "  facts: *m", "  math: {model: z}"]
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"family\.yaml.*`math` stands twice.*line 4.*line 6"):
        Family.from_yaml(file)
    file.write_text("\n".join(lines[:-1]))
    assert Family.from_yaml(file).base.model == "y"  # a merged key may be said anew


def test_local_folders_are_relative_to_the_file(tmp_path):
    (tmp_path / "big").mkdir()
    file = tmp_path / "family.yaml"
    file.write_text("large: {model: big}\nbase: {model: org/small}\nexperts: {}\n")
    family = Family.from_yaml(file)
    assert family.large.model == str(tmp_path / "big")
    assert family.base.model == "org/small"  # no such folder: a hub id


def test_the_home_folder_may_stand_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    home = {"model": "~/a", "tokenizer": "~/b"}
    experts = {"x": {"adapter": "~/c"}, "y": {"model": "~/d", "adapter": "~/e"}}
    family = Family.from_dict({"large": home, "base": home, "experts": experts})
    assert (family.large.model, family.base.tokenizer) == (f"{tmp_path}/a", f"{tmp_path}/b")
    x, y = family.experts.values()
    assert (x.adapter, y.model, y.adapter) == tuple(f"{tmp_path}/{name}" for name in "cde")


def test_an_adapter_with_a_base_of_its_own_is_a_worker(tmp_path):
    alone = {"adapter": "some/adapter", "model": "some/base", "num_gpus": 0.2, "dtype": "float16"}
    experts = {"x": {"adapter": "some/adapter"}, "y": alone}
    family = Family.from_dict({"large": M, "base": M, "experts": experts})
    assert family.workers == {"large": ("large",), "base": ("base", "x"), "y": ("y",)}
    assert [each.shares_base for each in family.experts.values()] == [True, False]
    with pytest.raises(ValueError, match=r"`dtype` is the base's.*or name the base as `model`"):
        Family.from_dict(
            {"large": M, "base": M, "experts": {"x": {"adapter": "a/b", "dtype": "float16"}}}
        )


def test_the_digest_tells_families_apart():
    other = {**GOOD, "fusion": {"step": 0.05}}
    assert Family.from_dict(GOOD).digest == Family.from_dict(GOOD).digest
    assert Family.from_dict(GOOD).digest != Family.from_dict(other).digest
