"""A runner by itself: plans for it, and plain forward passes without a cache to hold it against."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dlf_ray.config import ModelSpec
from dlf_ray.models.runner import Runner
from dlf_ray.plans import Plan

VOCAB = 300
TOLERANCE = 1e-4
"""Of the largest logit: float32 sums in another order (other batch shapes, masked places added as
zeros) differ by some 1e-6 each, and grow a little with every layer; a wrong mask, position or slot
moves logits by 1e-1 and more."""


def runner(folder, slots=4, length=64, kind=ModelSpec, **spec) -> Runner:
    return Runner(
        kind(model=str(folder), **spec),
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
