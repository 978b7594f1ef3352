"""The runner's memory: how its cache grows, shrinks and copies, and what it says is free."""

from __future__ import annotations

import numpy as np
import psutil
import pytest
import tiny
import torch
from runners import VOCAB, Oracle, close, make_plan, runner
from transformers import AutoModelForCausalLM

from dlf_ray.models.memory import CGROUPS, free_bytes
from dlf_ray.plans import ALL, LENGTH_STEP, Plan


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


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
