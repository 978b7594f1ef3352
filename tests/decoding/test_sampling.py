"""Sampling against its definition: frequencies, filters, seeds, independence of rows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from dlf_ray import SamplingParams
from dlf_ray.decoding import sampling
from dlf_ray.decoding.sampling import (
    Penalties,
    noise,
    noise_key,
    penalised,
    sample,
    top_logprobs,
)

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -5.0])


def keys_of(count, seed=0):
    """Noise keys as they are drawn for positions, but at once."""
    draw = np.random.default_rng(seed)
    return draw.integers(-(2**63), 2**63, size=count, dtype=np.int64).tolist()


def counts(params, draws=40_000):
    """Frequencies of each token, whose standard error is at most 0.0025."""
    tokens = sample(LOGITS.expand(draws, -1), [params] * draws, keys_of(draws))
    return np.bincount(tokens, minlength=len(LOGITS)) / draws


def test_greedy_is_the_argmax():
    assert sample(LOGITS[None], [SamplingParams()], [5]) == [0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_the_softmax(temperature):
    expected = torch.softmax(LOGITS.double() / temperature, -1).numpy()
    np.testing.assert_allclose(counts(SamplingParams(temperature=temperature)), expected, atol=0.01)


def test_top_k_keeps_k_tokens():
    kept = torch.softmax(LOGITS[:2].double(), -1).numpy()
    expected = [*kept, 0, 0, 0]
    np.testing.assert_allclose(counts(SamplingParams(temperature=1, top_k=2)), expected, atol=0.01)


def test_top_p_keeps_the_smallest_set_of_that_mass():
    probs = torch.softmax(LOGITS.double(), -1).numpy()
    assert probs[0] < 0.7 < probs[:2].sum()
    expected = [*(probs[:2] / probs[:2].sum()), 0, 0, 0]
    np.testing.assert_allclose(
        counts(SamplingParams(temperature=1, top_p=0.7)), expected, atol=0.01
    )


def test_a_tiny_top_p_still_leaves_one_token():
    assert counts(SamplingParams(temperature=1, top_p=1e-9))[0] == 1


@pytest.mark.parametrize("min_p", [0.01, 0.2, 0.5, 1.0])
def test_min_p_keeps_what_hugging_face_keeps(min_p):
    kept = MinPLogitsWarper(min_p)(None, LOGITS[None] / 2)[0]
    expected = torch.softmax(kept.double(), -1).numpy()
    got = counts(SamplingParams(temperature=2, min_p=min_p))
    np.testing.assert_allclose(got, expected, atol=0.01)


def penalties_of(prompt=(), answer=(), ends=(), **params):
    penalties = Penalties.of(SamplingParams(**params), prompt, ends, len(LOGITS))
    for token in answer:
        penalties.push(token)
    return penalties


def penalised_row(prompt=(), answer=(), ends=(), **params):
    return penalised(LOGITS[None], [penalties_of(prompt, answer, ends, **params)])[0]


def test_the_repetition_penalty_is_hugging_faces():
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[0, 3, 4, 4]]), LOGITS[None])[0]
    assert penalised_row([0, 4], [3, 4], repetition_penalty=1.7).tolist() == expected.tolist()


def test_presence_and_frequency_penalties_count_the_answer_only():
    # OpenAI's definition: logit - count * frequency - (count > 0) * presence.
    got = penalised_row([0, 1], [3, 3, 4], presence_penalty=0.5, frequency_penalty=0.25)
    assert got.tolist() == [2.0, 1.0, 0.0, -2.0, -5.75]


def test_biases_are_added():
    assert penalised_row(logit_bias={1: 3.0, 4: -1.5}).tolist() == [2.0, 4.0, 0.0, -1.0, -6.5]


def test_biases_come_before_penalties():
    # vLLM: the bias is of the model's logits, what it lifts above 0 is divided
    assert penalised_row([0], logit_bias={0: 3.0}, repetition_penalty=2.0)[0] == 2.5
    assert penalised_row([0], logit_bias={0: -3.0}, repetition_penalty=2.0)[0] == -2.0


def vllm(logits, prompt, answer, ends, params):
    """vLLM's logits processors and penalties, as its documentation and samplers define them."""
    logits = [float(x) for x in logits]
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if len(answer) < params.min_tokens:
        for token in {*(() if params.ignore_eos else ends), *params.stop_token_ids}:
            logits[token] = -math.inf
    for token in {*prompt, *answer}:
        factor = params.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(answer):
        logits[token] -= params.frequency_penalty * answer.count(token)
        logits[token] -= params.presence_penalty
    return logits


some = st.lists(st.integers(0, 4), max_size=12)


@settings(deadline=None, derandomize=True)
@given(
    params=st.builds(
        SamplingParams,
        max_tokens=st.just(16),
        min_tokens=st.integers(0, 4),
        presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
        frequency_penalty=st.sampled_from([0.0, 0.25, -1.0]),
        repetition_penalty=st.sampled_from([1.0, 2.0, 0.5]),
        logit_bias=st.dictionaries(st.integers(0, 4), st.sampled_from([-8.0, 0.5, 3.0])),
        stop_token_ids=st.sampled_from([(), (2,), (0, 4)]),
        ignore_eos=st.booleans(),
    ),
    prompt=some,
    answer=some,
    ends=st.sampled_from([[], [3], [0, 1]]),
)
def test_penalties_are_vllms_at_every_token(params, prompt, answer, ends):
    kept = Penalties.of(params, prompt, ends, len(LOGITS))
    for length in range(len(answer) + 1):
        expected = vllm(LOGITS, prompt, answer[:length], ends, params)
        got = penalised(LOGITS[None], [kept])[0]
        assert got.tolist() == pytest.approx(expected)
        if kept is None:
            assert got.tolist() == LOGITS.tolist()
        elif length < len(answer):
            kept.push(answer[length])


class Made(TorchDispatchMode):
    """Counts what is made and moved."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.elements += out.numel()
        return out


def test_a_token_costs_the_same_after_a_long_prompt():
    """But for the logits of the distinct tokens seen, of which both prompts have as many."""
    logits = torch.zeros(1, 64)
    cost = {}
    for length in 64, 6400:
        how = {"repetition_penalty": 1.3, "presence_penalty": 0.1, "max_tokens": 99}
        kept = Penalties.of(SamplingParams(**how), [*range(64)] * (length // 64), [], 64)
        penalised(logits, [kept])
        with Made() as made:
            for token in range(40):
                kept.push(token)
                penalised(logits, [kept])
        cost[length] = made.elements
    assert cost[6400] == cost[64] < 40 * 64 * 12


def test_nothing_ends_an_answer_that_is_too_short():
    inf = float("inf")
    how = {"min_tokens": 2, "stop_token_ids": (4,)}
    assert penalised_row(answer=[1], ends=[0], **how).tolist() == [-inf, 1.0, 0.0, -1.0, -inf]
    assert penalised_row(answer=[1, 1], ends=[0], **how).tolist() == LOGITS.tolist()


def test_rows_without_penalties_are_left_alone():
    logits = LOGITS.expand(2, -1)
    plain, penal = SamplingParams(), SamplingParams(logit_bias={4: 50.0})
    assert Penalties.of(plain, [1, 2], [0], len(LOGITS)) is None
    assert penalised(logits, [None, None]) is logits
    over = penalties_of(answer=[1], ends=[0], min_tokens=1)
    assert penalised(logits, [None, over]) is logits
    got = penalised(logits, [None, penalties_of(logit_bias={4: 50.0})])
    assert got[0].tolist() == LOGITS.tolist()
    assert logits[1].tolist() == LOGITS.tolist()
    assert sample(got, [plain, penal], [0, 0]) == [0, 4]


def test_top_logprobs_are_the_highest_of_each_row():
    logprobs = torch.stack([LOGITS, LOGITS.flip(0)]).log_softmax(-1)
    one, two = top_logprobs(logprobs, [0, 2])
    assert one == []
    assert two == [(4, float(logprobs[1, 4])), (3, float(logprobs[1, 3]))]
    assert [token for token, _ in top_logprobs(logprobs, [9, 1])[0]] == [0, 1, 2, 3, 4]


def test_the_coldest_temperatures_are_greedy():
    for temperature in (1e-5, 1e-30, 5e-324):
        params = SamplingParams(temperature=temperature, min_p=0.1, top_p=0.9)
        assert sample(LOGITS.expand(9, -1), [params] * 9, keys_of(9)) == [0] * 9


def definition(logits, params):
    """The probability of each token: temperature, min-p, top-k, top-p, by the book."""
    probs = torch.softmax(logits.double() / params.temperature, -1).tolist()
    order = sorted(range(len(probs)), key=lambda token: (-logits[token], token))
    kept = [token for token in order if probs[token] >= params.min_p * probs[order[0]]]
    kept = kept[: params.top_k or len(kept)]
    total, before, nucleus = sum(probs[token] for token in kept), 0.0, []
    for token in kept:
        if nucleus and before >= params.top_p * total:
            break
        nucleus.append(token)
        before += probs[token]
    total = sum(probs[token] for token in nucleus)
    return [probs[token] / total if token in nucleus else 0.0 for token in range(len(probs))]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    seed=st.integers(0, 99),
    vocab=st.sampled_from([5, 40, 90]),
    step=st.sampled_from([1.0, 1e-3]),  # with and without equal logits
    candidates=st.sampled_from([4, 16, 1024]),
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.3, 1.0, 4.0]),
        top_k=st.sampled_from([0, 1, 3, 15, 30]),
        top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
        min_p=st.sampled_from([0.0, 0.05, 0.5]),
    ),
)
def test_every_way_draws_from_the_defined_distribution(seed, vocab, step, candidates, params):
    """Of the defined distribution, the token with the highest probability over its noise."""
    draw = torch.Generator().manual_seed(seed)
    logits = (torch.randn(vocab, generator=draw) * 3 / step).round() * step
    keys = keys_of(200, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "CANDIDATES", candidates)
        tokens = sample(logits.expand(200, -1), [params] * 200, keys)
    own = noise(torch.tensor(keys)[:, None], torch.arange(vocab))
    defined = torch.tensor(definition(logits, params), dtype=torch.float64)
    assert tokens == (defined / own).argmax(-1).tolist()


def test_nothing_is_sorted_without_a_filter(monkeypatch):
    asked = []
    highest = sampling._highest
    monkeypatch.setattr(
        sampling, "_highest", lambda x, size: asked.append((len(x), size)) or highest(x, size)
    )
    flat, steep = torch.zeros(1, 5000), 0.01 * torch.arange(5000.0)[None]
    hot = {"temperature": 1.0}
    for logits, how, expected in (
        (flat, {}, []),
        (flat, {"top_k": 5000}, []),
        (flat, {"top_k": 1024}, [(1, 1024)]),
        (flat, {"top_k": 1025}, [(1, 1024), (1, 5000)]),
        (steep, {"top_p": 0.9}, [(1, 1024)]),
        (flat, {"top_p": 0.9}, [(1, 1024), (1, 5000)]),
        (steep, {"min_p": 0.1}, [(1, 1024)]),
    ):
        asked.clear()
        sample(logits, [SamplingParams(**hot, **how)], [5])
        assert asked == expected


def test_rows_draw_the_same_whatever_else_is_in_the_batch():
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(8, 3000, generator=draw)
    logits[5] = 0.0
    params = [
        SamplingParams(temperature=t, **how)
        for t in (1.0, 0.0)
        for how in ({}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.7}, {"min_p": 0.01})
    ]
    params[5] = SamplingParams(temperature=1.0, top_p=0.9)
    keys = keys_of(8)
    together = sample(logits, params, keys)
    assert together == [
        sample(logits[row : row + 1], params[row : row + 1], keys[row : row + 1])[0]
        for row in range(8)
    ]


@pytest.mark.parametrize("how", [{}, {"top_p": 0.95}, {"top_k": 50}, {"min_p": 0.001}], ids=str)
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_the_last_digits_of_logits_change_no_draw(temperature, how):
    """They differ between batches; many tokens of nearly equal probability, in no order."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(1000, 1500, generator=draw)
    other = logits + 1e-5 * torch.randn(1000, 1500, generator=draw)
    params = [SamplingParams(temperature=temperature, **how)] * 1000
    pairs = zip(*(sample(each, params, keys_of(1000)) for each in (logits, other)), strict=True)
    assert sum(one != two for one, two in pairs) <= 1  # 0.02 are to be expected


def test_rows_go_by_their_own_parameters():
    params = [SamplingParams(), SamplingParams(temperature=5), SamplingParams(top_k=2)]
    keys = [key for key in keys_of(99) if sample(LOGITS[None], params[1:2], [key]) == [4]][:1] * 3
    together = sample(LOGITS.expand(3, -1), params, keys)
    alone = [sample(LOGITS[None], [p], [key])[0] for p, key in zip(params, keys, strict=True)]
    assert together == alone == [0, 4, 0]


def test_noise_is_of_seed_and_position_and_token():
    assert noise_key(7, 3) == noise_key(7, 3)
    keys = [noise_key(seed, position) for seed in range(30) for position in range(30)]
    keys += [noise_key(2**64 - 1, 10)]
    assert len(set(keys)) == 901
    values = noise(torch.tensor(keys)[:, None], torch.arange(500))
    assert values.isfinite().all()
    assert (values > 0).all()
    assert values.unique().numel() == values.numel()
    # exponential: P(X > x) is e^-x
    for x in (0.01, 0.5, 1.0, 3.0):
        assert abs((values > x).double().mean() - math.exp(-x)) < 0.003
    # and independent, of neighbours in seed, in position and in token
    grid = values[:900].view(30, 30, 500)
    for a, b in (
        (grid[1:], grid[:-1]),
        (grid[:, 1:], grid[:, :-1]),
        (grid[..., 1:], grid[..., :-1]),
    ):
        assert abs(float(((a - 1) * (b - 1)).mean())) < 0.006
    some = torch.tensor([[499, 3]] * 901)
    assert noise(torch.tensor(keys)[:, None], some).equal(values[:, [499, 3]])


def test_noise_is_made_by_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # of 1234567
    expected = [-math.log(((number >> 12) + 0.5) / 2**52) for number in published]
    got = noise(torch.tensor([[1234567]]), torch.arange(3))[0].tolist()
    np.testing.assert_allclose(got, expected, rtol=1e-14)


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
