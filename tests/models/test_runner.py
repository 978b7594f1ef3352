"""The runner against plain forward passes without a cache, what it tells of itself, and refuses."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runners import VOCAB, Oracle, Schedule, close, follow, make_plan, runner
from transformers import AutoConfig, AutoModelForCausalLM

from dlf_ray.models.loading import context_of
from dlf_ray.models.runner import FREE_PADDING, _groups
from dlf_ray.plans import Plan


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_random_schedules_equal_a_plain_forward(folders, arch):
    oracle = Oracle(folders[arch])
    for seed in range(3):
        run = runner(folders[arch], slots=5, length=48)
        assert follow(run, oracle, Schedule(seed, 5, 48), steps=25) > 30


def test_long_chunks_beside_decoding_rows(folders):
    run, oracle = runner(folders["llama"], slots=8, length=300), Oracle(folders["llama"])
    assert follow(run, oracle, Schedule(1, 8, 300, longest=200), steps=15) > 30


def test_a_window_beyond_every_position_changes_nothing(folders):
    run = runner(folders["gemma3_text"], length=tiny.WINDOW)
    assert set(run._windows.values()) == {None}
    follow(run, Oracle(folders["gemma3_text"]), Schedule(0, 4, tiny.WINDOW), steps=20)


def test_rows_keep_the_order_of_the_plan_and_ignore_each_other(folders):
    run, oracle = runner(folders["llama"], length=256), Oracle(folders["llama"])
    random = np.random.default_rng(0)
    texts = [random.integers(0, VOCAB, n).tolist() for n in (3, 200, 1, 9)]
    # Of such lengths that they fall into several passes, in an order unlike that of the slots.
    got = run.forward(
        make_plan(
            (3, 0, texts[0], 3), (0, 0, texts[1], 2), (2, 0, texts[2], 0), (1, 0, texts[3], 1)
        )
    )
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    close(got, torch.cat([oracle(texts[0]), oracle(texts[1])[-2:], oracle(texts[3])[-1:]]))


def test_a_view_and_a_gather_of_the_cache_give_the_same(folders):
    random = np.random.default_rng(0)
    texts = [random.integers(0, VOCAB, n).tolist() for n in (4, 7, 5)]
    results = []
    for slots in ((1, 2, 3), (0, 2, 3), (3, 1, 2)):
        run = runner(folders["llama"])
        pairs = list(zip(slots, texts, strict=True))
        run.forward(make_plan(*((slot, 0, text, 0) for slot, text in pairs)))
        results.append(run.forward(make_plan(*((s, len(t), [11], 1) for s, t in pairs))))
    close(results[1], results[0])
    close(results[2], results[0])


def test_an_idle_slot_between_others_leaves_the_cache_a_view(folders, monkeypatch):
    run, oracle = runner(folders["llama"], slots=16), Oracle(folders["llama"])
    random = np.random.default_rng(0)
    texts = {slot: random.integers(0, VOCAB, 3 + slot).tolist() for slot in range(16)}
    run.forward(make_plan(*((slot, 0, text, 0) for slot, text in texts.items())))
    with torch.inference_mode():
        for held in run._cache._storage.values():
            held[7] = torch.nan  # what the idle one holds is nobody's
    shared = []
    update = type(run._cache).update

    def spy(cache, *args, **kwargs):
        found = update(cache, *args, **kwargs)
        storages = {held.untyped_storage().data_ptr() for held in cache._storage.values()}
        shared.extend(part.untyped_storage().data_ptr() in storages for part in found)
        return found

    monkeypatch.setattr(type(run._cache), "update", spy)
    for slots, view in ([s for s in range(16) if s != 7], True), ([1, 4, 9, 15], False):
        shared.clear()
        got = run.forward(make_plan(*((s, len(texts[s]), [11], 1) for s in slots)))
        assert shared == [view] * 4
        close(got, torch.stack([oracle([*texts[s], 11])[-1] for s in slots]))


def test_only_wanted_rows_reach_the_output_embeddings(folders):
    run = runner(folders["llama"])
    seen = []
    run._model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert (
        run.forward(make_plan((0, 0, [1, 2, 3], 2), (1, 0, [4], 0), (2, 0, [5], 1))).shape[0] == 3
    )
    assert run.forward(make_plan((3, 0, [1, 2, 3], 0))).shape == (0, VOCAB)
    assert run.forward(make_plan()).shape == (0, VOCAB)
    assert [shape[1] for shape in seen] == [3, 0]


def test_the_vocabulary_is_cut(tmp_path):
    # Embeddings are often padded beyond the tokenizer; a family may also set a shorter length.
    folder = tiny.model(tmp_path, vocab=320)
    tiny.tokenizer(tmp_path, VOCAB)
    run, expected = runner(folder), Oracle(folder)([7, 8])
    assert run.vocab == run.describe().vocab == VOCAB
    close(run.forward(make_plan((0, 0, [7, 8], 2))), expected[:, :VOCAB])
    run.vocab = 290
    cut = run.forward(make_plan((0, 0, [7, 8], 2)))
    close(cut, expected[:, :290])
    assert cut.is_contiguous()


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        ((0, 4, [1], 1), "start at 0"),
        ((1, 1, [1], 1), "start at 0"),
        ((0, -1, [1], 1), "start at 0"),
        ((4, 0, [1], 1), "0..3"),
        ((-1, 0, [1], 1), "0..3"),
        ((0, 3, [1] * 62, 1), "64 positions"),
        ((0, 0, [-1], 1), "token ids"),
        ((0, 0, [], 0), "a token or more"),
        ((0, 0, [1], 2), "score more"),
        ((0, 0, [1], -1), "score more"),
        ((2, 0, [1], 1), "twice"),
    ],
)
def test_broken_plans_are_refused_and_change_nothing(folders, chunk, message):
    run = runner(folders["llama"])
    run.forward(make_plan((0, 0, [1, 2, 3], 0)))
    with pytest.raises(ValueError, match=message):
        run.forward(make_plan((2, 0, [5], 1), chunk))
    close(run.forward(make_plan((0, 3, [4], 1))), Oracle(folders["llama"])([1, 2, 3, 4])[-1:])


def test_tokens_that_it_does_not_know_are_stood_in_for(folders):
    """The large model may have some that a small one lacks."""
    run = runner(folders["llama"])
    got = run.forward(make_plan((0, 0, [7, VOCAB + 5, 8], 3)))
    close(got, Oracle(folders["llama"])([7, 0, 8])[:, :VOCAB])  # 0 ends its texts


def test_tokens_without_a_chunk_are_refused(folders):
    plan = make_plan((0, 0, [1, 2], 1))
    longer = Plan(0, plan.slots, plan.starts, plan.lengths, plan.wants, np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="no token is left"):
        runner(folders["llama"]).forward(longer)


@settings(deadline=None)
@given(st.lists(st.integers(1, 600), max_size=40))
def test_groups_hold_every_chunk_once_with_little_padding(lengths):
    array = np.array(lengths, dtype=np.int64)
    groups = _groups(array)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert (np.diff(group) > 0).all()
        padding = (array[group].max(initial=0) - array[group]).sum()
        assert padding <= max(FREE_PADDING, array[group].sum() // 4)


def test_a_long_chunk_does_not_pad_decoding_rows():
    groups = _groups(np.array([1] * 15 + [500] + [1] * 15))
    assert [len(group) for group in groups] == [1, 30]
    assert len(_groups(np.array([1, 5, 4, 1, 3]))) == 1  # drafts share one pass


def test_description(folders, tmp_path):
    told = runner(folders["llama"]).describe()
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    assert told.parameters == model.num_parameters()
    assert (told.vocab, told.context, told.device, told.dtype) == (VOCAB, 512, "cpu", "float32")
    assert told.eos_token_ids == (0,)
    assert told.tokenizer_digest == runner(folders["mistral"]).describe().tokenizer_digest
    folder = tiny.model(tmp_path, vocab=290, dtype=torch.bfloat16)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    other = runner(folder).describe()
    assert (other.eos_token_ids, other.dtype) == ((0, 3, 5), "bfloat16")
    assert other.tokenizer_digest != told.tokenizer_digest
    assert runner(folder, dtype="float32").describe().dtype == "float32"


def test_the_cache_goes_by_the_name_that_the_model_has_for_it(folders):
    run = runner(folders["llama"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.forward(make_plan((0, 0, [1, 2], 1)))


def test_double_precision(tmp_path):
    folder = tiny.model(tmp_path, dtype=torch.float64)
    run = runner(folder, slots=5, length=48)
    assert run.describe().dtype == "float64"
    oracle = Oracle(folder, dtype=torch.float64)
    follow(run, oracle, Schedule(0, 5, 48), steps=10, tolerance=1e-9)


def test_a_shorter_context_lowers_the_limit(folders):
    run = runner(folders["gpt2"], length=4096)
    with pytest.raises(ValueError, match="512 positions"):
        run.forward(make_plan((0, 0, [1] * 513, 1)))
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 128}
    config = AutoConfig.for_model("llama", max_position_embeddings=512)
    config.rope_parameters = rope
    assert context_of(config) == 128


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(folders, dtype):
    run = runner(folders["gemma2"], slots=5, length=48, dtype=dtype)
    # 8 bits of a bfloat16's number: some 1 % after two layers.
    oracle = Oracle(folders["gemma2"], dtype=getattr(torch, dtype))
    follow(run, oracle, Schedule(0, 5, 48), steps=10, tolerance=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.05)])
@pytest.mark.parametrize("arch", ["llama", "qwen2_sliding", "gemma2", "gemma3_text", "mistral"])
def test_random_schedules_on_cuda(folders, arch, dtype, tolerance):
    run = runner(folders[arch], slots=5, length=48, num_gpus=1, dtype=dtype)
    assert run.describe().device == "cuda:0"
    oracle = Oracle(folders[arch], "cuda", getattr(torch, dtype))
    follow(run, oracle, Schedule(0, 5, 48), steps=25, tolerance=tolerance)
