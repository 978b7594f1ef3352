"""The runner against plain forward passes without a cache, and its errors."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import psutil
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from dlf_ray.config import ModelSpec
from dlf_ray.messages import ALL, LENGTH_STEP, Plan
from dlf_ray.models.loading import load_tokenizer
from dlf_ray.models.loading import vocabulary_difference as difference
from dlf_ray.models.memory import CGROUPS, free_bytes
from dlf_ray.models.runner import FREE_PADDING, Runner, _context, _groups

VOCAB = 300
TOLERANCE = 1e-4
"""Of the largest logit: float32 sums in another order (other batch shapes, masked places added as
zeros) differ by some 1e-6 each, and grow a little with every layer; a wrong mask, position or slot
moves logits by 1e-1 and more."""


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {arch: tiny.model(root / arch, arch, vocab=VOCAB) for arch in tiny.ARCHS}


def runner(folder, slots=4, length=64, **spec) -> Runner:
    return Runner(
        ModelSpec(model=str(folder), **spec),
        max_num_seqs=slots,
        max_model_len=length,
        max_num_batched_tokens=256,
    )


def make_plan(*chunks: tuple[int, int, list[int], int], sources=(), **keep: int) -> Plan:
    """Chunks of (slot, start, tokens, want)."""
    slots, starts, tokens, wants = zip(*chunks, strict=True) if chunks else ((),) * 4

    def ints(values):
        return np.array(values, dtype=np.int32)

    lengths = [len(t) for t in tokens]
    flat = [token for chunk in tokens for token in chunk]
    arrays = map(ints, (slots, starts, lengths, wants, flat, sources))
    return Plan(0, *arrays, **keep)


class Oracle:
    """Logits of whole sequences, each by itself, without a cache."""

    def __init__(self, folder, device="cpu", dtype=torch.float32):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model = model.eval().to(device)

    @torch.inference_mode()
    def __call__(self, tokens: list[int]) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self.model.device)
        return self.model(input_ids=ids, use_cache=False).logits[0]


class Schedule:
    """A random life of slots: sequences join, advance in chunks, roll back and leave."""

    def __init__(self, seed, slots, length, longest=24):
        self.random = np.random.default_rng(seed)
        self.slots, self.length, self.longest = slots, length, longest
        self.alive: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}

    def plan(self):
        """A plan, and for each of its rows the tokens up to and including the scored one."""
        draw = self.random.integers
        for slot in [s for s in self.alive if draw(8) == 0]:
            del self.alive[slot]
        chunks, contexts = [], []
        for slot in self.random.permutation(self.slots).tolist():
            if slot not in self.alive:
                if draw(2):
                    continue
                self.alive[slot], self.computed[slot] = [], 0
            elif draw(4) == 0 and self.alive[slot]:
                continue
            known = self.alive[slot]
            start = self.computed[slot]
            if start and draw(4) == 0:
                start -= int(draw(1, min(start, 4) + 1))
            room = self.length - start
            if room <= 0:
                del self.alive[slot]
                continue
            size = min(room, int(draw(1, self.longest)) if draw(3) == 0 else 1)
            tokens = draw(0, VOCAB, size).tolist()
            known[start:] = tokens
            self.computed[slot] = start + size
            want = min(size, int(draw(0, 4)))
            chunks.append((slot, start, tokens, want))
            contexts += [known[: start + size - want + 1 + i] for i in range(want)]
        return make_plan(*chunks), contexts


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale)


def follow(run: Runner, oracle: Oracle, schedule: Schedule, steps: int, tolerance=TOLERANCE) -> int:
    scored = 0
    for _ in range(steps):
        plan, contexts = schedule.plan()
        got = run.forward(plan)
        assert got.shape == (plan.rows, run.vocab) == (len(contexts), run.vocab)
        if contexts:
            expected = torch.stack([oracle(tokens)[-1, : run.vocab] for tokens in contexts])
            close(got, expected, tolerance)
        scored += len(contexts)
    return scored


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


def test_storage_grows_with_what_is_used(folders):
    run, oracle = runner(folders["llama"], slots=16, length=400), Oracle(folders["llama"])

    def shape():
        (found,) = {(len(held), held.shape[2]) for held in run._cache._storage.values()}
        return found

    assert not run._cache._storage  # of what loading has tried
    text = np.random.default_rng(0).integers(0, VOCAB, 400).tolist()
    run.forward(make_plan((0, 0, text[:10], 0)))
    assert shape() == (1, 64)
    run.forward(make_plan((2, 0, text[:5], 0), (0, 10, text[10:70], 0)))
    assert shape() == (3, 128)
    close(
        run.forward(make_plan((0, 70, text[70:], 1), (2, 5, text[5:7], 1))),
        torch.stack([oracle(text)[-1], oracle(text[:7])[-1]]),
    )
    assert shape() == (3, 448)


class Life:
    """What is in the slots, as whoever plans a model's memory has it: sequences begin anew or with
    a copy, go on, roll back, and are dropped with the slots and positions that a plan gives up."""

    def __init__(self, seed, slots, length):
        self.random = np.random.default_rng(seed)
        self.slots, self.length = slots, length
        self.held: list[list[int]] = [[] for _ in range(slots)]

    def plan(self):
        """A plan, what each of its rows has seen, and the rectangle that it may take."""
        draw = self.random.integers
        before = self.held
        chunks, sources, contexts, held = [], [], [], list(before)
        keep = int(draw(self.slots + 1)) if draw(3) == 0 else ALL
        keep_length = int(draw(self.length)) if draw(3) == 0 else ALL
        for slot in range(self.slots):
            held[slot] = before[slot][:keep_length] if slot < keep else []
        few = int(draw(1, self.slots + 1))
        for slot in sorted(self.random.choice(self.slots, few, replace=False).tolist()):
            source = int(draw(self.slots)) if draw(3) == 0 else slot
            known = before[source]
            start = len(known) if draw(2) else int(draw(len(known) + 1))
            size = int(draw(1, 100)) if draw(3) == 0 else 1
            start = min(start, self.length - size)
            held[slot] = known[:start] + draw(0, VOCAB, size).tolist()
            want = min(size, int(draw(0, 3)))
            chunks.append((slot, start, held[slot][start:], want))
            sources.append(source if draw(2) or source != slot else -1)
            contexts += [held[slot][: len(held[slot]) - want + 1 + i] for i in range(want)]
        self.held = held
        rows = max(slot for slot in range(self.slots) if held[slot]) + 1
        length = -(-max(map(len, held)) // LENGTH_STEP) * LENGTH_STEP
        return (
            make_plan(*chunks, sources=sources, keep=keep, keep_length=keep_length),
            contexts,
            rows * length,
        )


def stored(run):
    return sum(held.nbytes for held in run._cache._storage.values())


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_the_cache_takes_no_more_than_the_plans_allow(folders, arch):
    oracle = Oracle(folders[arch])
    shrunk = 0
    for seed in range(4):
        run, life = runner(folders[arch], slots=8, length=300), Life(seed, 8, 300)
        most = was = scored = 0
        for _ in range(40):
            plan, contexts, positions = life.plan()
            got = run.forward(Plan.from_bytes(plan.to_bytes()))
            most = max(most, positions)
            assert stored(run) <= most * run.describe().cache_bytes_per_position
            shrunk += stored(run) < was
            was = stored(run)
            if contexts:
                close(got, torch.stack([oracle(tokens)[-1] for tokens in contexts]))
            scored += len(contexts)
        assert scored > 40
    assert shrunk > 0


def test_slots_are_given_up_for_length_and_back(folders):
    run, oracle = runner(folders["llama"], slots=16, length=512), Oracle(folders["llama"])
    text = np.random.default_rng(0).integers(0, VOCAB, 512).tolist()
    per_position = run.describe().cache_bytes_per_position

    def positions():
        return stored(run) / per_position

    run.forward(make_plan(*((slot, 0, text[: 40 + slot], 0) for slot in range(16))))
    assert positions() == 16 * 64
    # What is left of 16 moves together; what the others held is lost.
    run.forward(make_plan((0, 50, text[50:52], 0), (1, 55, text[55:56], 0), sources=[12, 15]))
    run.forward(make_plan((0, 52, text[52:300], 0), keep=2))
    assert positions() == 2 * 320
    with pytest.raises(ValueError, match="start at 0"):
        run.forward(make_plan((5, 45, [1], 1)))
    # A long one has ended; many short ones take its room.
    got = run.forward(
        make_plan(
            (0, 40, text[40:41], 1),
            (1, 56, text[56:57], 1),
            *((slot, 0, text[:3], 1) for slot in range(2, 10)),
            keep_length=64,
        )
    )
    assert positions() == 10 * 64
    ends = [41, 57, *[3] * 8]
    close(got, torch.stack([oracle(text[:end])[-1] for end in ends]))
    with pytest.raises(ValueError, match="start at 0"):
        run.forward(make_plan((0, 65, [1], 1)))
    assert positions() == 10 * 64


def test_slots_that_are_given_up_may_be_copied_from(folders):
    run, oracle = runner(folders["llama"], slots=8), Oracle(folders["llama"])
    run.forward(make_plan((6, 0, [1, 2, 3], 0), (0, 0, [4, 5], 0)))
    # They change places; then the upper ones are gone.
    got = run.forward(make_plan((0, 3, [7], 1), (6, 2, [8], 1), sources=[6, 0], keep=1))
    close(got, torch.stack([oracle([1, 2, 3, 7])[-1], oracle([4, 5, 8])[-1]]))
    run.forward(make_plan((0, 4, [1] * 60, 0), keep=1))
    with pytest.raises(ValueError, match="start at 0"):
        run.forward(make_plan((6, 3, [1], 1)))


def peak(compute) -> int:
    """The most bytes that `compute` had allocated at a time beyond those before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        compute()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum(changes).max())


def test_growth_holds_one_tensor_twice(tmp_path):
    run = runner(tiny.model(tmp_path, layers=6), slots=16, length=512)
    sizes = []

    def grow():
        run.forward(make_plan(*((slot, 0, [1], 0) for slot in range(16))))
        sizes.append(stored(run))
        run._pass = None  # what counts is what happens before
        with pytest.raises(TypeError):
            run.forward(make_plan((0, 1, [1] * 500, 0)))
        sizes.append(stored(run))

    most = peak(grow)
    before, after = sizes
    assert after == 8 * before  # from 64 to 512 positions
    assert after < most < after + 2 * before / 12


def test_copies_of_many_prefixes_cost_as_many_operations_as_few(folders):
    text = np.random.default_rng(0).integers(0, VOCAB, 60).tolist()
    oracle = Oracle(folders["llama"])
    counts = []
    for many in (2, 12):
        run = runner(folders["llama"], slots=16)
        run.forward(make_plan(*((slot, 0, text, 0) for slot in range(16))))
        targets = range(1, many + 1)
        starts = [20 + slot for slot in targets]
        plan = make_plan(
            *((slot, start, [7], 1) for slot, start in zip(targets, starts, strict=True)),
            sources=[0] * many,
        )
        with torch.profiler.profile() as profile:
            got = run.forward(plan)
        counts.append(len(profile.events()))
        close(got, torch.stack([oracle([*text[:start], 7])[-1] for start in starts]))
    assert counts[1] == counts[0]


def test_a_copy_that_fails_leaves_nothing_that_counts_as_computed(folders, monkeypatch):
    run, oracle = runner(folders["llama"]), Oracle(folders["llama"])
    run.forward(make_plan((0, 0, [1, 2, 3], 0), (1, 0, [4, 5, 6], 0)))
    original, calls = torch.Tensor.index_copy_, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return original(*args)

    # One that starts from a copy, and more slots at the same time.
    plan = make_plan((1, 2, [9], 1), (3, 0, [7], 1), sources=[0, -1])
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "index_copy_", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            run.forward(plan)
    with pytest.raises(ValueError, match="start at 0"):
        run.forward(make_plan((1, 1, [5], 1)))
    close(run.forward(plan), torch.stack([oracle([1, 2, 9])[-1], oracle([7])[-1]]))


def test_what_a_sequence_leaves_behind_does_not_reach_the_next(folders):
    run, oracle = runner(folders["llama"]), Oracle(folders["llama"])
    run.forward(make_plan((0, 0, list(range(20)), 1), (1, 0, [1, 2, 3], 1)))
    with torch.inference_mode():
        for held in run._cache._storage.values():
            held[0] = torch.nan  # a model that overflowed
    close(
        run.forward(make_plan((1, 3, [4], 1), (0, 0, [5, 6], 1))),
        torch.stack([oracle([1, 2, 3, 4])[-1], oracle([5, 6])[-1]]),
    )


def test_a_copy_brings_nothing_of_what_follows_the_copied_prefix(folders):
    run, oracle = runner(folders["llama"]), Oracle(folders["llama"])
    run.forward(make_plan((0, 0, list(range(20)), 1)))
    with torch.inference_mode():
        for held in run._cache._storage.values():
            held[0, :, 5:] = torch.nan
    got = run.forward(make_plan((1, 4, [7], 1), (2, 0, list(range(9)), 1), sources=[0, -1]))
    close(got, torch.stack([oracle([0, 1, 2, 3, 7])[-1], oracle(list(range(9)))[-1]]))


def test_a_failed_pass_leaves_nothing_that_counts_as_computed(folders, monkeypatch):
    run = runner(folders["llama"])
    run.forward(make_plan((0, 0, [1, 2, 3], 1), (1, 0, [1], 1)))

    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(run._model.model.layers[1].mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            run.forward(make_plan((0, 1, [2, 3, 4], 1)))
    with pytest.raises(ValueError, match="start at 0"):
        run.forward(make_plan((0, 3, [4], 1)))
    oracle = Oracle(folders["llama"])
    close(
        run.forward(make_plan((0, 1, [2, 3], 1), (1, 1, [2], 1))),
        torch.stack([oracle([1, 2, 3])[-1], oracle([1, 2])[-1]]),
    )


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        ((0, 4, [1], 1), "start at 0"),
        ((1, 1, [1], 1), "start at 0"),
        ((0, -1, [1], 1), "start at 0"),
        ((4, 0, [1], 1), "0..3"),
        ((-1, 0, [1], 1), "0..3"),
        ((0, 3, [1] * 62, 1), "64 positions"),
        ((0, 0, [VOCAB], 1), "token ids"),
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
    assert (other.eos_token_ids, other.dtype) == ((3, 5), "bfloat16")
    assert other.tokenizer_digest != told.tokenizer_digest
    assert runner(folder, dtype="float32").describe().dtype == "float32"


def test_description_of_memory(tmp_path):
    folder = tiny.model(tmp_path, hidden=64, layers=3)
    weights = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    told = runner(folder, memory=10**9).describe()
    assert told.cache_bytes_per_position == 2 * 3 * 2 * 16 * 4  # 3 layers, 2 heads of 16 numbers
    assert 0.4 * 10**9 < told.free_bytes < 10**9 - weights
    assert runner(folder, memory=weights).describe().free_bytes == 0
    half = runner(folder, memory=10**9, dtype="bfloat16").describe()
    assert half.cache_bytes_per_position * 2 == told.cache_bytes_per_position
    assert half.free_bytes > told.free_bytes
    available = psutil.virtual_memory().available
    assert 0 < runner(folder).describe().free_bytes < 1.5 * available


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_a_step_at_its_largest_takes_less_than_is_put_aside(folders, arch):
    length, tokens = 256, 256
    run = runner(folders[arch], slots=8, length=length)
    config = run._model.config
    asides = run._working_bytes(config, tokens, 300)
    rectangle = 8 * length * run.describe().cache_bytes_per_position
    for slot in range(8):
        run.forward(make_plan((slot, 0, [1] * (length - 32), 0)))
    plan = make_plan(*((slot, length - 32, [1] * 32, 1) for slot in (1, 2, 5, 7, 3, 0, 4, 6)))
    assert peak(lambda: run.forward(plan)) < asides + rectangle * (2 + 4) / 4


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


def test_memory_of_a_gpu_is_what_its_share_and_the_others_leave(monkeypatch):
    gpu, allocated, reserved = torch.device("cuda:0"), 10, 15

    def free(share, others):
        answers = {
            "mem_get_info": (100 - others - reserved, 100),
            "memory_allocated": allocated,
            "memory_reserved": reserved,
            "get_per_process_memory_fraction": share,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
        return free_bytes(gpu, limit=5, used=4)

    assert free(share=0.5, others=20) == 40
    assert free(share=1.0, others=20) == 70
    assert free(share=0.05, others=20) == 0


@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_a_machine_is_what_its_container_leaves(tmp_path, monkeypatch, version):
    cpu = torch.device("cpu")
    monkeypatch.setattr("dlf_ray.models.memory.CGROUP", tmp_path)
    whole = free_bytes(cpu)
    assert whole == pytest.approx(psutil.virtual_memory().available, rel=0.5)
    assert free_bytes(cpu, limit=100, used=40) == 60
    limit, used, stat, gives_way = CGROUPS[2 - version]
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / limit).write_text("4000\n")
    (tmp_path / used).write_text("3000\n")
    (tmp_path / stat).write_text(f"anon 5\n{gives_way} 500\n")
    assert free_bytes(cpu) == 1500
    (tmp_path / limit).write_text("max\n")
    assert free_bytes(cpu) > 10**6


def test_a_shorter_context_lowers_the_limit(folders):
    run = runner(folders["gpt2"], length=4096)
    with pytest.raises(ValueError, match="512 positions"):
        run.forward(make_plan((0, 0, [1] * 513, 1)))
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 128}
    config = AutoConfig.for_model("llama", max_position_embeddings=512)
    config.rope_parameters = rope
    assert _context(config) == 128


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(folders, dtype):
    run = runner(folders["gemma2"], slots=5, length=48, dtype=dtype)
    # 8 bits of a bfloat16's number: some 1 % after two layers.
    oracle = Oracle(folders["gemma2"], dtype=getattr(torch, dtype))
    follow(run, oracle, Schedule(0, 5, 48), steps=10, tolerance=0.05)


def test_vocabulary_difference():
    a = {"x": 0, "y": 1, "z": 2}
    assert difference(a, dict(reversed(a.items())), "large", "base") is None
    assert difference(a, {"x": 0, "z": 1, "y": 2}, "large", "base") == (
        "large (3 tokens) and base (3 tokens) do not share a vocabulary: "
        "id 1 is 'y' in large and 'z' in base"
    )
    assert "id 2 is 'z' in large and nothing in math" in str(
        difference(a, {"x": 0, "y": 1}, "large", "math")
    )


def test_vocabulary_difference_of_tokenizers(folders, tmp_path):
    here = load_tokenizer(ModelSpec(model=str(folders["llama"])))
    assert difference(here, tiny.tokenizer(tmp_path, VOCAB), "large", "base") is None
    assert "id 290" in str(difference(here, tiny.tokenizer(tmp_path, 290), "large", "base"))


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of a good model, to be broken."""
    return shutil.copytree(folders["llama"], tmp_path / "model")


def edit(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a model of the Hugging Face hub"):
        runner(tmp_path / "none")


def test_no_configuration(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        runner(folder)


def test_no_tokenizer(folder, folders):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="set `tokenizer:` in the family file"):
        runner(folder)
    assert runner(folder, tokenizer=str(folders["llama"])).vocab == VOCAB


def test_another_models_tokenizer(tmp_path, folders):
    tiny.tokenizer(tmp_path, 400)
    with pytest.raises(ValueError, match="ids beyond the model's 300"):
        runner(folders["llama"], tokenizer=str(tmp_path))


def test_pickled_weights(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="convert them once: python -c"):
        runner(folder)


def test_a_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete"):
        runner(folder)


def test_of_many_files_the_cut_one_is_named_before_any_is_read(folder, monkeypatch):
    whole = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="30KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[-1].write_bytes(shards[-1].read_bytes()[:100])
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match=rf"{shards[-1].name} is damaged or incomplete"):
        runner(folder)


def test_missing_weights_are_not_made_up(folder):
    edit(folder, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"lacks 9 weights.*layers\.2"):
        runner(folder)


def test_weights_of_other_shapes(folder):
    edit(folder, intermediate_size=48)
    with pytest.raises(ValueError, match="could not be loaded"):
        runner(folder)


def test_weights_that_are_not_finite(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[3] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="not finite"):
        runner(folder)


def test_layers_with_another_kind_of_state(tmp_path):
    config = AutoConfig.for_model(
        "lfm2", hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=VOCAB,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"],
        eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer(tmp_path, VOCAB)
    with pytest.raises(ValueError, match="layers of type conv"):
        runner(tmp_path)


def test_an_architecture_that_masks_by_itself(tmp_path):
    # Its local layers take the length of the cache for the length of every sequence.
    config = AutoConfig.for_model(
        "gpt_neo", hidden_size=32, num_layers=2, num_heads=4, vocab_size=VOCAB, window_size=5,
        attention_types=[[["global", "local"], 1]], initializer_range=0.4, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer(tmp_path, VOCAB)
    with pytest.raises(ValueError, match="answers otherwise with a slot cache"):
        runner(tmp_path)


def test_an_adapter_is_merged_into_its_base(folders, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(folders["llama"])
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.save_pretrained(tmp_path)
    tiny.tokenizer(tmp_path, VOCAB)
    with torch.inference_mode():
        expected = adapted.eval()(torch.tensor([[1, 2, 3]])).logits[0]
    got = runner(tmp_path).forward(make_plan((0, 0, [1, 2, 3], 3)))
    close(got, expected)
    assert not torch.allclose(got, Oracle(folders["llama"])([1, 2, 3]), atol=0.1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install peft"):
        runner(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpus_that_are_not_there(folders):
    with pytest.raises(ValueError, match="num_gpus: 0"):
        runner(folders["llama"], num_gpus=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.05)])
@pytest.mark.parametrize("arch", ["llama", "qwen2_sliding", "gemma2", "gemma3_text", "mistral"])
def test_random_schedules_on_cuda(folders, arch, dtype, tolerance):
    run = runner(folders[arch], slots=5, length=48, num_gpus=1, dtype=dtype)
    assert run.describe().device == "cuda:0"
    oracle = Oracle(folders[arch], "cuda", getattr(torch, dtype))
    follow(run, oracle, Schedule(0, 5, 48), steps=25, tolerance=tolerance)
