"""Sampling against its definition: frequencies, filters, seeds, independence of rows."""

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from dlf_ray import SamplingParams
from dlf_ray.sampling import penalised, sample, top_logprobs, uniform

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -5.0])


def counts(params, draws=4000):
    """Frequencies of each token over evenly spread draws: exact up to 1/draws, no randomness."""
    grid = [(i + 0.5) / draws for i in range(draws)]
    tokens = sample(LOGITS.expand(draws, -1), [params] * draws, grid)
    return np.bincount(tokens, minlength=len(LOGITS)) / draws


def test_greedy_is_the_argmax():
    assert sample(LOGITS[None], [SamplingParams()], [0.99]) == [0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_the_softmax(temperature):
    expected = torch.softmax(LOGITS.double() / temperature, -1).numpy()
    np.testing.assert_allclose(counts(SamplingParams(temperature=temperature)), expected, atol=1e-3)


def test_top_k_keeps_k_tokens():
    kept = torch.softmax(LOGITS[:2].double(), -1).numpy()
    expected = [*kept, 0, 0, 0]
    np.testing.assert_allclose(counts(SamplingParams(temperature=1, top_k=2)), expected, atol=1e-3)


def test_top_p_keeps_the_smallest_set_of_that_mass():
    probs = torch.softmax(LOGITS.double(), -1).numpy()
    assert probs[0] < 0.7 < probs[:2].sum()
    expected = [*(probs[:2] / probs[:2].sum()), 0, 0, 0]
    np.testing.assert_allclose(
        counts(SamplingParams(temperature=1, top_p=0.7)), expected, atol=1e-3
    )


def test_a_tiny_top_p_still_leaves_one_token():
    assert counts(SamplingParams(temperature=1, top_p=1e-9))[0] == 1


def test_the_last_draw_never_takes_a_token_that_was_cut():
    almost_one = float(np.nextafter(1.0, 0.0))
    params = SamplingParams(temperature=1, top_k=3)
    assert sample(LOGITS[None], [params], [almost_one]) == [2]


@pytest.mark.parametrize("min_p", [0.01, 0.2, 0.5, 1.0])
def test_min_p_keeps_what_hugging_face_keeps(min_p):
    kept = MinPLogitsWarper(min_p)(None, LOGITS[None] / 2)[0]
    expected = torch.softmax(kept.double(), -1).numpy()
    got = counts(SamplingParams(temperature=2, min_p=min_p))
    np.testing.assert_allclose(got, expected, atol=1e-3)


def penalised_row(prompt=(), answer=(), ends=(), **params):
    return penalised(LOGITS[None], [SamplingParams(**params)], [prompt], [answer], ends)[0]


def test_the_repetition_penalty_is_hugging_faces():
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[0, 3, 4, 4]]), LOGITS[None])[0]
    assert penalised_row([0, 4], [3, 4], repetition_penalty=1.7).tolist() == expected.tolist()


def test_presence_and_frequency_penalties_count_the_answer_only():
    # OpenAI's definition: logit - count * frequency - (count > 0) * presence.
    got = penalised_row([0, 1], [3, 3, 4], presence_penalty=0.5, frequency_penalty=0.25)
    assert got.tolist() == [2.0, 1.0, 0.0, -2.0, -5.75]


def test_biases_are_added():
    assert penalised_row(logit_bias={1: 3.0, 4: -1.5}).tolist() == [2.0, 4.0, 0.0, -1.0, -6.5]


def test_nothing_ends_an_answer_that_is_too_short():
    inf = float("inf")
    how = {"min_tokens": 2, "stop_token_ids": (4,)}
    assert penalised_row(answer=[1], ends=[0], **how).tolist() == [-inf, 1.0, 0.0, -1.0, -inf]
    assert penalised_row(answer=[1, 1], ends=[0], **how).tolist() == LOGITS.tolist()


def test_rows_without_penalties_are_left_alone():
    logits = LOGITS.expand(2, -1)
    plain, penal = SamplingParams(), SamplingParams(logit_bias={4: 50.0})
    assert penalised(logits, [plain] * 2, [(), ()], [[], []], []) is logits
    got = penalised(logits, [plain, penal], [(), ()], [[], []], [])
    assert got[0].tolist() == LOGITS.tolist()
    assert sample(got, [plain, penal], [0.0, 0.0]) == [0, 4]


def test_top_logprobs_are_the_highest_of_each_row():
    logprobs = torch.stack([LOGITS, LOGITS.flip(0)]).log_softmax(-1)
    one, two = top_logprobs(logprobs, [0, 2])
    assert one == []
    assert two == [(4, float(logprobs[1, 4])), (3, float(logprobs[1, 3]))]
    assert [token for token, _ in top_logprobs(logprobs, [9, 1])[0]] == [0, 1, 2, 3, 4]


def test_the_coldest_temperatures_are_greedy():
    for temperature in (1e-5, 1e-30, 5e-324):
        params = SamplingParams(temperature=temperature, min_p=0.1, top_p=0.9)
        assert sample(LOGITS[None], [params], [0.999]) == [0]


def test_rows_go_by_their_own_parameters():
    params = [SamplingParams(), SamplingParams(temperature=5), SamplingParams(top_k=2)]
    draws = [0.999, 0.999, 0.999]
    together = sample(LOGITS.expand(3, -1), params, draws)
    alone = [sample(LOGITS[None], [p], [d])[0] for p, d in zip(params, draws, strict=True)]
    assert together == alone == [0, 4, 0]


def test_draws_depend_on_seed_and_position_only():
    assert uniform(7, 3) == uniform(7, 3)
    values = {uniform(seed, position) for seed in range(30) for position in range(30)}
    assert len(values) == 900
    assert all(0 <= value < 1 for value in values)
    assert abs(np.mean(list(values)) - 0.5) < 0.03
    assert 0 <= uniform(2**64 - 1, 10) < 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": -1},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"seed": -1},
        {"stop": "end"},
        {"stop": ("",)},
        {"min_tokens": 17},
        {"min_p": 1.1},
        {"presence_penalty": 2.5},
        {"frequency_penalty": float("nan")},
        {"repetition_penalty": 0.0},
        {"logit_bias": {3: 101.0}},
        {"logprobs": 21},
        {"prompt_logprobs": -1},
    ],
)
def test_absurd_parameters_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
        SamplingParams(**wrong)
