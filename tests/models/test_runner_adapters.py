"""A base and LoRA adapters over one copy of its weights, against the base with each merged in."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from runners import TOLERANCE, VOCAB, Oracle, Schedule, close, make_plan
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from dlf_ray.config import ModelSpec
from dlf_ray.engine.sharing import joined
from dlf_ray.models.runner import Runner
from dlf_ray.plans import ALL, Plan

peft = pytest.importorskip("peft")
WEIGHTS = "adapter_model.safetensors"
KINDS = (
    {"target_modules": "all-linear", "r": 4},
    {"target_modules": r".*\.1\..*(o_proj|up_proj|c_proj|dense)", "r": 3, "use_rslora": True},
)
"""Every layer, and some layers of one block only."""


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def lora(base, folder, seed=0, **config):
    """Saves an adapter with random weights; returns its folder."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(lora_alpha=4, **config)
    )
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(folder)
    return folder


def merged(base, adapter, **options):
    oracle = Oracle(base, **options)
    oracle.model = peft.PeftModel.from_pretrained(oracle.model, adapter).merge_and_unload().eval()
    return oracle


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory):
    """Two of each architecture that a test names."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        arch: [lora(folders[arch], root / arch / str(i), i, **kind) for i, kind in enumerate(KINDS)]
        for arch in ("llama", "gpt2", "gpt_neox", "gemma2", "qwen2_sliding")
    }


def mixed(base, adapters, slots=4, length=64, **spec):
    return Runner(
        ModelSpec(model=str(base), **spec),
        max_num_seqs=slots,
        max_model_len=length,
        max_num_batched_tokens=256,
        adapters=[str(adapter) for adapter in adapters],
    )


def together(*plans):
    """One plan of those of each model; None for a model that computes nothing."""
    own = {i: plan for i, plan in enumerate(plans) if plan is not None}
    return Plan.from_bytes(joined(own, len(plans), [(ALL, ALL)]).to_bytes())


def follow(run, oracles, seed, steps, tolerance=TOLERANCE, slots=4, length=48):
    """Random lives of every model's slots: prompts in chunks, steps, steps back."""
    schedules = [Schedule(seed * 10 + i, slots, length) for i in range(len(oracles))]
    random, scored, both = np.random.default_rng(seed), 0, 0
    for _ in range(steps):
        drawn = [s.plan() if random.integers(5) else (None, []) for s in schedules]
        if not any(plan for plan, _ in drawn):
            continue
        got = run.forward(together(*(plan for plan, _ in drawn)))
        wanted = [o(text)[-1] for o, (_, each) in zip(oracles, drawn, strict=True) for text in each]
        if wanted:
            close(got, torch.stack(wanted)[:, : run.vocab], tolerance)
        scored += len(wanted)
        both += sum(bool(texts) for _, texts in drawn) > 1
    assert scored > 5 * steps
    assert both > steps / 2


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "gemma2", "qwen2_sliding"])
def test_every_row_is_that_of_its_own_model(folders, adapters, arch):
    base, two = folders[arch], adapters[arch]
    oracles = [Oracle(base), *(merged(base, adapter) for adapter in two)]
    apart = [oracle([1, 2, 3])[-1] for oracle in oracles]
    assert min((apart[i] - apart[i - 1]).abs().max() for i in range(3)) > 0.1
    for seed in range(2):
        follow(mixed(base, two, length=48), oracles, seed, steps=15)


def test_half_precision(folders, adapters):
    base, two = folders["llama"], adapters["llama"]
    run = mixed(base, two, length=48, dtype="bfloat16")
    assert {weight.dtype for weight in run._model.parameters()} == {torch.bfloat16}
    half = torch.bfloat16
    oracles = [Oracle(base, dtype=half), *(merged(base, each, dtype=half) for each in two)]
    # Merged weights are rounded, and so is what an adapter adds: each by some 5 %.
    follow(run, oracles, 0, steps=10, tolerance=0.1)


def test_prefixes_are_copied_between_slots_of_one_model(folders, adapters):
    base, two = folders["llama"], adapters["llama"]
    run = mixed(base, two)
    text = np.random.default_rng(0).integers(0, VOCAB, 30).tolist()
    run.forward(together(*(make_plan((0, 0, text, 0)) for _ in range(3))))
    ends = (20, 12, 25)
    plans = [make_plan((1 + i, end, [7], 1), sources=[0]) for i, end in enumerate(ends)]
    got = run.forward(together(*plans))
    oracles = [Oracle(base), *(merged(base, adapter) for adapter in two)]
    pairs = list(zip(oracles, ends, strict=True))
    close(got, torch.stack([oracle([*text[:end], 7])[-1] for oracle, end in pairs]))


@pytest.mark.parametrize("slots", [1, 6])
def test_rows_of_one_adapter_and_of_the_base_alone(folders, adapters, slots):
    base, adapter = folders["llama"], adapters["llama"][0]
    run, own, plain = mixed(base, [adapter], slots), merged(base, adapter), Oracle(base)
    texts = np.random.default_rng(0).integers(0, VOCAB, (slots, 9)).tolist()
    chunks = [(slot, 0, text, 1) for slot, text in enumerate(texts)]
    close(
        run.forward(together(None, make_plan(*chunks))),
        torch.stack([own(text)[-1] for text in texts]),
    )
    close(
        run.forward(together(make_plan(*chunks), None)),
        torch.stack([plain(text)[-1] for text in texts]),
    )
    # All go on but the first, which lies idle among them.
    plan = make_plan(*((slot, 9, [5], 1) for slot in range(slots)))
    rest = make_plan(*((slot, 9, [5], 1) for slot in range(1, slots)))
    got = run.forward(together(plan, rest if slots > 1 else None))
    expected = [plain([*text, 5])[-1] for text in texts]
    close(got, torch.stack(expected + [own([*text, 5])[-1] for text in texts[1:]]))


def test_one_copy_of_the_weights_which_stay_as_they_are(folders, adapters):
    base, two = folders["llama"], adapters["llama"]
    memory = 10**9
    alone, run = mixed(base, [], memory=memory), mixed(base, two, memory=memory)
    extra = sum(w.numel() for each in two for w in load_file(each / WEIGHTS).values())
    told, before = run.describe(), alone.describe()
    assert told.parameters == before.parameters + extra
    assert told.cache_bytes_per_position == before.cache_bytes_per_position
    # Besides, each may have tokens and rows of its own in a step.
    less = 4 * extra + 2 * 4 * 4 * 4 * VOCAB
    assert told.free_bytes < before.free_bytes - 0.9 * less
    model = AutoModelForCausalLM.from_pretrained(base)
    left = {n.replace(".base_layer", ""): w for n, w in run._model.named_parameters()}
    assert all(torch.equal(left[name], weight) for name, weight in model.named_parameters())


@pytest.mark.parametrize(
    ("models", "sources"), [([], []), ([1], []), ([0], [1]), ([0, 0], []), ([3], [])]
)
def test_plans_that_mix_up_models_are_refused(folders, adapters, models, sources):
    run = mixed(folders["llama"], adapters["llama"])
    run.forward(together(make_plan((0, 0, [1, 2], 0)), make_plan((0, 0, [1, 2], 0)), None))
    plan = make_plan((3, 2, [1], 1) if sources else (3, 0, [1], 1), sources=sources)
    arrays = (plan.slots, plan.starts, plan.lengths, plan.wants, plan.tokens, plan.sources)
    with pytest.raises(ValueError, match="of 3 models, model i has the slots"):
        run.forward(Plan(0, *arrays, models=np.array(models, np.int32)))


@pytest.fixture
def copy(adapters, tmp_path):
    """A copy of a good adapter, to be broken."""
    return shutil.copytree(adapters["llama"][0], tmp_path / "broken")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"peft_type": "LOHA"}, "of type LOHA, not LORA"),
        ({"use_dora": True}, "sets `use_dora`"),
        ({"modules_to_save": ["lm_head"]}, "sets `modules_to_save`"),
        ({"alora_invocation_tokens": [1]}, "sets `alora_invocation_tokens`"),
        ({"bias": "lora_only"}, "`bias: lora_only`"),
        ({"init_lora_weights": "pissa"}, "changes its base"),
    ],
)
def test_adapters_that_need_a_model_of_their_own(folders, copy, monkeypatch, setting, message):
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # no weights are read yet
    with pytest.raises(ValueError, match=rf"broken .*{message}.*give it as `model:`"):
        mixed(folders["llama"], [copy])


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapters_of_embeddings(folders, tmp_path, target):
    folder = lora(folders["llama"], tmp_path, target_modules=[target])
    with pytest.raises(ValueError, match=rf"has .*{target}\..*give it as `model:`"):
        mixed(folders["llama"], [folder])


def test_adapters_that_cannot_be_read(folders, copy, tmp_path, monkeypatch):
    def refused(message, adapter=copy):
        with pytest.raises(ValueError, match=message):
            mixed(folders["llama"], [adapter])

    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-100])
    refused(r"broken/\S+ is damaged or incomplete")
    (copy / WEIGHTS).rename(copy / "adapter_model.bin")
    refused("broken has no adapter_model.safetensors")
    refused("llama has no adapter_config.json.*`model:`", folders["llama"])
    refused("none: there is no such folder", tmp_path / "none")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(r'broken needs peft: pip install "dlf_ray\[adapters\]"')


@pytest.mark.parametrize("other", [{"hidden": 64}, {"layers": 1}, {"layers": 3}, {"arch": "gpt2"}])
def test_another_base(folders, tmp_path, other):
    adapter = lora(folders["llama"], tmp_path / "odd", target_modules=["q_proj"])
    base = tiny.model(tmp_path / "other", **other)
    with pytest.raises(ValueError, match=r"odd, trained over .*llama, does not fit .*other"):
        mixed(base, [adapter])


def test_a_base_of_another_name_is_said(folders, adapters, tmp_path, caplog):
    base = shutil.copytree(folders["llama"], tmp_path / "copied")
    mixed(base, adapters["llama"][:1])
    assert "was trained over" in caplog.text


def test_an_adapter_with_broken_weights(folders, adapters, copy):
    weights = load_file(copy / WEIGHTS)
    save_file({name: weight * torch.nan for name, weight in weights.items()}, copy / WEIGHTS)
    with pytest.raises(ValueError, match="broken gives logits that are not finite"):
        mixed(folders["llama"], [adapters["llama"][1], copy])


def test_layers_that_do_not_get_their_input_by_row(folders, adapters, monkeypatch):
    forward = LlamaMLP.forward
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: forward(self, x.flatten(0, 1)).view_as(x)
    )
    with pytest.raises(ValueError, match=r"llama/0.* does not run in a batch.*as `model:`"):
        mixed(folders["llama"], adapters["llama"])
