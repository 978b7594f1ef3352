"""The engine over a real Ray cluster gives what the oracle and the local engine give."""

import asyncio
import queue

import msgspec
import pytest
from conftest import EXPERTS, family_of, params_of, prompts_of
from processes import PATIENCE_S

from dlf_ray import Engine, LocalEngine, SamplingParams

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def engine(ray_cluster, folder):
    """With a budget that some prompts fit into and others do not."""
    with Engine(family_of(folder, max_num_batched_tokens=128)) as made:
        yield made


@pytest.mark.parametrize("experts", [("math",), EXPERTS], ids=["one", "three"])
@pytest.mark.parametrize("count", [1, 7, 32])
def test_greedy_tokens_are_the_oracles(engine, oracle, count, experts):
    prompts = prompts_of(count)
    outputs = engine.generate(prompts, params_of(count), experts=experts)
    for prompt, output in zip(prompts, outputs, strict=True):
        oracle.check(prompt, output, experts)


def test_workers_on_the_coordinators_node_share_its_memory(engine):
    assert engine.shares_memory == dict.fromkeys(engine.family.models, True)


def test_it_gives_what_the_local_engine_gives(engine, folder):
    prompts = prompts_of(6, longest=50, seed=2)
    drawn = SamplingParams(max_tokens=8, temperature=0.7, top_p=0.9, seed=5)
    own = {"large": prompts[1], "base": prompts[0]}
    with LocalEngine(engine.family) as local:
        for prompt in (prompts, own):
            for options in ({}, {"select": "blend"}, {"rule": "static"}, {"alone": "facts"}):
                there = engine.generate(prompt, drawn, **options)
                here = local.generate(prompt, drawn, **options)
                assert [o.token_ids for o in there] == [o.token_ids for o in here]
                assert [o.text for o in there] == [o.text for o in here]


def test_streams_and_tasks_share_the_steps(engine):
    prompts = prompts_of(5, longest=30, seed=6)
    sampling = SamplingParams(max_tokens=8)
    expected = engine.generate(prompts, sampling)
    assert "".join(p.text for p in engine.stream(prompts[1], sampling)) == expected[1].text

    async def stream(prompt):
        return [
            token async for piece in engine.astream(prompt, sampling) for token in piece.token_ids
        ]

    async def main():
        whole = asyncio.gather(*(engine.agenerate(prompt, sampling) for prompt in prompts))
        pieces = asyncio.gather(*(stream(prompt) for prompt in prompts))
        return await asyncio.wait_for(whole, PATIENCE_S), await asyncio.wait_for(pieces, PATIENCE_S)

    whole, pieces = asyncio.run(main())
    assert [output.token_ids for output in whole] == [o.token_ids for o in expected]
    assert pieces == [output.token_ids for output in expected]


def test_a_cancelled_task_frees_its_slots(engine):
    """More endless requests than slots, all cancelled: the next one could never run otherwise."""
    endless = SamplingParams(max_tokens=10_000, ignore_eos=True)

    async def main():
        async def forever():
            async for _ in engine.astream([5], endless):
                started.set()

        started = asyncio.Event()
        tasks = [asyncio.create_task(forever()) for _ in range(12)]
        await asyncio.wait_for(started.wait(), PATIENCE_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        after = engine.agenerate([5], SamplingParams(max_tokens=2))
        return await asyncio.wait_for(after, PATIENCE_S)

    assert len(asyncio.run(main()).token_ids) == 2


def test_bad_requests_are_refused_before_they_travel(engine):
    with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
        engine.generate(["fine", ""])
    with pytest.raises(ValueError, match="max_model_len"):
        engine.generate([[5] * 300])
    with pytest.raises(ValueError, match="chemistry"):
        engine.generate("x", experts=["chemistry"])


def test_the_coordinator_checks_for_itself(engine):
    """A client that skips the checks gets the message, and the coordinator lives on."""
    (request,) = engine._requests(["x"], None, {})
    box = queue.SimpleQueue()
    broken = msgspec.structs.replace(request, prompt=(10**6,))
    with engine._open([broken], box.put):
        assert "outside the vocabulary" in box.get(timeout=PATIENCE_S).error
    (output,) = engine.generate("x", SamplingParams(max_tokens=1))
    assert (output.error, len(output.token_ids)) == (None, 1)


def test_timings_name_every_stage_and_model(engine):
    before = engine.timings()
    engine.generate([5], SamplingParams(max_tokens=4, ignore_eos=True))
    after = engine.timings()
    assert after.steps - before.steps >= 4
    for stage in ("plan", "wait", "aim", "weigh", "sample", "commit", "forward large"):
        assert after.seconds[stage] > before.seconds.get(stage, 0)
