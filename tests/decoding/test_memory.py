"""Memory is planned: what runs together fits, whatever the lengths; what never fits says so."""

import dataclasses
import random

import pytest
import torch
from conftest import EXPERTS, family_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parts import sequence

from dlf_ray import LocalEngine, SamplingParams
from dlf_ray.decoding.scheduler import Scheduler
from dlf_ray.models.worker import ModelWorker
from dlf_ray.plans import LENGTH_STEP

POSITIONS = 4 * 256
"""Of the rectangle that the fake's memory holds: four sequences of full length."""


class Rectangle(ModelWorker):
    """A model whose memory is (highest slot + 1) x (longest sequence), as the real cache's is."""

    positions = POSITIONS
    tells = True
    """Whether it says how much memory there is."""

    def load(self):
        description = super().load()
        self.size = (0, 0)
        self.failures = 0
        if not self.tells or "facts" not in self.spec.model:
            return dataclasses.replace(description, free_bytes=None)
        free = int(self.positions * description.cache_bytes_per_position / 0.9) + 1
        return dataclasses.replace(description, free_bytes=free)

    def compute(self, plan):
        if "facts" in self.spec.model:
            slots, length = self.size
            kept = min(slots, plan.keep), min(length, plan.keep_length)
            ends = int((plan.starts + plan.lengths).max())
            needed = max(kept[0], int(plan.slots.max()) + 1), max(kept[1], ends)
            if needed[0] > slots or needed[1] > length:
                self.size = needed
            if self.size[0] * self.size[1] > self.positions:
                self.failures += 1
                self.size = (0, 0)
                raise torch.OutOfMemoryError("no room for the cache")
        return super().compute(plan)


class Silent(Rectangle):
    tells = False


def mixed(count, seed):
    rng = random.Random(seed)
    sizes = [rng.choice([5, 30, 100, 200]) for _ in range(count)]
    prompts = [[rng.randrange(1, 300) for _ in range(size)] for size in sizes]
    return prompts, [SamplingParams(max_tokens=rng.choice([1, 8, 30])) for _ in range(count)]


@pytest.mark.parametrize("sharing", [True, False], ids=["sharing", "not sharing"])
def test_what_memory_is_known_never_runs_out(folder, sharing):
    prompts, params = mixed(40, seed=1)
    family = family_of(folder, max_num_seqs=16, enable_prefix_caching=sharing)
    with LocalEngine(family) as engine, LocalEngine(family, worker=Rectangle) as small:
        expected = engine.generate(prompts, params)
        outputs = small.generate(prompts, params)
        assert [o.error for o in outputs] == [None] * 40
        assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
        assert small.coordinator.fabric._workers["facts"].failures == 0
        small.coordinator.scheduler.slots.check_integrity()
        # Requests that do not use the small model are not held back by it.
        alone = small.generate(prompts[:16], params[:16], experts=["math"])
        assert [o.error for o in alone] == [None] * 16


def test_memory_that_ran_out_unforeseen_is_enough_for_fewer(folder):
    prompts, params = mixed(40, seed=2)
    family = family_of(folder, max_num_seqs=16)
    with LocalEngine(family) as engine, LocalEngine(family, worker=Silent) as small:
        expected = engine.generate(prompts, params)
        outputs = small.generate(prompts, params)
        assert [o.error for o in outputs] == [None] * 40
        assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
        # Halving once or twice, and again when it has become too many; not at every turn.
        assert 1 <= small.coordinator.fabric._workers["facts"].failures <= 12


def test_a_family_too_long_for_its_memory_says_what_would_fit(folder):
    class Tiny(Rectangle):
        positions = 130

    with pytest.raises(ValueError, match=r"'facts' .* of 128 tokens.*max_model_len: 128"):
        LocalEngine(family_of(folder), worker=Tiny)
    with LocalEngine(family_of(folder, max_model_len=128), worker=Tiny) as engine:
        assert engine.generate([5] * 90, SamplingParams(max_tokens=30))[0].error is None


def test_models_of_one_node_share_its_memory(folder):
    class Known(ModelWorker):
        def load(self):
            description = super().load()
            return dataclasses.replace(description, free_bytes=10**6)

    with LocalEngine(family_of(folder, max_model_len=64), worker=Known) as engine:
        sizes = {
            name: worker.runner.describe().cache_bytes_per_position
            for name, worker in engine.coordinator.fabric._workers.items()
        }
        positions = engine.limits.positions
        assert set(positions) == {"large", "base", *EXPERTS}
        taken = sum(positions[name] * sizes[name] for name in sizes)
        assert 0.8 * 10**6 < taken <= 0.9 * 10**6


@settings(max_examples=50, deadline=None)
@example(lengths=[(146, 5), (79, 3), (118, 4), (240, 3), (22, 1)], slots=6, positions=12)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 200)), min_size=1, max_size=30),
    slots=st.integers(1, 12),
    positions=st.integers(10, 60),
)
def test_no_plan_asks_for_more_than_there_is(lengths, slots, positions):
    """The rectangle that runs and is remembered stays within what each model holds."""
    most = {"large": positions * LENGTH_STEP, "base": positions * LENGTH_STEP // 2}
    scheduler = Scheduler(max_num_seqs=slots, max_num_batched_tokens=512, positions=most)
    left = len(lengths)
    for id, (size, new) in enumerate(lengths):
        # Some begin alike, so that what is remembered matters.
        scheduler.add(sequence(id, range(id % 3, id % 3 + size), min(new, 5)))
    while scheduler.has_work:
        step = scheduler.plan()
        assert step.plans
        scheduler.slots.check_integrity()
        for each in list(step.ready):
            each.generated.append(7)
            if len(each.generated) == each.max_new_tokens:
                scheduler.remove(each)
                left -= 1
    assert left == 0
