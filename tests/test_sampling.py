"""Sampling against its definition: frequencies, filters, seeds, independence of rows."""

import numpy as np
import pytest
import torch

from dlf_ray import SamplingParams
from dlf_ray.sampling import sample, uniform

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
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"seed": -1},
        {"stop": "end"},
        {"stop": ("",)},
    ],
)
def test_absurd_parameters_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
        SamplingParams(**wrong)
