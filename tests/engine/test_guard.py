"""A request can hurt nobody else: whatever its numbers, its neighbours answer as if alone."""

import numpy as np
import pytest
import torch
from conftest import EXPERTS, family_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlf_ray import LocalEngine, SamplingParams
from dlf_ray.decoding import coordinator, groups
from dlf_ray.models.worker import ModelWorker
from dlf_ray.params import MAX_CANDIDATES, MAX_STOP_LENGTH
from dlf_ray.plans import Logits
from dlf_ray.rules import RULES

INNOCENT = [5, 6, 7, 8]
SAMPLING = SamplingParams(max_tokens=12, temperature=0.7, seed=3, logprobs=2)


@pytest.fixture(scope="module")
def engine(folder):
    with LocalEngine(family_of(folder)) as made:
        yield made


@pytest.fixture(scope="module")
def expected(engine):
    return engine.generate(INNOCENT, SAMPLING)[0]


def beside(engine, odd, sampling=None, prompt=(9, 9, 2), **innocent):
    """What an innocent stream answers while an odd request is served, and that one's output."""
    stream = engine.stream(INNOCENT, SAMPLING, **innocent)
    pieces = [next(stream), next(stream)]
    try:
        (output,) = engine.generate(list(prompt), sampling, **odd)
    except ValueError:  # refused before anything is computed
        output = None
    pieces += list(stream)
    engine.coordinator.scheduler.slots.check_integrity()
    assert not engine.coordinator.has_work
    return [token for piece in pieces for token in piece.token_ids], output


SIZES = st.sampled_from(
    [-1e308, -1e38, -1e6, -100.0, -1.0, -1e-9, 0.0, 1e-9, 0.3, 2.0, 100.0, 1e38]
)
FUSIONS = st.fixed_dictionaries(
    {},
    optional={
        "rule": st.sampled_from(list(RULES)),
        "select": st.sampled_from(["paper", "strongest", "blend"]),
        "step": st.sampled_from([1e-300, 1e-9, 0.001, 0.01, 0.1, 0.7, 2.0, 100.0]),
        "experts": st.sampled_from([[], ["math"], ["facts", "math"], list(EXPERTS)]),
        "weights": st.dictionaries(st.sampled_from(EXPERTS), SIZES),
        "bounds": st.dictionaries(st.sampled_from(EXPERTS), st.tuples(SIZES, SIZES)),
    },
)
SAMPLINGS = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 6)},
    optional={
        "temperature": st.sampled_from([0.0, 1e-300, 1e-5, 1.0, 100.0, 1e300]),
        "top_p": st.sampled_from([1e-300, 1e-9, 0.5, 1.0]),
        "top_k": st.sampled_from([0, 1, 5, 2**62]),
        "min_p": st.sampled_from([0.0, 1e-300, 0.5, 1.0]),
        "presence_penalty": st.sampled_from([-2.0, 2.0]),
        "frequency_penalty": st.sampled_from([-2.0, 2.0]),
        "repetition_penalty": st.sampled_from([0.01, 100.0]),
        "logit_bias": st.dictionaries(
            st.integers(0, 299), st.sampled_from([-100.0, 100.0]), max_size=300
        ),
        "seed": st.sampled_from([0, 2**64 - 1]),
        "min_tokens": st.integers(0, 6),
        "stop": st.lists(st.text("abc. ", min_size=1, max_size=20), max_size=64).map(tuple),
        "stop_token_ids": st.lists(st.integers(0, 299), max_size=300).map(tuple),
        "logprobs": st.integers(0, 20),
        "prompt_logprobs": st.integers(0, 20),
        "ignore_eos": st.booleans(),
    },
)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(fusion=FUSIONS, sampling=SAMPLINGS)
def test_odd_numbers_change_no_neighbour(engine, expected, fusion, sampling):
    try:
        params = SamplingParams(**sampling)
    except ValueError:
        params = None
    tokens, output = beside(engine, fusion, params)
    assert tokens == expected.token_ids
    # Refused, answered, or failed by itself with a sentence.
    assert output is None or output.error is None or "finite" in output.error


@pytest.mark.parametrize(
    ("fusion", "what"),
    [
        ({"bounds": {"math": (-1e308, 1e308)}}, "bounds"),
        ({"bounds": {"math": (0, 1e12)}}, "bounds"),
        ({"step": 1e-9}, "candidates"),
        ({"step": 2 / MAX_CANDIDATES, "experts": ["math"]}, "candidates"),
        ({"step": 0.02}, "candidates"),
        ({"rule": "static", "weights": {"math": 1e38}}, "weights"),
        ({"rule": "static", "weights": {"math": float("nan")}}, "weights"),
    ],
    ids=str,
)
def test_numbers_without_limit_are_refused_by_name(engine, fusion, what):
    with pytest.raises(ValueError, match=what):
        engine.generate([5], **fusion)


def test_the_largest_search_is_served(engine):
    for fusion in (
        {"step": 2 / (MAX_CANDIDATES - 1), "experts": ["math"]},
        {"bounds": {"math": (-100, 100)}, "step": 1.0, "experts": ["math"]},
        {"rule": "static", "weights": {"math": 100, "facts": -100}},
    ):
        assert engine.generate([5], **fusion)[0].error is None


@pytest.mark.parametrize(
    "listed",
    [
        {"stop": ("x",) * 65},
        {"stop": ("x" * (MAX_STOP_LENGTH + 1),)},
        {"stop_token_ids": (1,) * 1025},
        {"logit_bias": dict.fromkeys(range(1025), 0.0)},
    ],
    ids=lambda listed: next(iter(listed)),
)
def test_lists_without_limit_are_refused_by_name(listed):
    with pytest.raises(ValueError, match=next(iter(listed))):
        SamplingParams(**listed)


@pytest.mark.parametrize("stage", ["weigh", "sample", "aim"])
def test_an_exception_in_a_step_fails_its_group_and_nobody_else(
    engine, expected, monkeypatch, stage
):
    home = coordinator if stage == "sample" else groups
    whole = getattr(home, stage)

    def raising(*args, **kwargs):
        if (args[1] if stage == "sample" else kwargs).__repr__().find("static") >= 0 or (
            stage == "sample" and args[1][0].top_k == 7
        ):
            raise RuntimeError("something that nobody had thought of")
        return whole(*args, **kwargs)

    monkeypatch.setattr(home, stage, raising)
    sampling = SamplingParams(max_tokens=4, temperature=1.0, top_k=7)
    tokens, output = beside(engine, {"rule": "static"}, sampling)
    assert tokens == expected.token_ids
    assert "RuntimeError: something that nobody had thought of" in output.error


def test_rows_that_overflow_fail_alone(folder, engine, expected):
    class Huge(ModelWorker):
        """Its logits are finite, but nothing can be added to them."""

        def compute(self, plan):
            answer = super().compute(plan)
            if "large" in self.spec.model and 299 in plan.tokens:
                values = torch.full_like(answer.values, 3e38)
                values[:, 0] = -3e38
                owners = plan.slots.repeat(plan.wants)
                marked = plan.slots[[299 in part for part in self.parts(plan)]]
                keep = torch.tensor([slot not in marked for slot in owners])
                values = torch.where(keep[:, None], answer.values, values)
                return Logits(plan.step, values, answer.finite, answer.seconds, answer.began)
            return answer

        @staticmethod
        def parts(plan):
            ends = plan.lengths.cumsum()
            return [plan.tokens[end - n : end] for n, end in zip(plan.lengths, ends, strict=True)]

    with LocalEngine(family_of(folder), worker=Huge) as huge:
        tokens, output = beside(
            huge, {"rule": "static", "weights": {"math": 100.0}}, prompt=[4, 299]
        )
        assert tokens == expected.token_ids
        assert output.error is None or "not finite" in output.error


def test_what_differs_in_numbers_only_shares_a_pass(engine, expected, monkeypatch):
    """Steps, bounds and weights are each row's own; the answers are as alone."""
    kinds = [
        {},
        {"step": 0.25},
        {"bounds": {"math": (0.5, 1.0)}},
        {"bounds": {"facts": (-1.0, 0.7)}, "step": 0.03},
    ]
    sampling = SamplingParams(max_tokens=6)
    alone = [engine.generate(INNOCENT, sampling, **kind)[0] for kind in kinds]
    passes = []
    whole = groups.weigh
    monkeypatch.setattr(groups, "weigh", lambda *a, **k: passes.append(1) or whole(*a, **k))
    streams = [engine._requests([INNOCENT], sampling, kind)[0] for kind in kinds]
    tokens = {request.id: [] for request in streams}
    weights = {request.id: [] for request in streams}
    for request in streams:
        engine.coordinator.add(request)
    steps = engine.timings().steps
    while engine.coordinator.has_work:
        for _, chunk in engine.coordinator.step():
            tokens[chunk.id] += chunk.token_ids
            weights[chunk.id] += chunk.weights
    assert list(tokens.values()) == [each.token_ids for each in alone]
    for one, other in zip(weights.values(), alone, strict=True):
        np.testing.assert_allclose(one, [list(row.values()) for row in other.weights], atol=1e-5)
    assert len(passes) == engine.timings().steps - steps


@pytest.mark.parametrize("stage", ["weigh", "aim"])
def test_rows_are_fused_in_parts_where_memory_is_short(engine, expected, monkeypatch, stage):
    whole = getattr(groups, stage)

    def small(logits, *args, **kwargs):
        if len(logits) > 1:
            raise torch.OutOfMemoryError("no room for so many rows")
        return whole(logits, *args, **kwargs)

    prompts = [INNOCENT, [3], [9, 1], [4, 4, 4]]
    plain = engine.generate(prompts, SamplingParams(max_tokens=5))
    monkeypatch.setattr(groups, stage, small)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=5))
    assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]
    assert [output.error for output in outputs] == [None] * 4


def test_an_error_that_leaves_the_process_of_no_use_is_nobodys_alone(folder, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with LocalEngine(family_of(folder)) as broken_engine:
        monkeypatch.setattr(groups, "weigh", broken)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            broken_engine.generate([5])
