"""The runner against plain forward passes without a cache, and its errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from dlf_ray.config import ModelSpec
from dlf_ray.messages import Plan
from dlf_ray.runner import Runner, _groups, load_tokenizer, vocabulary_difference

VOCAB = 300
TOLERANCE = 1e-4
"""Of the largest logit: float32 sums in another order (other batch shapes, masked places added as
zeros) differ by some 1e-6 each, and grow a little with every layer; a wrong mask, position or slot
moves logits by 1e-1 and more."""

gpu = pytest.mark.gpu
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {arch: tiny.model(root / arch, arch, vocab=VOCAB) for arch in tiny.ARCHS}


def runner(folder, slots=4, length=64, **spec) -> Runner:
    return Runner(ModelSpec(model=str(folder), **spec), max_num_seqs=slots, max_model_len=length)


def make_plan(*chunks: tuple[int, int, list[int], int]) -> Plan:
    """Chunks of (slot, start, tokens, want)."""
    slots, starts, tokens, wants = zip(*chunks, strict=True) if chunks else ((),) * 4

    def ints(values):
        return np.array(values, dtype=np.int32)

    lengths = [len(t) for t in tokens]
    return Plan(0, ints(slots), ints(starts), ints(lengths), ints(wants), ints(sum(tokens, [])))


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
    for seed in range(2):
        run = runner(folders[arch], slots=5, length=48)
        assert follow(run, oracle, Schedule(seed, 5, 48), steps=25) > 30
