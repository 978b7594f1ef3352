"""A step that raised under vLLM, and steps that need the blocks which they drop."""

import numpy as np
import pytest
import tiny
import torch
from runners import Oracle, close, make_plan
from vllms import HEAD, Apart, needs_vllm

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("vllm") / "model", **HEAD)


def drops(*slots):
    return np.array(slots, np.int32)


def test_what_failed_leaves_no_trace_in_what_others_share(folder):
    run, oracle = Apart(folder, max_model_len=400, max_num_batched_tokens=400), Oracle(folder)
    text, other = np.random.default_rng(0).integers(0, 300, (2, 300)).tolist()
    run.forward(make_plan((0, 0, text, 0)))
    # One begins with blocks of the first, one with a copy of half a block; no embedding is there.
    with pytest.raises(IndexError):
        run.forward(make_plan((1, 256, [-1], 1), (2, 200, [3], 1), sources=(0, 0)))
    with pytest.raises(ValueError, match="start at 0"):
        run.forward(make_plan((1, 256, [1], 1)))
    got = run.forward(make_plan((1, 0, other, 1), (2, 0, other[:20], 1)))
    close(got, torch.stack([oracle(other)[-1], oracle(other[:20])[-1]]))
    got = run.forward(make_plan((0, 300, [4], 1), (3, 260, [5], 1), sources=(-1, 0)))
    close(got, torch.stack([oracle([*text, 4])[-1], oracle([*text[:260], 5])[-1]]))
    run.close()


def test_a_step_may_need_the_blocks_that_it_drops(folder):
    how = {"max_num_seqs": 400, "max_model_len": 500, "max_num_batched_tokens": 500}
    run, oracle = Apart(folder, spec={"memory": 2**24}, **how), Oracle(folder)
    text = np.random.default_rng(0).integers(0, 300, 500).tolist()
    size = run.description.block
    held = run.description.blocks
    for slot in range(held):  # a block each, all there are
        run.forward(make_plan((slot, 0, text[: size - 1], 0)))
    with pytest.raises(MemoryError):
        run.forward(make_plan((390, 0, text[:size], 0)))
    run.forget()
    for slot in range(held):
        run.forward(make_plan((slot, 0, text[: size - 1], 0)))
    got = run.forward(make_plan((390, 0, text[:300], 1), drops=drops(*range(-(-300 // size)))))
    close(got, oracle(text[:300])[-1:])
    # Two go on from what is dropped: one of them in its place.
    last = held - 1
    plan = make_plan(
        (1, 70, [5], 1), (last, size - 1, [6], 1), sources=(last - 1, -1), drops=drops(last - 1)
    )
    close(
        run.forward(plan),
        torch.stack([oracle([*text[:70], 5])[-1], oracle([*text[: size - 1], 6])[-1]]),
    )
    run.close()
