"""Waiting costs nothing: not those who need no lost model, and not the steps of others."""

import time

from conftest import EXPERTS, family_of
from parts import LARGE_ALONE, flaky, sequence

from dlf_ray import LocalEngine, SamplingParams
from dlf_ray.decoding.scheduler import Scheduler
from dlf_ray.messages import Request


def test_who_needs_no_lost_model_is_served_though_all_slots_were_taken(folder):
    sampling = SamplingParams(max_tokens=30, ignore_eos=True)
    with LocalEngine(family_of(folder, max_num_seqs=4)) as engine:
        prompts = [[n, 6, 7] for n in range(1, 5)]
        expected = engine.generate(prompts, sampling)
        fabric = flaky(engine, chance=0.0)
        streams = [engine.stream(prompt, sampling) for prompt in prompts]
        outputs = [next(stream).token_ids for stream in streams]
        engine.coordinator._change(*fabric.lose("facts"))
        fabric.away["facts"] = 10**9
        alone = engine.generate([[8, 9], [3]], SamplingParams(max_tokens=5), experts=["math"])
        assert [output.error for output in alone] == [None, None]
        # Nothing can be planned now, so nothing is: a loop would sleep.
        assert not engine.coordinator.has_work
        assert engine.coordinator.step() == []
        fabric.away["facts"] = 0
        assert engine.generate([5], SamplingParams(max_tokens=1))[0].error is None
        for stream, tokens in zip(streams, outputs, strict=True):
            for piece in stream:
                tokens += piece.token_ids
        assert outputs == [output.token_ids for output in expected]


def test_what_the_other_models_had_computed_is_found_again():
    scheduler = Scheduler(max_num_seqs=4, max_num_batched_tokens=512)
    made = sequence(0, range(200), new=50)
    scheduler.add(made)
    for token in range(40):
        scheduler.plan()
        made.generated.append(token)
    scheduler.lose("base")
    assert (made.slot, scheduler.has_work) == (-1, False)
    scheduler.recover("base")
    plans = scheduler.plan().plans
    assert plans["large"].starts[0] >= 239 - 16
    assert plans["base"].starts[0] == 0


def test_the_order_of_arrival_outlives_a_loss():
    scheduler = Scheduler(max_num_seqs=1, max_num_batched_tokens=512)
    many = [sequence(id, [id + 1], new=1) for id in range(3)]
    many.insert(1, sequence(9, [40], new=1, fusion=LARGE_ALONE))
    for each in many:
        scheduler.add(each)
    scheduler.lose("base")
    (alone,) = scheduler.plan().ready
    assert alone.request.id == 9
    scheduler.recover("base")
    scheduler.remove(alone)
    order = []
    while scheduler.has_work:
        (ready,) = scheduler.plan().ready
        order.append(ready.request.id)
        scheduler.remove(ready)
    assert order == [0, 1, 2]


def test_a_step_costs_the_same_however_many_are_queued(folder):
    """The ratio of the medians, in one run: with 20,000 waiting and with none."""
    with LocalEngine(family_of(folder, experts=EXPERTS[:1], max_num_seqs=4)) as engine:
        coordinator = engine.coordinator
        fusion = engine._requests([5], SamplingParams(), {})[0].fusion
        sampling = SamplingParams(max_tokens=200, ignore_eos=True)

        def add(id):
            coordinator.add(Request(id=id, prompt=(5, 6, 7), sampling=sampling, fusion=fusion))

        def seconds():
            began = time.perf_counter()
            coordinator.step()
            return time.perf_counter() - began

        for id in range(4):
            add(id)
        coordinator.step()
        few = sorted(seconds() for _ in range(40))
        for id in range(4, 20_000):
            add(id)
        many = sorted(seconds() for _ in range(40))
        assert many[10] < 2 * few[10]
