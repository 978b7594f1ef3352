"""The engine in one process: agreement with the oracle, requests of all kinds, bad input."""

import json
import queue
import shutil

import numpy as np
import pytest
import reference
import torch
from conftest import EXPERTS, family_of, params_of, prompts_of

from dlf_ray import LocalEngine, SamplingParams
from dlf_ray.models.worker import ModelWorker
from dlf_ray.plans import Logits


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((24, 0), id="chunked"),
        pytest.param((4096, 0), id="whole"),
        pytest.param((24, 0.1), id="cuda-chunked", marks=pytest.mark.gpu),
        pytest.param((4096, 0.1), id="cuda-whole", marks=pytest.mark.gpu),
    ],
)
def engine(request, folder):
    budget, num_gpus = request.param
    family = family_of(folder, num_gpus=num_gpus, max_num_batched_tokens=budget)
    with LocalEngine(family) as made:
        yield made


@pytest.fixture(scope="module")
def plain(folder):
    with LocalEngine(family_of(folder)) as made:
        yield made


@pytest.mark.parametrize("experts", [("math",), EXPERTS], ids=["one", "three"])
@pytest.mark.parametrize("count", [1, 7, 32])
def test_greedy_tokens_are_the_oracles(engine, oracle, count, experts):
    prompts = prompts_of(count)
    outputs = engine.generate(prompts, params_of(count), experts=experts)
    for prompt, output in zip(prompts, outputs, strict=True):
        oracle.check(prompt, output, experts)


@pytest.mark.parametrize(
    "how",
    [
        {"select": "strongest"},
        {"select": "blend"},
        {"rule": "static"},
        {"rule": "static", "weights": {"math": 0.5, "prose": 0.0}},
        {"rule": "entropy"},
        {"rule": "consistency"},
        {"bounds": {"math": (0.5, 1.0)}},
        {"step": 0.25},
    ],
    ids=str,
)
def test_every_rule_is_the_oracles(plain, oracle, how):
    prompts = prompts_of(5, longest=40)
    outputs = plain.generate(prompts, SamplingParams(max_tokens=8), **how)
    if "weights" in how:
        how = {**how, "weights": [how["weights"].get(name, 1.0) for name in EXPERTS]}
    if "bounds" in how:
        how = {"bounds": [how["bounds"].get(name, (0.0, 2.0)) for name in EXPERTS]}
    for prompt, output in zip(prompts, outputs, strict=True):
        oracle.check(prompt, output, EXPERTS, **how)


def test_every_model_may_have_its_own_prompt(engine, oracle):
    long, short = prompts_of(2, longest=120, seed=5)[::-1]
    own = {"large": long, "base": short, "facts": long[:7]}
    (output,) = engine.generate(own, SamplingParams(max_tokens=10))
    oracle.check(long, output, EXPERTS, prompts=own)


@pytest.mark.parametrize("name", ["large", "base", "math"])
def test_a_model_alone_is_its_own_greedy_text(plain, oracle, name):
    prompt = prompts_of(2, longest=30)[1]
    options = {"experts": []} if name == "large" else {"alone": name}
    (output,) = plain.generate(prompt, SamplingParams(max_tokens=12), **options)
    logits = oracle.logits(name, prompt, output.token_ids)
    assert logits.argmax(-1).tolist() == output.token_ids
    assert all(not any(weights.values()) for weights in output.weights)


def test_what_is_in_the_batch_changes_nothing(engine):
    prompts, params = prompts_of(9, longest=60, seed=3), params_of(9, seed=4)
    drawn = [
        SamplingParams(max_tokens=p.max_tokens, temperature=0.8, seed=i) if i % 2 else p
        for i, p in enumerate(params)
    ]
    together = engine.generate(prompts, drawn)
    alone = [engine.generate(p, s)[0] for p, s in zip(prompts, drawn, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert one.token_ids == other.token_ids
        assert one.weights == other.weights
        assert one.text == other.text
        np.testing.assert_allclose(one.kl, other.kl, atol=1e-3)


def test_requests_of_different_kinds_share_a_batch(plain):
    """Rules, expert subsets and single models mixed in the same steps, against each by itself."""
    prompts = prompts_of(6, longest=20, seed=8)
    kinds = [{}, {"rule": "static"}, {"experts": ["prose"]}, {"alone": "base"}, {"experts": []}]
    sampling = SamplingParams(max_tokens=6)
    expected = [plain.generate(p, sampling, **k)[0] for p, k in zip(prompts, kinds, strict=False)]
    box = queue.SimpleQueue()
    requests = [plain._requests([p], sampling, k)[0] for p, k in zip(prompts, kinds, strict=False)]
    tokens = {request.id: [] for request in requests}
    with plain._open(requests, box.put):
        waiting = len(requests)
        while waiting:
            chunk = plain._wait(box)
            tokens[chunk.id] += chunk.token_ids
            waiting -= chunk.finish_reason is not None
    assert list(tokens.values()) == [output.token_ids for output in expected]


def test_shared_beginnings_change_nothing(engine, oracle):
    """Few-shot prompts: the examples are copied between slots, the answers are the oracle's."""
    examples = prompts_of(2, longest=120, seed=21)[1]
    prompts = [[*examples, *rest] for rest in prompts_of(12, longest=20, seed=22)]
    for _ in range(2):  # the second time everything is there already
        outputs = engine.generate(prompts, params_of(12))
        for prompt, output in zip(prompts, outputs, strict=True):
            oracle.check(prompt, output, EXPERTS)


def naive_logprobs(oracle, prompts, continuation, **how):
    """One position at a time, each fused by the reference."""
    names = list(prompts)
    every = [oracle.logits(name, prompts[name], continuation) for name in names]
    rows = []
    for at in range(len(continuation)):
        large, base, *rest = (each[at].double() for each in every)
        rows.append(reference.fuse(large, base, rest, **how).logprobs)
    return torch.stack(rows)


@pytest.mark.parametrize("how", [{}, {"select": "blend"}, {"rule": "static"}], ids=str)
def test_a_fused_likelihood_is_the_oracles(engine, oracle, how):
    """Long and short continuations, more rows than a step holds, among requests that generate."""
    prompts = prompts_of(6, longest=90, seed=11)
    rests = prompts_of(6, longest=40, seed=12)
    outputs = engine.score(prompts, rests, **how)
    for prompt, rest, output in zip(prompts, rests, outputs, strict=True):
        shared = dict.fromkeys(("large", "base", *EXPERTS), prompt)
        expected = naive_logprobs(oracle, shared, rest, **how)
        assert output.token_ids == rest
        chosen = expected[range(len(rest)), rest]
        np.testing.assert_allclose(output.logprobs, chosen, atol=1e-4, rtol=1e-4)
        assert output.greedy == (expected.argmax(-1) == torch.tensor(rest)).tolist()
        assert (output.text, len(output.weights)) == ("", len(rest))


def test_scoring_takes_a_prompt_per_model_too(engine, oracle):
    long, short, rest = [9] * 50, [5, 6], [7, 8, 9]
    own = {"large": long, "base": short, **dict.fromkeys(EXPERTS, short)}
    (output,) = engine.score([own], [rest])
    expected = naive_logprobs(oracle, own, rest)[range(3), rest]
    np.testing.assert_allclose(output.logprobs, expected, atol=1e-4, rtol=1e-4)


def test_what_was_generated_greedily_scores_as_greedy(plain):
    (made,) = plain.generate([5, 6], SamplingParams(max_tokens=20, ignore_eos=True))
    (scored,) = plain.score([[5, 6]], [made.token_ids])
    assert all(scored.greedy)
    (other,) = plain.score([[5, 6]], [[1 + made.token_ids[0] % 200, *made.token_ids[1:]]])
    assert not other.greedy[0]
    assert other.logprobs[0] < scored.logprobs[0]


def test_log_probabilities_of_prompt_and_answer_are_the_oracles(engine, oracle):
    """The prompt is scored and then goes on; among requests that ask for neither."""
    prompts = prompts_of(4, longest=70, seed=31)
    sampling = SamplingParams(max_tokens=5, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    plain = SamplingParams(max_tokens=5, ignore_eos=True)
    outputs = engine.generate(prompts * 2, [sampling] * 4 + [plain] * 4)
    for prompt, output, without in zip(prompts, outputs[:4], outputs[4:], strict=True):
        assert output.token_ids == without.token_ids
        assert (without.logprobs, without.top_logprobs, without.prompt_logprobs) == ([], [], [])
        known = [*prompt, *output.token_ids]
        shared = dict.fromkeys(("large", "base", *EXPERTS), known[:1])
        expected = naive_logprobs(oracle, shared, known[1:])
        chosen = expected[range(len(known) - 1), known[1:]]
        logprobs = [*output.prompt_logprobs, *output.logprobs]
        np.testing.assert_allclose(logprobs, chosen, atol=1e-4, rtol=1e-4)
        tops = [*output.prompt_top_logprobs, *output.top_logprobs]
        sizes = [2] * (len(prompt) - 1) + [3] * 5
        assert [len(top) for top in tops] == sizes
        for top, row, size in zip(tops, expected, sizes, strict=True):
            np.testing.assert_allclose(list(top.values()), row.topk(size).values, atol=1e-4)
        # The most probable token has one log-probability, to the last bit.
        assert [top[t] for top, t in zip(output.top_logprobs, output.token_ids, strict=True)] == (
            output.logprobs
        )
        assert len(output.weights) == len(output.pieces) == 5


def test_a_prompt_alone_can_be_scored(plain):
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=0)
    (output,) = plain.generate([[5, 6, 7]], sampling)
    (scored,) = plain.score([[5]], [[6, 7]])
    assert output.prompt_logprobs == scored.logprobs
    assert (output.token_ids, output.finish_reason) == ([], "length")
    with pytest.raises(ValueError, match="`max_tokens` must be at least 1 where"):
        plain.generate([[5]], sampling)
    with pytest.raises(ValueError, match="needs one prompt for all models"):
        plain.generate({"large": [5, 6], "base": [5]}, sampling)


def test_penalties_and_biases_reach_the_fused_distribution(plain):
    greedy = SamplingParams(max_tokens=8, ignore_eos=True)
    (free,) = plain.generate([5, 6], greedy)
    first = free.token_ids[0]
    barred = SamplingParams(max_tokens=8, logit_bias={first: -100.0}, ignore_eos=True)
    assert first not in plain.generate([5, 6], barred)[0].token_ids
    repeated = plain.generate([5, 6], SamplingParams(max_tokens=8, logit_bias={7: 100.0}))[0]
    assert repeated.token_ids == [7] * 8
    with pytest.raises(ValueError, match="`logit_bias` names token 300"):
        plain.generate([5], SamplingParams(logit_bias={300: 1.0}))


def test_nothing_ends_an_answer_before_its_minimum(plain):
    (free,) = plain.generate([5, 6], SamplingParams(max_tokens=12, ignore_eos=True))
    third = free.token_ids[2]
    early = SamplingParams(max_tokens=12, stop_token_ids=(third,), ignore_eos=True)
    (output,) = plain.generate([5, 6], early)
    assert (output.finish_reason, output.stop_reason) == ("stop", third)
    late = SamplingParams(max_tokens=12, stop_token_ids=(third,), ignore_eos=True, min_tokens=6)
    assert third not in plain.generate([5, 6], late)[0].token_ids[:5]
    stop = next(piece for piece in free.pieces if piece.strip())
    (output,) = plain.generate([5, 6], SamplingParams(max_tokens=12, stop=(stop,)))
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    (output,) = plain.generate([5, 6], SamplingParams(max_tokens=12, stop=(stop,), min_tokens=12))
    assert len(output.token_ids) == 12


def test_text_is_scored_where_prompt_and_continuation_meet(plain):
    whole = plain.tokenizer.encode("Question: what is 12 times 7? Answer: 84")
    split = len(plain.tokenizer.encode("Question: what is 12 times 7? Answer:"))
    (expected,) = plain.score([whole[:split]], [whole[split:]])
    prompt = "Question: what is 12 times 7? Answer:"
    # In the second form the space at the end of the prompt goes with the answer.
    for first, second in ((prompt, " 84"), (prompt + " ", "84")):
        (output,) = plain.score([first], [second])
        assert output.token_ids == expected.token_ids
        np.testing.assert_allclose(output.logprobs, expected.logprobs, atol=1e-4)
    with pytest.raises(ValueError, match="continuation is empty"):
        plain.score([prompt], [""])
    with pytest.raises(ValueError, match="1 prompts but 2 continuations"):
        plain.score([prompt], [" 84", " 85"])
    with pytest.raises(ValueError, match="max_model_len"):
        plain.score([[5] * 200], [[5] * 60])
    assert len(plain.score([[5] * 200], [[5] * 57])[0].logprobs) == 57


def test_a_stream_adds_up_to_the_whole(plain):
    prompt = prompts_of(2, longest=20)[1]
    sampling = SamplingParams(max_tokens=12)
    (whole,) = plain.generate(prompt, sampling)
    pieces = list(plain.stream(prompt, sampling))
    assert [len(piece.token_ids) for piece in pieces] == [1] * len(whole.token_ids)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.token_ids[0] for piece in pieces] == whole.token_ids
    assert [piece.finish_reason for piece in pieces][-1] == whole.finish_reason == "length"


def test_leaving_a_stream_frees_its_slot(plain):
    for _ in range(3):
        stream = plain.stream([5, 6], SamplingParams(max_tokens=200, ignore_eos=True))
        next(stream)
        assert plain.coordinator.has_work
        stream.close()
        assert not plain.coordinator.has_work


def test_text_stops_where_it_should(plain):
    prompt = prompts_of(2, longest=20, seed=2)[1]
    (free,) = plain.generate(prompt, SamplingParams(max_tokens=20))
    at = len(free.text) // 2
    stop = free.text[at : at + 3]
    (cut,) = plain.generate(prompt, SamplingParams(max_tokens=20, stop=(stop,)))
    assert cut.text == free.text[: free.text.find(stop)]
    assert cut.finish_reason == "stop"
    token = free.token_ids[4]
    (cut,) = plain.generate(prompt, SamplingParams(max_tokens=20, stop_token_ids=(token,)))
    assert cut.token_ids == free.token_ids[: free.token_ids.index(token) + 1]
    assert cut.finish_reason == "stop"


def test_an_end_token_of_any_model_ends_the_text_unless_ignored(folder, plain, tmp_path):
    (free,) = plain.generate([7], SamplingParams(max_tokens=10))
    end = free.token_ids[4]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "facts" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [0, end]}))
    with LocalEngine(family_of(tmp_path)) as engine:
        (ended,) = engine.generate([7], SamplingParams(max_tokens=10))
        assert ended.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
        assert ended.finish_reason == "stop"
        assert free.text.startswith(ended.text)
        (ignored,) = engine.generate([7], SamplingParams(max_tokens=10, ignore_eos=True))
        assert ignored.token_ids == free.token_ids


def test_a_seed_repeats_and_others_differ(plain):
    def run(seed):
        sampling = SamplingParams(max_tokens=10, temperature=2.0, seed=seed)
        return plain.generate([5], sampling)[0].token_ids

    assert run(1) == run(1)
    assert len({tuple(run(seed)) for seed in range(5)}) > 1
    assert run(None) != run(None)


def test_generation_ends_at_the_context(folder):
    with LocalEngine(family_of(folder, max_model_len=20)) as engine:
        sampling = SamplingParams(max_tokens=100, ignore_eos=True)
        (output,) = engine.generate([[5] * 15], sampling)
        assert (len(output.token_ids), output.finish_reason) == (5, "length")
        with pytest.raises(ValueError, match=r"20 tokens.*max_model_len"):
            engine.generate([[5] * 20], sampling)


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("", {}, "prompt is empty"),
        ([[]], {}, "prompt is empty"),
        ([[5], []], {}, "prompt 1: the prompt is empty"),
        ([[5, 300]], {}, "outside the vocabulary of 300"),
        ([[-1]], {}, "outside the vocabulary"),
        ({}, {}, "at least one model"),
        ({"large": [5], "chemistry": [5]}, {}, "chemistry"),
        ([5], {"experts": ["chemistry"]}, "chemistry.*math"),
        ([5], {"experts": ["math", "math"]}, "twice"),
        ([5], {"alone": "chemistry"}, "chemistry"),
        ([5], {"rule": "dynamic"}, "dynamic"),
        ([5], {"select": "loudest"}, "loudest"),
        ([5], {"weights": {"math": 1.0}}, "static"),
        ([5], {"rule": "entropy", "weights": {"math": 1.0}}, "rule entropy finds its own"),
        ([5], {"bounds": {"math": (1.0, 0.0)}}, "low < high"),
        ([5], {"weight": 2}, "weight.*weights"),
        ([5], {"select": "blend", "bounds": {"math": (0.0, 1.0)}}, "blend"),
    ],
    ids=str,
)
def test_bad_requests_say_what_to_change(plain, prompt, options, words):
    with pytest.raises(ValueError, match=words):
        plain.generate(prompt, **options)
    assert not plain.coordinator.has_work
    assert plain.generate([5], SamplingParams(max_tokens=1))[0].token_ids


def test_texts_end_where_one_of_the_models_that_are_asked_ends_them(folder, tmp_path):
    """What else is loaded has no say, and none of them where a request wants no end."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "math" / "generation_config.json").write_text('{"eos_token_id": [7]}')
    how = {"max_tokens": 3, "logit_bias": {7: 100.0}}
    with LocalEngine(family_of(tmp_path)) as engine:
        for fusion, ends in (
            ({}, True),
            ({"alone": "math"}, True),
            ({"experts": ["math"]}, True),
            ({"experts": []}, False),
            ({"experts": ["facts"]}, False),
            ({"alone": "base"}, False),
        ):
            (output,) = engine.generate([5, 6], SamplingParams(**how), **fusion)
            assert output.finish_reason == ("stop" if ends else "length"), fusion
            assert output.token_ids == [7] * (1 if ends else 3)
            assert output.stop_reason is None
        (output,) = engine.generate([5, 6], SamplingParams(**how, ignore_eos=True))
        assert output.token_ids == [7] * 3
        (output,) = engine.generate([5, 6], SamplingParams(**how, stop_token_ids=(7,)), experts=[])
        assert (output.token_ids, output.stop_reason) == ([7], 7)


def test_a_checkpoints_sampling_is_taken_where_that_is_asked_for(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    said = {"temperature": 0.6, "top_k": 3, "top_p": 0.9, "do_sample": True, "eos_token_id": 0}
    (tmp_path / "large" / "generation_config.json").write_text(json.dumps(said))
    with LocalEngine(family_of(tmp_path), models=["large"]) as engine:
        assert engine.default_sampling() == SamplingParams()  # greedy, as in the paper
    family = family_of(tmp_path, generation_config="auto")
    with LocalEngine(family, models=["large"]) as engine:
        recommended = SamplingParams(temperature=0.6, top_k=3, top_p=0.9)
        assert engine.default_sampling() == recommended
        assert engine.default_sampling(top_k=5).top_k == 5
        drawn = {tuple(engine.generate([5, 6], experts=[])[0].token_ids) for _ in range(6)}
        assert len(drawn) > 1
        own = SamplingParams()
        (output,) = engine.generate([5, 6], own, experts=[])
        assert engine.generate([5, 6], own, experts=[])[0].token_ids == output.token_ids


class Poisoned(ModelWorker):
    """A model that is broken at one token: NaN, infinite or no logits after it."""

    token, poison = 77, float("nan")

    def compute(self, plan):
        if self.poison is None and self.token in plan.tokens and "facts" in self.spec.model:
            raise MemoryError("the cache is full")
        answer = super().compute(plan)
        if self.poison is None or "facts" not in self.spec.model:
            return answer
        values = answer.values.clone()
        ends = np.cumsum(plan.lengths) - 1
        hit = (plan.tokens[ends] == self.token)[plan.wants > 0]
        values[torch.from_numpy(hit), 3] = self.poison
        return Logits(answer.step, values, values.isfinite().all(-1).numpy(), answer.seconds)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_broken_logits_fail_their_request_only_and_name_the_model(folder, plain, poison):
    worker = type("Worker", (Poisoned,), {"poison": poison})
    prompts = [[5, 6], [5, 77], [8]]
    sampling = SamplingParams(max_tokens=5)
    expected = plain.generate(prompts, sampling)
    with LocalEngine(family_of(folder), worker=worker) as engine:
        good, bad, fine = engine.generate(prompts, sampling)
        assert bad.finish_reason == "error"
        assert bad.error == "model 'facts' returned NaN or infinite logits"
        assert [good.token_ids, fine.token_ids] == [
            expected[0].token_ids,
            expected[2].token_ids,
        ]
        with pytest.raises(RuntimeError, match="'facts'"):
            list(engine.stream([5, 77], sampling))
        # Without that expert nothing is wrong, and nothing of the failure lingers in the slots.
        (alive,) = engine.generate([5, 77], sampling, experts=["math"])
        assert alive.token_ids == plain.generate([5, 77], sampling, experts=["math"])[0].token_ids


def test_a_model_that_raises_fails_its_requests_and_serves_on(folder, plain):
    worker = type("Worker", (Poisoned,), {"poison": None})
    sampling = SamplingParams(max_tokens=5)
    with LocalEngine(family_of(folder), worker=worker) as engine:
        (bad,) = engine.generate([5, 77], sampling)
        assert bad.finish_reason == "error"
        assert "'facts'" in bad.error
        assert "the cache is full" in bad.error
        (good,) = engine.generate([5, 6], sampling)
        assert good.token_ids == plain.generate([5, 6], sampling)[0].token_ids
