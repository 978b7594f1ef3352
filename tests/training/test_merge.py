"""Merged models on disk: their numbers, their files, and what it takes to make them."""

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from conftest import EXPERTS, adapted
from merges import merged, recipe_file, rewrite, source, tensors
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlf_ray.training import merge
from dlf_ray.training.merging import chance, drop
from dlf_ray.training.recipe import Recipe

WEIGHTS = (0.9, 0.4, 0.2)
CLOSE = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A base, and experts as adapters and merged by PEFT."""
    return adapted(tmp_path_factory.mktemp("adapted"))


def weighed(folder, weights=WEIGHTS, **parameters):
    pairs = zip(EXPERTS, weights, strict=True)
    return [source(folder / name, weight=weight, **parameters) for name, weight in pairs]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **CLOSE)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear"])
def test_each_tensor_is_what_the_method_makes_of_it(folder, tmp_path, method):
    base, experts = tensors(folder / "base"), [tensors(folder / name) for name in EXPERTS]
    dare, ties = method == "dare_linear", method == "ties"
    weights = (1.0,) * 3 if ties else WEIGHTS
    parameters = {"density": 0.4} if dare or ties else {}
    scale = {} if method == "linear" else {"lambda": 0.5}
    out = merged(
        tmp_path / "out",
        method,
        weighed(folder, weights, **parameters),
        base_model=folder / "base",
        parameters=scale,
    )
    hashes = [hashlib.sha256((folder / n / "model.safetensors").read_bytes()) for n in EXPERTS]
    expected = {}
    for name, start in base.items():
        shifts = [each[name] - start for each in experts]
        if method == "linear":
            total = sum(w * each[name] for w, each in zip(weights, experts, strict=True))
            expected[name] = total / sum(weights)
            continue
        if dare:
            chances = [chance(0, each.hexdigest(), name) for each in hashes]
            shifts = [drop(s, 0.4, c) for s, c in zip(shifts, chances, strict=True)]
        if ties:
            total = merge_utils.ties(shifts, torch.ones(3), 0.4)
        else:
            total = merge_utils.task_arithmetic(shifts, torch.tensor(weights))
        expected[name] = start + 0.5 * total
    assert_same(tensors(out), expected)


def test_linear_needs_no_base(folder, tmp_path):
    models = weighed(folder, (1.0, 3.0, 0.0))
    out = merged(tmp_path / "out", "linear", models)
    one, other = (tensors(folder / name) for name in EXPERTS[:2])
    assert_same(tensors(out), {name: one[name] / 4 + other[name] * 3 / 4 for name in one})


def test_the_base_may_stand_among_the_models(folder, tmp_path):
    """As in mergekit's examples: it has no shift, so it changes nothing."""
    keys = {"base_model": folder / "base", "parameters": {"density": 0.3}}
    one = merged(tmp_path / "one", "ties", weighed(folder), **keys)
    models = [source(folder / "base"), *weighed(folder)]
    two = merged(tmp_path / "two", "ties", models, **keys)
    assert_same(tensors(one), tensors(two))


def test_shifts_are_scaled_with_depth(folder, tmp_path):
    models = [source(folder / "math", weight=1.0)]
    lines = {"lines": {"alpha": 0.25, "beta": 0.5}, "lambda": 2.0}
    keys = {"base_model": folder / "base"}
    out = merged(tmp_path / "out", "task_arithmetic", models, parameters=lines, **keys)
    base, expert = tensors(folder / "base"), tensors(folder / "math")
    expected = {}
    for name in base:
        scale = 2 * (0.75 if ".layers.1." in name else 0.25)
        expected[name] = base[name] + scale * (expert[name] - base[name])
    assert_same(tensors(out), expected)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox"])
def test_an_adapter_is_merged_as_peft_merges_it(tmp_path, arch):
    """Ranks, scales and orders of dimensions differ from module to module."""
    layers, first, others = {
        "llama": ("layers", "q_proj", ["up_proj", "down_proj"]),
        "gpt2": ("h", "c_attn", ["c_fc", "c_proj"]),
        "gpt_neox": ("layers", "query_key_value", ["dense_h_to_4h"]),
    }[arch]
    base = tiny.model(tmp_path / "base", arch)
    how = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[first, *others],
        rank_pattern={first: 2, rf"{layers}\.1\..*{others[0]}": 3},
        alpha_pattern={first: 10},
        use_rslora=arch == "llama",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    expert = get_peft_model(AutoModelForCausalLM.from_pretrained(base), how)
    expert.save_pretrained(tmp_path / "adapter")
    expert.merge_and_unload().save_pretrained(tmp_path / "whole")
    out = merged(
        tmp_path / "out",
        "task_arithmetic",
        [source(tmp_path / "adapter", weight=1.0)],
        base_model=base,
    )
    assert_same(tensors(out), tensors(tmp_path / "whole"))


def test_a_base_whose_files_leave_its_own_name_out(tmp_path):
    """As the first GPT-2 of the hub: adapters name modules as the whole model has them."""
    adapted(tmp_path / "family", arch="gpt2", targets=["c_attn", "c_fc"])
    base = tmp_path / "family" / "base"

    def shorten(weights):
        for name in [name for name in weights if name.startswith("transformer.")]:
            weights[name.removeprefix("transformer.")] = weights.pop(name)

    expected = tensors(tmp_path / "family" / "math")
    models = [source(tmp_path / "family" / "math-adapter", weight=1.0)]
    out = merged(tmp_path / "out", "task_arithmetic", models, base_model=rewrite(base, shorten))
    found = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert_same({name: found[name] for name in expected}, expected)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_adapters_and_whole_models_go_together(lora, tmp_path, method):
    density = {"density": 0.3} if method == "ties" else {}
    names = ("math-adapter", "facts", "prose-adapter")
    models = [
        source(lora / name, weight=w, **density) for name, w in zip(names, WEIGHTS, strict=True)
    ]
    keys = {"base_model": lora / "base"}
    one = merged(tmp_path / "one", method, models, **keys)
    two = merged(tmp_path / "two", method, weighed(lora, **density), **keys)
    assert_same(tensors(one), tensors(two))


def test_what_comes_out_is_a_model_like_its_base(folder, tmp_path):
    out = merged(tmp_path / "out", "linear", weighed(folder), base_model=folder / "base")
    AutoModelForCausalLM.from_pretrained(out)
    text = "def add(a, b): return a + b"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(
        folder / "base"
    )(text)
    own = {"model.safetensors", "mergekit_config.yml", "README.md"}
    for path in (folder / "base").iterdir():
        assert path.name in own or (out / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in out.iterdir()} == own | {
        p.name for p in (folder / "base").iterdir()
    }


def test_dropping_is_the_same_in_any_order_and_place(folder, tmp_path):
    def made(name, models, seed, **keys):
        shared = {"density": 0.3}
        out = tmp_path / name
        return tensors(
            merged(
                out, "dare_linear", models, base_model=folder / "base", seed=seed, parameters=shared
            )
        )

    first = made("first", weighed(folder), 5)
    copies = tmp_path / "elsewhere"
    shutil.copytree(folder, copies)
    assert_same(made("again", weighed(copies)[::-1], 5), first)
    other = made("other", weighed(folder), 6)
    assert any(not torch.equal(other[name], value) for name, value in first.items())


def test_the_recipe_in_the_folder_makes_the_same_model(folder, tmp_path):
    keys = {"base_model": folder / "base", "dtype": "float16", "seed": 3}
    parameters = {"density": 0.5, "weight": 0.4, "lines": {"alpha": 0.5, "beta": 0.5}}
    models = [source(folder / name) for name in EXPERTS]
    out = merged(tmp_path / "out", "dare_ties", models, parameters=parameters, **keys)
    again = merge.merge(Recipe.from_yaml(out / "mergekit_config.yml"), tmp_path / "again").folder
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in again.iterdir()}
    for name in names - {"README.md"}:  # which has the folder's name
        assert (out / name).read_bytes() == (again / name).read_bytes(), name
    written = yaml.safe_load((out / "mergekit_config.yml").read_text())
    for name in EXPERTS:
        digest = hashlib.sha256((folder / name / "model.safetensors").read_bytes()).hexdigest()
        assert written["sha256"][str(folder / name)] == digest
    card = (out / "README.md").read_text()
    for said in (
        "# out",
        "dare_ties",
        "arXiv 2311.03099",
        "arXiv 2410.17146",
        str(folder / "math"),
        "0.4",
        digest,
    ):
        assert said in card


def test_other_weights_than_the_recipe_knows_are_refused(folder, tmp_path):
    copies = tmp_path / "family"
    shutil.copytree(folder, copies)
    keys = {"base_model": copies / "base"}
    out = merged(tmp_path / "out", "linear", weighed(copies), **keys)
    rewrite(copies / "facts", lambda weights: weights["model.norm.weight"].add_(1))
    with pytest.raises(ValueError, match=r"family/facts are not those that `sha256`"):
        merge.merge(Recipe.from_yaml(out / "mergekit_config.yml"), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_files_are_split_as_transformers_splits_them(folder, tmp_path, monkeypatch):
    keys = {"base_model": folder / "base"}
    whole = merged(tmp_path / "whole", "linear", weighed(folder), **keys)
    monkeypatch.setattr(merge, "SHARD", 30_000)
    split = merged(tmp_path / "split", "linear", weighed(folder), **keys)
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=30_000)
    index, theirs = (
        json.loads((path / "model.safetensors.index.json").read_text())
        for path in (split, tmp_path / "theirs")
    )
    assert len(set(index["weight_map"].values())) > 2
    assert index["weight_map"].keys() == theirs["weight_map"].keys()
    assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    files = {path.name for path in split.glob("*.safetensors")}
    assert files == set(index["weight_map"].values())
    assert_same(tensors(split), tensors(whole))
    assert_same(dict(AutoModelForCausalLM.from_pretrained(split).state_dict()), model.state_dict())
    # And a model in several files is read as one.
    again = merged(tmp_path / "again", "linear", [source(split, weight=1), source(whole, weight=1)])
    assert_same(tensors(again), tensors(whole))


def tied(folder, **model):
    return tiny.model(folder, tie_word_embeddings=True, **model)


@pytest.mark.parametrize("saved", ["once", "twice", "as the head"])
@pytest.mark.parametrize("whose", ["base", "expert"])
def test_tied_embeddings_are_one_tensor_however_they_are_saved(tmp_path, whose, saved):
    base, expert = tied(tmp_path / "base", seed=1), tied(tmp_path / "expert", seed=2)
    embeddings = [tensors(each)["model.embed_tokens.weight"] for each in (base, expert)]
    if saved != "once":

        def change(weights):
            name = "model.embed_tokens.weight"
            weights["lm_head.weight"] = weights[name].clone()
            if saved == "as the head":
                del weights[name]

        rewrite(tmp_path / whose, change)
    models = [source(expert, weight=1.0)]
    keys = {"base_model": base, "parameters": {"lambda": 0.5}}
    out = merged(tmp_path / "out", "task_arithmetic", models, **keys)
    pair = tensors(out).keys() & {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(pair) == 1
    middle = sum(embeddings) / 2
    torch.testing.assert_close(tensors(out)[pair.pop()], middle, **CLOSE)
    if not (whose == "base" and saved == "as the head"):
        model = AutoModelForCausalLM.from_pretrained(out)
        torch.testing.assert_close(model.lm_head.weight.detach(), middle, **CLOSE)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_numbers_that_are_no_weights_are_the_bases(tmp_path, folder):
    def with_buffers(name, ids, mask):
        def change(weights):
            weights["model.ids"] = torch.arange(ids)
            if mask:
                weights["model.mask"] = torch.tensor([True, False])

        return rewrite(shutil.copytree(folder / name, tmp_path / name), change)

    base, expert = with_buffers("base", 5, True), with_buffers("math", 7, False)
    out = merged(tmp_path / "out", "task_arithmetic", [source(expert, weight=1.0)], base_model=base)
    found = tensors(out)
    assert found["model.ids"].tolist() == [0, 1, 2, 3, 4]
    assert found["model.mask"].tolist() == [True, False]
    found = {name: value for name, value in found.items() if value.is_floating_point()}
    assert_same(found, tensors(folder / "math"))
    data = (out / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    sizes = {"I64": 8, "F32": 4, "BOOL": 1}
    for each in [header[name] for name in header if name != "__metadata__"]:
        assert each["data_offsets"][0] % sizes[each["dtype"]] == 0  # it can be used where it lies


def test_half_precision_is_computed_in_full(tmp_path, folder):
    """Steps that are lost one by one in bfloat16 are there when they are summed first."""
    base = tiny.model(tmp_path / "base", dtype=torch.bfloat16, seed=2)
    start = tensors(base)
    for name in EXPERTS:
        shutil.copytree(base, tmp_path / name)
        rewrite(tmp_path / name, lambda weights: [each.mul_(1.02) for each in weights.values()])
    keys = {"base_model": base}
    out = merged(tmp_path / "out", "task_arithmetic", weighed(tmp_path, (0.1,) * 3), **keys)
    experts = tensors(tmp_path / "math")
    full = {}
    for name, value in start.items():
        step = (experts[name].float() - value.float()) * 0.1
        full[name] = value.float() + (step + step + step)
    found = tensors(out)
    assert all(torch.equal(value, full[name].bfloat16()) for name, value in found.items())
    name = "model.embed_tokens.weight"
    one_by_one = start[name]
    for _ in EXPERTS:
        one_by_one = one_by_one + (experts[name] - start[name]) * 0.1
    assert not torch.equal(found[name], one_by_one)
    out = merged(
        tmp_path / "full", "task_arithmetic", weighed(tmp_path, (0.1,) * 3), dtype="float32", **keys
    )
    assert_same(tensors(out), full)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.float32


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (KeyboardInterrupt(), None),
    ],
    ids=str,
)
def test_a_merge_that_breaks_off_leaves_nothing(folder, tmp_path, monkeypatch, error, said):
    recipe = Recipe.from_yaml(
        recipe_file(tmp_path / "r.yaml", "linear", weighed(folder), base_model=folder / "base")
    )
    real, calls = merge.Merger.tensor, []

    def tensor(self, name):
        calls.append(name)
        if len(calls) == 5:
            raise error
        return real(self, name)

    monkeypatch.setattr(merge.Merger, "tensor", tensor)
    with pytest.raises(ValueError if said else KeyboardInterrupt, match=said):
        merge.merge(recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


MEASURED = """
import re, sys
from pathlib import Path
from dlf_ray.training.merge import merge
from dlf_ray.training.recipe import Recipe

def held(what):
    return int(re.search(rf"{what}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

small, large = (Recipe.from_yaml(path) for path in sys.argv[1:3])
merge(small, Path(sys.argv[3]))  # what the libraries need for themselves
Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here on
before = held("VmRSS")
size = merge(large, Path(sys.argv[4])).bytes
print(size, held("VmHWM") - before)
"""


def deepen(weights, layers):
    """As if the first layer were there several times."""
    for name in [name for name in weights if ".layers.0." in name]:
        for layer in range(1, layers):
            weights[name.replace(".0.", f".{layer}.")] = weights[name].clone()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peaks of memory here")
def test_memory_holds_a_few_tensors_and_no_model(tmp_path, figure):
    """Peaks of a process that merges three models of 1 and then of 24 layers, tensors alike."""
    args = []
    for layers in (1, 24):
        root = tmp_path / str(layers)
        tiny.model(root / "base", hidden=256, layers=1)
        for name in ("base", *EXPERTS):
            if name != "base":
                shutil.copytree(root / "base", root / name)
            rewrite(root / name, partial(deepen, layers=layers))
        keys = {"base_model": root / "base", "parameters": {"density": 0.5}}
        args.append(recipe_file(root / "r.yaml", "dare_ties", weighed(root), **keys))
    command = [sys.executable, "-c", MEASURED, *args, tmp_path / "small", tmp_path / "large"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    size, more = map(int, done.stdout.split())
    shutil.rmtree(tmp_path)
    figure(f"merging 3 models of {size / 1e6:.0f} MB each took {more / 1e6:.0f} MB of memory")
    assert more < 0.4 * size  # all of one model, or an open file, is more than all
