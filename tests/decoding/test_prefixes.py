"""Sharing a prefix: it saves tokens, and never costs steps."""

import math

import pytest
from conftest import family_of
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import sequence

from dlf_ray import LocalEngine, SamplingParams
from dlf_ray.decoding.scheduler import Scheduler

FEW = 3


def steps_of(prompts, *, sharing, slots, new=1, budget=2048, continuation=()):
    """Steps until all have ended, and the tokens that the large model computed."""
    scheduler = Scheduler(
        max_num_seqs=slots, max_num_batched_tokens=budget, enable_prefix_caching=sharing
    )
    for id, prompt in enumerate(prompts):
        scheduler.add(sequence(id, prompt, new, continuation=continuation))
    steps = tokens = 0
    while scheduler.has_work:
        step = scheduler.plan()
        steps += 1
        tokens += int(step.plans["large"].lengths.sum()) if "large" in step.plans else 0
        for each, count in step.ready.items():
            given = min(count, len(continuation) - each.scored)
            each.scored += given
            each.generated += [9] * (count - given)
            if each.scored == len(continuation) and len(each.generated) == new:
                scheduler.remove(each)
        scheduler.slots.check_integrity()
    return steps, tokens


@pytest.mark.parametrize("preamble", [0, 16, 20, 100, 700])
@pytest.mark.parametrize("question", [5, 40, 100])
def test_choices_of_many_questions(preamble, question):
    """What a likelihood benchmark asks: sequences that live for one step."""
    prompts = [
        [*range(preamble), *range(1000 + item * 200, 1000 + item * 200 + question), choice]
        for item in range(64)
        for choice in range(4)
    ]
    plain, computed = steps_of(prompts, sharing=False, slots=64, new=0, continuation=(7,))
    shared, fewer = steps_of(prompts, sharing=True, slots=64, new=0, continuation=(7,))
    assert shared <= plain + FEW
    assert fewer <= computed


def test_one_preamble_for_all_is_computed_once():
    prompts = [[*range(500), 1000 + n] for n in range(200)]
    steps, tokens = steps_of(prompts, sharing=True, slots=32)
    assert tokens == 500 + 200
    assert steps <= 1 + math.ceil(200 / 32) + FEW


def test_each_begins_as_the_one_before_and_goes_on():
    """A chain, in which everybody could wait for the one before."""
    prompts = [list(range(16 * (n + 1))) for n in range(30)]
    plain, _ = steps_of(prompts, sharing=False, slots=32, budget=4096)
    shared, _ = steps_of(prompts, sharing=True, slots=32, budget=4096)
    assert shared <= plain + FEW


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 150)), max_size=40
    ),
    slots=st.integers(1, 16),
    new=st.integers(1, 6),
    budget=st.integers(16, 400),
)
def test_no_load_takes_more_steps(parts, slots, new, budget):
    """Prompts with one, two or no level of their beginnings in common."""
    prompts = [
        [*range(1000 * a, 1000 * a + 90), *range(1000 * b + 100, 1000 * b + 150), *range(size), 5]
        for a, b, size in parts
    ]
    plain, computed = steps_of(prompts, sharing=False, slots=slots, new=new, budget=budget)
    shared, fewer = steps_of(prompts, sharing=True, slots=slots, new=new, budget=budget)
    # Each level may be waited for once: as long as it takes to compute it.
    assert shared <= plain + FEW + 2 * math.ceil(150 / budget)
    assert fewer <= computed


def test_the_engine_takes_as_few(folder):
    """Choices and single tokens after a common preamble, through the engine itself."""
    preamble = list(range(2, 22))
    prompts = [[*preamble, 30 + n // 4, 60 + n % 4] for n in range(96)]
    steps = {}
    for sharing in (False, True):
        family = family_of(folder, max_num_seqs=32, enable_prefix_caching=sharing)
        with LocalEngine(family) as engine:
            scores = engine.score(prompts, [[5]] * 96)
            assert all(each.error is None for each in scores)
            steps["score", sharing] = engine.timings().steps
            engine.generate(prompts, SamplingParams(max_tokens=1))
            steps["generate", sharing] = engine.timings().steps
            engine.coordinator.scheduler.slots.check_integrity()
    for what in ("score", "generate"):
        assert steps[what, True] <= steps[what, False] + FEW


def test_a_conversation_goes_on_in_its_own_slot():
    """The prompt of the next turn begins with all of the last one: nothing is even copied."""
    scheduler = Scheduler(max_num_seqs=8, max_num_batched_tokens=4096)
    tokens = list(range(100))
    for turn in range(4):
        made = sequence(turn, tokens, new=5)
        scheduler.add(made)
        while not made.generated or len(made.generated) < 5:
            plan = scheduler.plan().plans["large"]
            assert plan.slots.tolist() == [0]
            assert not len(plan.sources)
            made.generated.append(500 + len(made.generated))
        scheduler.remove(made)
        tokens = [*tokens, *made.generated, *range(7)]
        assert turn == 0 or plan.starts[0] > 100
