"""OpenAI's wire format, without a server: what is accepted, and what answers look like."""

import math

import pytest
from pydantic import ValidationError

from dlf_ray.frontend import Output
from dlf_ray.messages import SamplingParams
from dlf_ray.openai import (
    Answer,
    ChatRequest,
    CompletionRequest,
    FusionSettings,
    Problem,
    ScoreRequest,
    Tokens,
    chat_logprobs,
    completion_logprobs,
    seeded,
)


def asked(**body):
    return CompletionRequest.model_validate(body)


def problem(kind=CompletionRequest, **body):
    """What a request gets that is wrong, as FastAPI reports it."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    errors = [{**each, "loc": ("body", *each["loc"])} for each in caught.value.errors()]
    return Problem.of_validation(errors)


def test_defaults_are_openais():
    sampling = asked(prompt="x").sampling(256)
    assert sampling == SamplingParams(max_tokens=16, temperature=1.0)
    chat = ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}]})
    assert chat.sampling(256).max_tokens == 256


def test_null_is_absent():
    body = {"prompt": "x", "stop": None, "temperature": None, "fusion": {"rule": None}, "n": None}
    assert asked(**body) == asked(prompt="x", fusion={})


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": []}, "tools", "not supported"),
        ({"fusion": {"roole": 1}}, "fusion.roole", "not supported"),
        ({"fusion": {"weights": {"math": "much"}}}, "fusion.weights.math", "number"),
        ({"fusion": {"bounds": {"math": [1]}}}, "fusion.bounds.math.1", "required"),
        ({"prompt": 5}, "prompt", "string"),
        ({"prompt": [["x"]]}, "prompt", "integer"),
        ({"n": True}, "n", "integer"),
        ({"n": 1.5}, "n", "integer"),
        ({"temperature": math.nan}, "temperature", "finite"),
        ({"best_of": 2}, "best_of", "equals `n`"),
        ({"prompt": "half \ud800"}, "prompt", "surrogate"),
        ({"stop": ["\udfff"]}, "stop", "surrogate"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "text"),
        ({"logit_bias": {"one": 1.0}}, "logit_bias.one.[key]", "pattern"),
    ],
    ids=str,
)
def test_what_is_refused_is_named(body, param, words):
    found = problem(**{"prompt": "x", **body})
    assert found.status == 400
    assert found.param == param
    assert f"`{param}`" in found.message or param == "best_of"
    assert words in found.message
    assert found.body["error"]["param"] == param


def test_text_formats_and_equal_best_of_are_accepted():
    assert asked(prompt="x", response_format={"type": "text"}, best_of=2, n=2).n == 2


def test_a_message_that_cannot_be_sent_is_made_sendable():
    assert Problem(400, "half \ud800").body["error"]["message"] == "half ?"


def test_options_of_a_request_stand_above_those_of_the_name():
    static = FusionSettings(rule="static", weights={"math": 0.5}, experts=["math"])
    assert FusionSettings().options(static) == {
        "rule": "static",
        "weights": {"math": 0.5},
        "experts": ["math"],
    }
    assert FusionSettings(rule="exact").options(static) == {"rule": "exact", "experts": ["math"]}
    assert FusionSettings(alone="math").options(static) == {"alone": "math"}


def test_seeds_go_up():
    assert seeded(SamplingParams(seed=3), 2).seed == 5
    assert seeded(SamplingParams(), 2).seed is None


def test_continuations_pair_up():
    def pairs(prompt, continuation):
        return ScoreRequest(prompt=prompt, continuation=continuation).pairs()

    assert pairs("a", ["b", "c"]) == [("a", "b"), ("a", "c")]
    assert pairs([[1], [2]], [[3], [4]]) == [([1], [3]), ([2], [4])]
    assert pairs([1], [3, 4]) == [([1], [3, 4])]
    for wrong in ((["a", "b"], "c"), ("a", [1]), ("a", [""])):
        assert (
            "continuation" in problem(ScoreRequest, prompt=wrong[0], continuation=wrong[1]).message
        )


WORDS = {1: "a", 2: "bb", 3: "a", 4: "\ufffd"}


def test_log_probabilities_of_completions():
    output = Output(
        token_ids=[2, 4],
        logprobs=[-0.5, -math.inf],
        top_logprobs=[{2: -0.5, 1: -2.0, 3: -3.0}, {3: -0.1, 1: -0.2}],
        prompt_logprobs=[-1.0],
        prompt_top_logprobs=[{1: -0.25}],
    )
    shown = completion_logprobs(Tokens.of(output, prompt=[1, 2]), WORDS.get, offset=10)
    assert shown == {
        "tokens": ["a", "bb", "bb", "\ufffd"],
        "token_logprobs": [None, -1.0, -0.5, -9999.0],
        # The more probable of two tokens that read alike; the chosen one is always there.
        "top_logprobs": [
            None,
            {"a": -0.25, "bb": -1.0},
            {"bb": -0.5, "a": -2.0},
            {"a": -0.1, "\ufffd": -9999.0},
        ],
        "text_offset": [10, 11, 13, 15],
    }


def test_log_probabilities_of_chats():
    output = Output(token_ids=[2, 4], logprobs=[-0.5, -1.0], top_logprobs=[{2: -0.5}, {}])
    first, second = chat_logprobs(Tokens.of(output), WORDS.get)["content"]
    entry = {"token": "bb", "logprob": -0.5, "bytes": [98, 98]}
    assert first == {**entry, "top_logprobs": [entry]}
    assert second["bytes"] is None  # a part of a character


def answer(request, prompts=((1, 2),)):
    echoes = ["a bb"] * len(prompts)
    return Answer(request, "id", "dlf", prompts, text=WORDS.get, echoes=echoes)


def test_scores_of_an_echoed_prompt_wait_for_the_first_token():
    made = answer(asked(prompt="a bb", echo=True, logprobs=0, stream=True))
    assert made.chunks(0, Output(prompt_logprobs=[-1.0])) == []
    (chunk,) = made.chunks(0, Output(text="a", token_ids=[3], logprobs=[-2.0]))
    assert chunk["choices"][0]["text"] == "a bba"
    assert chunk["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    (chunk,) = made.chunks(0, Output(text="bb", token_ids=[2], logprobs=[-3.0]))
    assert chunk["choices"][0]["text"] == "bb"
    assert chunk["choices"][0]["logprobs"]["text_offset"] == [4]


def test_usage_counts_each_prompt_once():
    request = asked(prompt=["x", "y"], n=2, stream=True, stream_options={"include_usage": True})
    made = answer(request, prompts=[(1, 2), (1, 2), (3,), (3,)])
    for index in range(4):
        (chunk,) = made.chunks(index, Output(text="a", token_ids=[1, 3]))
        assert chunk["usage"] is None
    (last,) = made.closing()
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}
    request = asked(prompt="x", stream=True, stream_options={"continuous_usage_stats": True})
    made = answer(request)
    (chunk,) = made.chunks(0, Output(text="a", token_ids=[1]))
    assert chunk["usage"]["completion_tokens"] == 1
    assert made.closing() == []
