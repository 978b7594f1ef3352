"""The scheduler as a bookkeeper: every token computed once per model, in order, within budget."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parts import FUSION, LARGE_ALONE, sequence

from dlf_ray.decoding.scheduler import Scheduler
from dlf_ray.plans import Plan


def drive(scheduler, seen, caches, shared=None):
    """Runs to the end; the models' caches are dicts of token lists, checked like a real one."""
    shared = [] if shared is None else shared
    steps = 0
    while scheduler.has_work:
        step = scheduler.plan()
        steps += 1
        assert step.plans, "a step that computes nothing would never end"
        for model, plan in step.plans.items():
            assert plan.lengths.sum() <= scheduler.max_num_batched_tokens
            assert len(set(plan.slots.tolist())) == len(plan.slots)
            at = 0
            before = {slot: list(cache) for (name, slot), cache in caches.items() if name == model}
            sources = plan.sources if len(plan.sources) else [-1] * len(plan.slots)
            columns = (plan.slots.tolist(), plan.starts, plan.lengths, sources)
            for slot, start, length, source in zip(*columns, strict=True):
                if source >= 0:
                    assert start <= len(before[source])
                    caches[model, slot] = before[source][:start]
                    shared.append(int(start))
                cache = caches.setdefault((model, slot), [])
                assert start <= len(cache)
                cache[start:] = plan.tokens[at : at + length].tolist()
                at += length
            assert plan.rows == sum(n for s, n in step.ready.items() if model in s.computed)
            assert plan.rows <= scheduler.max_rows
        for s, count in step.ready.items():
            for model in s.computed:
                known = [*s.request.prompt_of(model), *s.request.continuation, *s.generated]
                end = len(s.request.prompt_of(model)) + s.scored + len(s.generated) - 1 + count
                assert caches[model, s.slot] == known[:end]
                wanted = np.repeat(step.plans[model].slots, step.plans[model].wants)
                assert wanted[step.rows(model, [s])].tolist() == [s.slot] * count
        for s, count in step.ready.items():
            given = min(count, len(s.request.continuation) - s.scored)
            s.scored += given
            if count > given:
                s.generated.append(1000 + len(s.generated))
            done = s.scored == len(s.request.continuation) and len(s.generated) == s.max_new_tokens
            if done:
                seen.append(s.request.id)
                scheduler.remove(s)
    return steps


@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=12),
    slots=st.integers(1, 5),
    budget=st.integers(5, 40),
)
def test_every_token_is_computed_once_and_in_order(lengths, slots, budget):
    scheduler = Scheduler(max_num_seqs=slots, max_num_batched_tokens=budget)
    for id, (large, base) in enumerate(lengths):
        # Prompts of different lengths per model, as with few-shot examples for the large one only.
        fusion = LARGE_ALONE if id % 3 == 2 else FUSION
        prompts = {"base": range(100, 100 + base)} if fusion is FUSION else {}
        prompts = {name: tuple(tokens) for name, tokens in prompts.items()}
        rest = range(500, 500 + large) if id % 4 == 1 else ()
        new = 0 if id % 8 == 1 else 1 + id % 4  # some are scored and then go on, or do not
        # All begin alike, for as long as they are.
        made = sequence(id, range(large), new, prompts, fusion, rest)
        scheduler.add(made)
    seen = []
    drive(scheduler, seen, {})
    assert sorted(seen) == list(range(len(lengths)))


def test_what_begins_alike_is_computed_once():
    """Twenty questions after the same examples: the examples once, then copies."""
    scheduler = Scheduler(max_num_seqs=4, max_num_batched_tokens=64)
    examples = list(range(100))
    for id in range(20):
        rest = [900 + id] if id % 2 else ()
        new = 0 if rest else 3
        scheduler.add(sequence(id, [*examples, 200 + id, 7], new, continuation=rest))
    computed, seen, shared = [], [], []
    plan = scheduler.plan

    def counted():
        step = plan()
        computed.append(step.plans["large"].lengths.sum())
        return step

    scheduler.plan = counted
    drive(scheduler, seen, {}, shared)
    assert sorted(seen) == list(range(20))
    assert sum(computed) <= 100 + 20 * 5
    assert set(shared) == {100}


def test_a_copy_that_missed_its_budget_is_not_taken_from_somebody_else():
    """The source's slot goes to another sequence before there was room to copy from it."""
    scheduler = Scheduler(max_num_seqs=3, max_num_batched_tokens=3)
    scheduler.add(sequence(0, range(40), new=1))
    drive(scheduler, [], caches := {})
    for id, prompt in enumerate([range(50, 90), [*range(40), 1], range(60, 99)], start=1):
        scheduler.add(sequence(id, prompt, new=2))
    seen = []
    drive(scheduler, seen, caches)
    assert sorted(seen) == [1, 2, 3]


def test_first_come_first_served():
    scheduler = Scheduler(max_num_seqs=1, max_num_batched_tokens=100)
    for id in range(4):
        scheduler.add(sequence(id, [1, 2]))
    seen = []
    drive(scheduler, seen, {})
    assert seen == [0, 1, 2, 3]


def test_a_long_prompt_does_not_delay_running_answers():
    scheduler = Scheduler(max_num_seqs=4, max_num_batched_tokens=8)
    short = sequence(0, [1], new=50)
    scheduler.add(short)
    step = scheduler.plan()
    short.generated.append(1)
    scheduler.add(sequence(1, range(60)))
    for _ in range(8):
        step = scheduler.plan()
        assert short in step.ready
        assert step.plans["large"].lengths.sum() == 8
        short.generated.append(1)


def test_short_prompts_need_not_wait_for_long_ones_nor_hold_them_up():
    """Long ones came first, and short ones keep coming."""
    scheduler = Scheduler(max_num_seqs=8, max_num_batched_tokens=100)
    first, second = (sequence(id, range(1000 * id, 1000 * id + 990), new=1) for id in (1, 2))
    scheduler.add(first)
    scheduler.add(second)
    scheduler.plan()
    assert (first.computed["large"], second.computed["large"]) == (100, 0)
    steps = 1
    while first.computed["large"] < 950:
        short = [sequence(10 * steps + n, [1000 * n + steps] * 12, new=1) for n in range(6)]
        for each in short:
            scheduler.add(each)
        step = scheduler.plan()
        steps += 1
        assert step.plans["large"].lengths.sum() == 100
        # Four of 12 tokens and a part of the next one fit into half of that.
        assert sum(each in step.ready for each in short) == 4
        for each in short:
            scheduler.remove(each)
    assert steps == 1 + (950 - 100) // 50
    assert second.computed["large"] == 0
    assert list(scheduler.plan().ready) == [first]
    assert (first.computed["large"], second.computed["large"]) == (990, 60)


def test_prompts_of_one_length_are_served_as_they_came():
    scheduler = Scheduler(max_num_seqs=4, max_num_batched_tokens=30)
    many = [sequence(id, range(100 * id, 100 * id + 30), new=1) for id in range(4)]
    for each in many:
        scheduler.add(each)
    ready = []
    while len(ready) < 4:
        ready += [each.request.id for each in scheduler.plan().ready if each not in ready]
        for each in many:
            if each in scheduler.running and each.request.id in ready:
                scheduler.remove(each)
    assert ready == [0, 1, 2, 3]


def test_a_whole_prompt_fits_one_step_when_the_budget_allows():
    scheduler = Scheduler(max_num_seqs=4, max_num_batched_tokens=2048)
    scheduler.add(sequence(0, range(500), new=1))
    assert drive(scheduler, [], {}) == 1


def test_aborts_free_slots_whether_running_or_waiting():
    scheduler = Scheduler(max_num_seqs=1, max_num_batched_tokens=8)
    first, second, third = (sequence(id, [1]) for id in range(3))
    for s in (first, second, third):
        scheduler.add(s)
    scheduler.plan()
    scheduler.remove(second)
    scheduler.remove(first)
    assert list(scheduler.plan().ready) == [third]


@given(st.lists(st.tuples(st.integers(0, 63), st.integers(0, 9), st.integers(1, 5)), max_size=8))
def test_plans_survive_the_wire(chunks):
    columns = np.array(chunks, dtype=np.int32).reshape(len(chunks), 3).T
    tokens = np.arange(columns[2].sum(), dtype=np.int32)
    sources = columns[0] - 1 if len(chunks) % 2 else np.empty(0, dtype=np.int32)
    plan = Plan(2**40, *columns, (columns[2] > 2).astype(np.int32), tokens, sources)
    again = Plan.from_bytes(plan.to_bytes())
    assert again.step == plan.step
    for name in ("slots", "starts", "lengths", "wants", "tokens", "sources"):
        np.testing.assert_array_equal(getattr(again, name), getattr(plan, name))


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"x" + b[1:], lambda b: b[:3]])
def test_broken_plans_are_refused(damage):
    one = np.ones(1, dtype=np.int32)
    with pytest.raises(ValueError, match="plan"):
        Plan.from_bytes(damage(Plan(1, one, one, one, one, one).to_bytes()))
