"""Losses of models in the coordinator and the scheduler, at any moment, without any process."""

import pytest
import torch
from conftest import EXPERTS, family_of, params_of, prompts_of
from parts import Flaky, flaky

from dlf_ray import LocalEngine, SamplingParams
from dlf_ray.decoding.losses import IN_A_ROW
from dlf_ray.engine.local import LocalFabric
from dlf_ray.models.worker import ModelWorker


@pytest.mark.parametrize("chunk", [24, 4096], ids=["chunked", "whole"])
def test_losses_change_no_answer(folder, chunk):
    prompts = prompts_of(12, seed=3)
    prompts += [[*prompts[0], *range(40, 70), n] for n in range(6)]  # some begin alike
    params = [*params_of(12), *[SamplingParams(max_tokens=6, temperature=1.0, seed=9)] * 6]
    own = {"large": prompts[1], "base": prompts[2]}
    asked = SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=1)
    with LocalEngine(family_of(folder, max_num_batched_tokens=chunk)) as engine:
        fabric = flaky(engine, chance=0.0)

        def everything():
            outputs = engine.generate(prompts, params) + engine.generate(own, params[0])
            outputs += engine.generate(prompts[:4], asked, experts=["facts"])
            outputs += engine.generate(prompts[:2], alone="math")
            return outputs + engine.score(prompts[:6], [[*p[:9], 1] for p in prompts[:6]])

        expected = everything()
        fabric.chance = 0.03
        for one, other in zip(everything(), expected, strict=True):
            assert (one.error, one.text, one.token_ids) == (None, other.text, other.token_ids)
            assert one.lost == []
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
            assert one.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=1e-3)
        assert fabric.losses > 10
        recoveries = engine.coordinator.timings.recoveries
        assert {each.model for each in recoveries} == set(engine.family.models)
        assert all(each.reason == "died" and each.seconds > 0 for each in recoveries)


def test_an_expert_that_is_dropped_comes_back_into_the_fusion(folder, oracle):
    """Its weight is 0 while it is away, the others' are as if there were no other."""
    (prompt,) = prompts_of(1, longest=50, seed=4)
    sampling = SamplingParams(max_tokens=24, ignore_eos=True)
    with LocalEngine(family_of(folder, on_expert_loss="drop")) as engine:
        fabric = flaky(engine, chance=0.0)
        tokens, lost = [], []
        for piece in engine.stream(prompt, sampling, select="strongest", experts=EXPERTS):
            tokens += piece.token_ids
            lost.append(tuple(piece.lost))
            oracle.check(
                [*prompt, *tokens[:-1]],
                piece,
                tuple(name for name in EXPERTS if name not in piece.lost),
                select="strongest",
            )
            assert set(piece.weights[0]) == set(EXPERTS)
            assert all(piece.weights[0][name] == 0 for name in piece.lost)
            if len(tokens) == 6:
                changes = [fabric.lose(name) for name in EXPERTS]
                fabric.away = {"math": 2, "facts": 6, "prose": 6}
                engine.coordinator._change(*changes[0])
                engine.coordinator._change(*changes[1])
                engine.coordinator._change(*changes[2])
    assert lost[:6] == [()] * 6
    assert lost[6] == EXPERTS  # the large model alone
    assert ("facts", "prose") in lost
    assert lost[-5:] == [()] * 5


def test_who_asks_for_a_dropped_expert_alone_waits_for_it(folder):
    with LocalEngine(family_of(folder, on_expert_loss="drop")) as engine:
        (expected,) = engine.generate([5, 6], alone="math")
        fabric = flaky(engine, chance=0.0)
        engine.coordinator._change(*fabric.lose("math"))
        fabric.away["math"] = 5
        (output,) = engine.generate([5, 6], alone="math")
        assert output.token_ids == expected.token_ids
        assert engine.generate([5, 6])[0].lost == []


def test_a_request_that_kills_a_model_again_and_again_fails_alone(folder):
    """The others with it in the batch are found innocent."""

    class Killer(Flaky):
        def receive(self, plans):
            for name, answer in LocalFabric.receive(self, plans):
                killed = name == "facts" and 77 in plans[name].tokens
                yield self.lose(name) if killed else (name, answer)

    prompts = [[5, 6], [5, 77], [8], [9, 9], [3]]
    sampling = SamplingParams(max_tokens=5)
    with LocalEngine(family_of(folder)) as engine:
        expected = engine.generate(prompts, sampling, experts=["math"])
        expected = engine.generate([p for p in prompts if 77 not in p], sampling)
        engine.coordinator.fabric = Killer(engine.coordinator.fabric._workers, chance=0.0)
        first, bad, *rest = engine.generate(prompts, sampling)
        assert [o.token_ids for o in (first, *rest)] == [o.token_ids for o in expected]
        assert bad.finish_reason == "error"
        assert "model 'facts' was lost while it computed this request and no other" in bad.error
        assert IN_A_ROW <= engine.coordinator.fabric.losses < 4 * IN_A_ROW


class Small(ModelWorker):
    """An expert whose memory holds the cache of two sequences."""

    def compute(self, plan):
        if "facts" in self.spec.model:
            self.slots = getattr(self, "slots", set()) | set(plan.slots.tolist())
            if len(self.slots) > 2 or 0 in plan.tokens:
                self.slots = set()
                raise torch.OutOfMemoryError("no room for the cache")
        return super().compute(plan)


def test_sequences_that_find_no_memory_are_computed_later(folder):
    prompts = prompts_of(7, longest=30, seed=8)
    sampling = SamplingParams(max_tokens=6)
    family = family_of(folder, enable_prefix_caching=False)
    with LocalEngine(family) as engine, LocalEngine(family, worker=Small) as small:
        expected = engine.generate(prompts, sampling)
        outputs = small.generate(prompts, sampling)
        assert [o.error for o in outputs] == [None] * 7
        assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
        recoveries = small.coordinator.timings.recoveries
        assert {(r.model, r.reason) for r in recoveries} == {("facts", "out of memory")}
        # One that needs more than there is, alone, fails and says why; the next is served.
        (bad,) = small.generate([5, 0], sampling)
        assert "'facts'" in bad.error
        assert "no room for the cache" in bad.error
        assert small.generate(prompts[0], sampling)[0].token_ids == expected[0].token_ids


def test_a_cpu_says_in_words_that_memory_is_out(folder):
    class Greedy(ModelWorker):
        def compute(self, plan):
            torch.empty(10**15)

    with LocalEngine(family_of(folder, experts=("math",)), worker=Greedy) as engine:
        (output,) = engine.generate([5])
        assert "out of memory" in output.error
        assert "DefaultCPUAllocator" in output.error
