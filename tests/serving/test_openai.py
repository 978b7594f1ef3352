"""OpenAI's wire format, without a server: what is accepted, and what answers look like."""

import math

import msgspec
import pytest
from pydantic import ValidationError

from dlf_ray.engine.output import Output
from dlf_ray.params import SamplingParams, StructuredOutputs
from dlf_ray.serving.answers import Answer, Tokens, chat_logprobs, completion_logprobs
from dlf_ray.serving.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ExpertRequest,
    FusionSettings,
    Problem,
    ScoreRequest,
    TokenizeRequest,
    seeded,
)
from dlf_ray.serving.tokens import Reading


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
        ({"response_format": {"type": "yaml"}}, "response_format.type", "text"),
        ({"logit_bias": {"one": 1.0}}, "logit_bias.one.[key]", "pattern"),
        ({"model": "m" * 257}, "model", "256"),
        ({"user": "m" * 257}, "user", "256"),
        ({"prompt": ["x"] * 2049}, "prompt", "2048"),
        ({"prompt": [[5]] * 2049}, "prompt", "2048"),
        ({"prompts": {str(k): "x" for k in range(257)}}, "prompts", "256"),
        ({"stop": ["x"] * 65}, "stop", "64"),
        ({"stop": "x" * 1025}, "stop", "1024"),
        ({"stop": ["x" * 1025]}, "stop", "1024"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids", "1024"),
        ({"logit_bias": {str(k): 1.0 for k in range(1025)}}, "logit_bias", "1024"),
        ({"logit_bias": {"1": 101.0}}, "logit_bias.1", "100"),
        ({"n": 129}, "n", "128"),
        ({"seed": 2**63}, "seed", str(2**63)),
        ({"temperature": 101}, "temperature", "100"),
        ({"top_p": 1.1}, "top_p", "1"),
        ({"top_k": -2}, "top_k", "-1"),
        ({"min_p": -0.1}, "min_p", "0"),
        ({"presence_penalty": 2.1}, "presence_penalty", "2"),
        ({"frequency_penalty": -2.1}, "frequency_penalty", "-2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty", "0.01"),
        ({"fusion": {"step": 0}}, "fusion.step", "0"),
        ({"fusion": {"step": 2.1}}, "fusion.step", "2"),
        ({"fusion": {"experts": ["m"] * 257}}, "fusion.experts", "256"),
        ({"fusion": {"experts": ["m" * 257]}}, "fusion.experts.0", "256"),
        ({"fusion": {"alone": "m" * 257}}, "fusion.alone", "256"),
        ({"fusion": {"weights": {"math": 100.1}}}, "fusion.weights.math", "100"),
        ({"fusion": {"bounds": {"math": [-1e308, 1e308]}}}, "fusion.bounds.math.0", "-100"),
        ({"fusion": {"bounds": {str(k): [0, 1] for k in range(257)}}}, "fusion.bounds", "256"),
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


MESSAGE = {"role": "user", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ANYWAY = {
    "store": False,
    "metadata": {"run": "7"},
    "safety_identifier": "me",
    "prompt_cache_key": "k",
    "service_tier": "default",
    "use_beam_search": False,
    "length_penalty": 1,
    "bad_words": [],
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "priority": 0,
    "return_token_ids": False,
    "allowed_token_ids": None,
    "truncate_prompt_tokens": None,
    "guided_json": None,
}
"""Fields of both kinds of requests that clients send, and that change nothing."""
IN_TEXT = {"suffix": "", "echo": False, "add_special_tokens": True, "best_of": 1}
IN_CHAT = {
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "functions": [],
    "function_call": "none",
    "modalities": ["text"],
    "verbosity": "medium",
    "audio": None,
    "prediction": None,
    "web_search_options": None,
    "reasoning_effort": None,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "add_special_tokens": False,
    "stream": True,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
}


def sampling(kind, **body):
    return kind.model_validate(body).sampling(256)


def test_what_happens_anyway_may_be_asked_for():
    plain = sampling(CompletionRequest, prompt="x")
    assert sampling(CompletionRequest, prompt="x", **ANYWAY, **IN_TEXT) == plain
    plain = sampling(ChatRequest, messages=[MESSAGE])
    assert sampling(ChatRequest, messages=[MESSAGE], **ANYWAY, **IN_CHAT) == plain
    nulls = dict.fromkeys({**ANYWAY, **IN_CHAT})
    assert sampling(ChatRequest, messages=[MESSAGE], **nulls) == plain


def test_tools_that_are_not_to_be_called_are_not_shown():
    asked = ChatRequest.model_validate(
        {"messages": [MESSAGE], "tools": [TOOL], "tool_choice": "none"}
    )
    assert asked.texts == [("messages", "x")]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": [TOOL]}, "tools", "tool calling is not supported"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tools", "tool calling is not supported"),
        ({"tool_choice": "required"}, "tool_choice", "tool calling is not supported"),
        ({"tool_choice": TOOL}, "tool_choice", "tool calling is not supported"),
        ({"functions": [{"name": "f"}]}, "functions", "tool calling is not supported"),
        ({"function_call": {"name": "f"}}, "function_call", "tool calling is not supported"),
        ({"store": True}, "store", "give false"),
        ({"store": 0}, "store", "give false"),
        ({"priority": False}, "priority", "give 0"),
        ({"length_penalty": 1.1}, "length_penalty", "give 1.0"),
        ({"service_tier": "flex"}, "service_tier", '"auto" or "default"'),
        ({"modalities": ["text", "audio"]}, "modalities", '["text"]'),
        ({"verbosity": "low"}, "verbosity", "medium"),
        ({"bad_words": ["x"]}, "bad_words", "[]"),
        ({"echo": True}, "echo", "false"),
        ({"suffix": ""}, "suffix", "not supported"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids", "not supported"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "`chat_template_kwargs`"),
        ({"chat_template": "x"}, "chat_template", "where the model is served"),
        ({"guided_json": {}}, "guided_json", "`structured_outputs`"),
        ({"guided_choice": ["a"]}, "guided_choice", "`structured_outputs`"),
        ({"continue_final_message": True}, "continue_final_message", "false"),
        ({"metadata": {"run": 7}}, "metadata.run", "string"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs", "dictionary"),
        (
            {"chat_template_kwargs": {str(k): 1 for k in range(257)}},
            "chat_template_kwargs",
            "256",
        ),
        ({"metadata": {str(k): "x" for k in range(17)}}, "metadata", "16"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obf", "false"),
        ({"messages": [{**MESSAGE, "role": "tool"}]}, "messages.0.role", "user"),
        ({"messages": [{**MESSAGE, "tool_calls": [{}]}]}, "messages.0.tool_calls", "tool calling"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content", "required"),
        ({"messages": [{**MESSAGE, "name": "m" * 257}]}, "messages.0.name", "256"),
    ],
    ids=str,
)
def test_what_a_chat_refuses_is_named(body, param, words):
    found = problem(ChatRequest, **{"messages": [MESSAGE], **body})
    assert found.status == 400
    assert found.param.startswith(param)
    assert f"`{param}" in found.message
    assert words in found.message


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": FORMAT}, {"json": SCHEMA}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "any",
                        "schema": {},
                        "strict": False,
                        "description": "Anything.",
                    },
                }
            },
            {"json": {}},
        ),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, {"json": SCHEMA}),
        ({"structured_outputs": {"json": '{"type": "object"}'}}, {"json": '{"type": "object"}'}),
        ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
        ({"structured_outputs": {"regex": "[0-9]+"}}, {"regex": "[0-9]+"}),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, {"choice": ("yes", "no")}),
        ({"structured_outputs": {"grammar": 'start: "x"'}}, {"grammar": 'start: "x"'}),
        (
            {"structured_outputs": {"regex": "x"}, "response_format": {"type": "text"}},
            {"regex": "x"},
        ),
        (
            {"structured_outputs": {"regex": "x", "disable_any_whitespace": False}},
            {"regex": "x"},
        ),
    ],
    ids=str,
)
def test_shapes_of_answers_arrive(body, shape):
    expected = shape and StructuredOutputs(**shape)
    assert sampling(CompletionRequest, prompt="x", **body).structured_outputs == expected
    chat = sampling(ChatRequest, messages=[MESSAGE], **body)
    assert chat.structured_outputs == expected
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(chat), type=SamplingParams)
    assert sent == chat


def nested(levels):
    schema = {}
    for _ in range(levels):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize("levels", [65, 600])
def test_objects_that_nest_too_deeply_are_refused_before_they_are_sent_on(levels):
    deep = {"deep": [nested(levels - 2)]}
    chat = {"messages": [MESSAGE]}
    for kind, body, param in (
        (ChatRequest, {**chat, "chat_template_kwargs": deep}, "chat_template_kwargs"),
        (ChatRequest, {**chat, "tools": [deep], "tool_choice": "none"}, "tools.0"),
        (ExpertRequest, {"name": "x", "expert": deep}, "expert"),
    ):
        found = problem(kind, **body)
        assert (found.status, found.param) == (400, param)
        assert "64 levels" in found.message
    just = {"deep": [nested(61)]}
    kept = ChatRequest.model_validate({**chat, "chat_template_kwargs": just})
    assert kept.chat_template_kwargs == just


@pytest.mark.parametrize(
    ("shape", "param", "words"),
    [
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "exactly one"),
        (
            {"structured_outputs": {"regex": "x", "json_object": True}},
            "structured_outputs",
            "exactly one",
        ),
        (
            {"structured_outputs": {"regex": "x"}, "response_format": {"type": "json_object"}},
            "response_format",
            "not both",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format", "`json_schema`"),
        ({"response_format": {**FORMAT, "type": "json_object"}}, "response_format", "json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "required",
        ),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "string"),
        ({"structured_outputs": {"regex": "x" * 4097}}, "structured_outputs.regex", "4096"),
        ({"structured_outputs": {"grammar": "x" * 65537}}, "structured_outputs.grammar", "65536"),
        ({"structured_outputs": {"json": "x" * 65537}}, "structured_outputs.json", "65536"),
        (
            {"structured_outputs": {"json": {"title": "x" * 65537}}},
            "structured_outputs.json",
            "65536",
        ),
        ({"structured_outputs": {"json": nested(65)}}, "structured_outputs.json", "64 levels"),
        ({"structured_outputs": {"json": "[" * 65}}, "structured_outputs.json", "64 levels"),
        ({"structured_outputs": {"json": nested(900)}}, "structured_outputs.json", "64 levels"),
        ({"structured_outputs": {"choice": ["x"] * 1025}}, "structured_outputs.choice", "1024"),
        ({"structured_outputs": {"choice": ["x" * 1025]}}, "structured_outputs.choice.0", "1024"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice.0", "1"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.struct", "supported"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"title": "x" * 65537}},
                }
            },
            "response_format.json_schema.schema",
            "65536",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shapes_that_are_refused_are_named(shape, param, words):
    found = problem(**{"prompt": "x", **shape})
    assert found.status == 400
    assert found.param.startswith(param)
    assert words in found.message


@pytest.mark.parametrize(
    "shape",
    [
        {"regex": "x" * 4097},
        {"grammar": "x" * 65537},
        {"json": "x" * 65537},
        {"json": {"title": "x" * 65537}},
        {"json": nested(65)},
        {"json": nested(100_000)},
        {"json": {"maximum": 10**30}},
        {"json": {"half \ud800": 1}},
        {"json": {"set": {1}, "x": object()}},
        {"choice": ("x",) * 1025},
        {"choice": ("x" * 1025,)},
        {"choice": ("",)},
    ],
    ids=lambda shape: next(iter(shape)),
)
def test_programs_have_the_same_limits(shape):
    (name,) = shape
    with pytest.raises(ValueError, match=f"structured_outputs.{name}"):
        StructuredOutputs(**shape)


def test_brackets_in_the_strings_of_a_schema_do_not_nest():
    text = '{"title": "' + "[" * 100 + '\\"{"}'
    assert StructuredOutputs(json=text).json == text


def test_templates_are_given_what_the_request_has_for_them():
    given = {"enable_thinking": False, "tools": None}
    asked = ChatRequest.model_validate({"messages": [MESSAGE], "chat_template_kwargs": given})
    assert asked.chat_template_kwargs == given


def test_what_could_only_be_ignored_has_a_code():
    for body in ({"store": True}, {"no_such_field": 1}, {"tool_choice": "required"}):
        assert problem(ChatRequest, messages=[MESSAGE], **body).code == "unsupported"
    assert problem(ChatRequest, messages=[MESSAGE], n=0).code is None


def test_a_message_is_taken_as_clients_keep_it():
    said = {"role": "assistant", "content": "y", "refusal": None, "annotations": [], "audio": None}
    said |= {"function_call": None, "tool_calls": []}
    asked = ChatRequest.model_validate({"messages": [{**MESSAGE, "name": "Ann"}, said]})
    assert [message.plain() for message in asked.messages] == [
        {"role": "user", "content": "x", "name": "Ann"},
        {"role": "assistant", "content": "y"},
    ]


def test_fields_of_other_requests_have_limits_too():
    message = {"role": "user", "content": "x"}
    part = {"type": "text", "text": "x"}
    for kind, body, param in (
        (ChatRequest, {"messages": [message] * 2049}, "messages"),
        (
            ChatRequest,
            {"messages": [{**message, "content": [part] * 2049}]},
            "messages.0.content",
        ),
        (ScoreRequest, {"prompt": "x", "continuation": ["x"] * 2049}, "continuation"),
        (TokenizeRequest, {"prompt": "x", "model": "m" * 257}, "model"),
        (ExpertRequest, {"name": "x" * 257, "expert": {}}, "name"),
        (ExpertRequest, {"name": "x", "expert": {str(k): 1 for k in range(257)}}, "expert"),
    ):
        found = problem(kind, **body)
        assert (found.status, found.param) == (400, param)


MANY = 50_000


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [5] * MANY + ["x"]},
        {"prompt": ["x"] * MANY + [5]},
        {"prompt": [True] * MANY},
        {"prompt": [[True] * MANY]},
        {"prompt": [[5] * MANY + ["x"]] * 10},
        {"prompts": {"base": [True] * MANY}},
        {"stop": [5] * MANY},
        {"stop_token_ids": ["x"] * MANY},
        {"logit_bias": {f"x{k}": "x" for k in range(MANY)}},
        {"fusion": {"experts": [5] * MANY}},
        {"fusion": {"weights": {f"x{k}": "x" for k in range(MANY)}}},
        {f"x{k}": 5 for k in range(MANY)},
        {"fusion": {f"x{k}": 5 for k in range(MANY)}},
    ],
    ids=lambda body: str(body)[:30],
)
def test_a_body_of_mistakes_is_refused_at_the_first_ones(body):
    """Each mistake costs as much as a thousand good entries, and all other requests wait."""
    with pytest.raises(ValidationError) as caught:
        asked(**{"prompt": "x", **body})
    assert caught.value.error_count() < 10


def limits(schema):
    """Whether a JSON schema says how large a value may be."""
    kinds = schema.get("anyOf", [schema])
    bounds = {"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"}
    free = {"boolean", "null"}
    return all(
        bounds & set(kind) or kind.get("type") in free or {"$ref", "enum", "const"} & set(kind)
        for kind in kinds
    )


def test_the_schema_shows_the_limits():
    """Of all fields but those whose limit is the models' context, or another field."""
    by_context = {"prompt", "prompts", "continuation", "tokens", "content", "text", "best_of"}
    for kind in (CompletionRequest, ChatRequest, ScoreRequest, TokenizeRequest, DetokenizeRequest):
        schema = kind.model_json_schema()
        for each in (schema, *schema.get("$defs", {}).values()):
            for name, field in each["properties"].items():
                if name not in by_context:
                    assert limits(field), (kind, name, field)


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


WORDS = {1: b"a", 2: b"bb", 3: b"a", 4: b"\xc3", 5: b"\xa9", 6: b"\xbc"}


def test_log_probabilities_of_completions():
    output = Output(
        token_ids=[2, 4],
        logprobs=[-0.5, -math.inf],
        top_logprobs=[{2: -0.5, 1: -2.0, 3: -3.0}, {3: -0.1, 1: -0.2}],
        prompt_logprobs=[-1.0],
        prompt_top_logprobs=[{1: -0.25}],
    )
    shown = completion_logprobs(Tokens.of(output, prompt=[1, 2]), Reading(WORDS.get))
    assert shown == {
        "tokens": ["a", "bb", "bb", ""],
        "token_logprobs": [None, -1.0, -0.5, -9999.0],
        # The more probable of two tokens that read alike; the chosen one is always there.
        "top_logprobs": [
            None,
            {"a": -0.25, "bb": -1.0},
            {"bb": -0.5, "a": -2.0},
            {"a": -0.1, "": -9999.0},
        ],
        "text_offset": [0, 1, 3, 5],
    }


def test_log_probabilities_of_chats():
    output = Output(token_ids=[2, 4], logprobs=[-0.5, -1.0], top_logprobs=[{2: -0.5}, {}])
    first, _ = chat_logprobs(Tokens.of(output), Reading(WORDS.get))["content"]
    entry = {"token": "bb", "logprob": -0.5, "bytes": [98, 98]}
    assert first == {**entry, "top_logprobs": [entry]}


def test_tokens_that_are_a_part_of_a_character():
    """The last one reads as all of it, each has its own bytes, and others stand in its place."""
    output = Output(
        token_ids=[1, 4, 5, 2],
        logprobs=[-0.1, -0.2, -0.3, -0.4],
        top_logprobs=[{}, {4: -0.2, 2: -0.9}, {5: -0.3, 6: -0.4, 1: -0.9}, {}],
    )
    content = chat_logprobs(Tokens.of(output), Reading(WORDS.get))["content"]
    assert [each["token"] for each in content] == ["a", "", "é", "bb"]
    assert [bytes(each["bytes"]) for each in content] == [WORDS[id] for id in output.token_ids]
    tops = [{top["token"]: bytes(top["bytes"]) for top in e["top_logprobs"]} for e in content]
    assert tops[1] == {"": b"\xc3", "bb": b"bb"}
    assert tops[2] == {"é": b"\xa9", "ü": b"\xbc", "\ufffda": b"a"}
    shown = completion_logprobs(Tokens.of(output), Reading(WORDS.get))
    assert shown["tokens"] == ["a", "", "é", "bb"]
    assert shown["text_offset"] == [0, 1, 1, 2]
    assert shown["top_logprobs"][2] == {"é": -0.3, "ü": -0.4, "\ufffda": -0.9}


def test_a_character_may_come_in_several_chunks():
    made = answer(asked(prompt="x", logprobs=0, stream=True))
    shown = []
    for text, token in (("a", 1), ("", 4), ("é", 5), ("bb", 2)):
        (chunk,) = made.chunks(0, Output(text=text, token_ids=[token], logprobs=[-1.0]))
        shown.append(chunk["choices"][0]["logprobs"])
    assert [each["tokens"] for each in shown] == [["a"], [""], ["é"], ["bb"]]
    assert [each["text_offset"] for each in shown] == [[0], [1], [1], [2]]


def answer(request, prompts=((1, 2),)):
    echoes = ["a bb"] * len(prompts)
    return Answer(request, "id", "dlf", prompts, bytes_of=WORDS.get, echoes=echoes)


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


def test_what_a_checkpoint_recommends_holds_where_a_request_says_nothing():
    recommended = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    got = asked(prompt="x", top_k=5).recommended(recommended).sampling(256)
    assert (got.temperature, got.top_k, got.repetition_penalty) == (0.6, 5, 1.1)
    assert asked(prompt="x").recommended({}).sampling(256).temperature == 1.0
