"""A replica without its engine: what it refuses before that costs anything, what waits for what."""

import asyncio
import json
import threading

import pytest
import tiny
from conftest import family_of

from dlf_ray.engine.frontend import BaseEngine
from dlf_ray.engine.options import resolve
from dlf_ray.engine.output import Output
from dlf_ray.messages import Limits, Request
from dlf_ray.serving.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Problem,
    ScoreRequest,
    TokenizeRequest,
)
from dlf_ray.serving.replica import SHORT, Model, Replica

CONTEXT = 16


class Tokenizer:
    """The tiny one, which counts what it is given, and reads a long text once it is let."""

    def __init__(self, made):
        self._made = made
        self.seen = []
        self.let = threading.Event()

    def __getattr__(self, name):
        return getattr(self._made, name)

    def encode(self, text, **options):
        self.seen.append(text)
        if len(text) > SHORT:
            assert self.let.wait(20)
        return self._made.encode(text, **options)


class Engine:
    """Says what it was asked."""

    render, templates = BaseEngine.render, BaseEngine.templates

    def __init__(self, family, tokenizer, context):
        self.tokenizers, self.chat_templates = {}, {}
        self.family = family
        self.tokenizer = tokenizer
        self.limits = Limits(dict.fromkeys(family.models, context), 300)
        self.asked = []
        self.output = Output(finish_reason="length", logprobs=[-1.0], greedy=[True])

    def tokenize_pair(self, prompt, rest):
        first, whole = self.tokenizer.encode(prompt), self.tokenizer.encode(prompt + rest)
        return first, whole[len(first) :]

    async def agenerate(self, prompt, sampling, **fusion):
        self.asked.append((prompt, sampling))
        return self.output

    async def astream(self, prompt, sampling, **fusion):
        self.asked.append((prompt, sampling))
        yield self.output.checked()

    async def ascore(self, prompt, continuation, **fusion):
        self.asked.append((prompt, continuation))
        return self.output


@pytest.fixture
def made(tmp_path, request):
    tokenizer = Tokenizer(tiny.tokenizer(tmp_path))
    context = getattr(request, "param", CONTEXT)
    replica = Replica(
        Engine(family_of(tmp_path), tokenizer, context),
        {"dlf": Model(family="f", chat_template="{{ messages[0].content }}")},
        8,
    )
    tokenizer.seen.clear()
    return replica


async def answered(replica, request):
    return [item async for item in replica.answer("dlf", request, "id")]


def asked(replica, request):
    return asyncio.run(answered(replica, request))


LONG = "moon" * 10_000


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (CompletionRequest(prompt=LONG), "prompt"),
        (CompletionRequest(prompt=["x", LONG]), "prompt"),
        (CompletionRequest(prompt=[5] * (CONTEXT + 1)), "prompt"),
        (CompletionRequest(prompt="x", prompts={"base": LONG}), "prompts"),
        (ChatRequest(messages=[{"role": "user", "content": LONG}]), "messages"),
        (ChatRequest(messages=[{"role": "user", "content": "moon" * 9}] * 9), "messages"),
        (ScoreRequest(prompt=LONG, continuation="x"), "prompt"),
        (ScoreRequest(prompt="x", continuation=["y", LONG]), "continuation"),
        (ScoreRequest(prompt=[5], continuation=[5] * (CONTEXT + 1)), "continuation"),
        (TokenizeRequest(prompt=LONG), "prompt"),
        (DetokenizeRequest(tokens=[5] * (CONTEXT + 1)), "tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_too_long_is_refused_before_it_is_tokenized(made, request_, field):
    (problem,) = asked(made, request_)
    assert isinstance(problem, Problem)
    assert (problem.status, problem.param) == (400, field)
    assert problem.code == "context_length_exceeded"
    assert not made.engine.tokenizer.seen
    assert not made.engine.asked


def test_prompts_of_models_that_there_are_not_are_refused_untokenized(made):
    (problem,) = asked(made, CompletionRequest(prompt="x", prompts={"chemistry": "y"}))
    assert (problem.status, problem.param, problem.code) == (400, "prompts", None)
    assert not made.engine.tokenizer.seen


def test_what_has_too_many_tokens_is_refused_by_its_field(made):
    (problem,) = asked(made, CompletionRequest(prompt="z" * (CONTEXT + 1)))
    assert (problem.status, problem.param) == (400, "prompt")
    assert problem.code == "context_length_exceeded"
    assert "17 tokens" in problem.message


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (CompletionRequest(prompt="x"), "prompt"),
        (ChatRequest(messages=[{"role": "user", "content": "x"}]), "messages"),
        (ScoreRequest(prompt="x", continuation="y"), "prompt"),
    ],
    ids=["completion", "chat", "score"],
)
def test_what_leaves_no_room_to_answer_is_refused_by_its_field(made, request_, field):
    """The engine says so, by the name of a setting that is not the client's."""
    made.engine.limits = Limits(dict.fromkeys(made.engine.family.models, 1), 300, (0,))

    async def refuses(prompt, *_, **fusion):
        request = Request(id=0, prompt=(5,) * 9, fusion=resolve(made.engine.family, {}))
        made.engine.limits.check(request)

    made.engine.agenerate = made.engine.ascore = refuses
    (problem,) = asked(made, request_)
    assert (problem.status, problem.param) == (400, field)
    assert problem.code == "context_length_exceeded"
    assert f"maximum context length is {CONTEXT} tokens" in problem.message


def test_the_longest_prompt_that_fits_is_taken(made):
    longest = max(made.engine.tokenizer.get_vocab(), key=len)
    assert made.longest == CONTEXT * len(longest)
    (answer,) = asked(made, TokenizeRequest(prompt="z" * made.longest))
    assert json.loads(answer)["count"] == made.longest


@pytest.mark.parametrize("made", [SHORT], indirect=True)
def test_short_prompts_do_not_wait_for_long_ones(made):
    async def main():
        waits = asyncio.ensure_future(answered(made, CompletionRequest(prompt="x" * (SHORT + 1))))
        while not made.engine.tokenizer.seen:
            await asyncio.sleep(0.001)
        for request in (
            TokenizeRequest(prompt="short"),
            CompletionRequest(prompt=["short"] * 3),
            DetokenizeRequest(tokens=[5]),
        ):
            assert not isinstance((await answered(made, request))[0], Problem)
        assert not waits.done()
        made.engine.tokenizer.let.set()
        await waits

    asyncio.run(main())


def test_an_echo_without_scores_needs_no_engine(made):
    body = {"prompt": ["The moon", "A train"], "echo": True, "max_tokens": 0}
    answer, used = asked(made, CompletionRequest(**body))
    choices = json.loads(answer)["choices"]
    assert [(c["text"], c["finish_reason"]) for c in choices] == [
        ("The moon", "length"),
        ("A train", "length"),
    ]
    assert used["completion_tokens"] == 0
    *parts, _ = asked(made, CompletionRequest(**body, stream=True))
    events = [
        json.loads(e[6:]) for p in parts for e in p.split(b"\n\n") if e.startswith(b"data: {")
    ]
    assert sorted(each["choices"][0]["text"] for each in events) == ["A train", "The moon"]
    (answer, _) = asked(made, CompletionRequest(**{**body, "prompt": [[5]]}, logprobs=1))
    assert json.loads(answer)["choices"][0]["logprobs"]["token_logprobs"] == [None]
    assert not made.engine.asked
    (problem,) = asked(made, CompletionRequest(**body, fusion={"experts": ["chemistry"]}))
    assert problem.status == 400


def test_a_conversation_is_read_by_each_model_in_its_own_form(made):
    made.models = {"dlf": Model(family="f")}
    own = {"large": "{{ messages[0].content }}", "math": "{{ messages[0].role }}"}
    made.engine.chat_templates = own
    request = ChatRequest(messages=[{"role": "user", "content": "The moon"}], max_tokens=1)
    asked(made, request)
    ((prompt, _),) = made.engine.asked
    read = {name: made.engine.tokenizer.decode(ids) for name, ids in prompt.items()}
    assert read == {**dict.fromkeys(made.engine.family.models, "The moon"), "math": "user"}
    made.models = {"dlf": Model(family="f", chat_template=own["math"])}
    asked(made, request)
    assert made.engine.tokenizer.decode(made.engine.asked[1][0]) == "user"


def test_a_score_is_asked_of_the_continuation_alone(made):
    request = ScoreRequest(prompt=[5, 6, 7], continuation=[[8], [9]])
    answer, _ = asked(made, request)
    assert made.engine.asked == [([5, 6, 7], [8]), ([5, 6, 7], [9])]
    assert [entry["is_greedy"] for entry in json.loads(answer)["data"]] == [True, True]


@pytest.mark.parametrize("refused", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_what_the_engine_refuses_is_no_failure(made, refused, stream):
    """An expert can leave between the replica's check and the coordinator's."""
    made.engine.output = Output(
        finish_reason="error", error="no model 'math' in the family", refused=refused
    )
    (problem,) = asked(made, CompletionRequest(prompt="x", stream=stream))
    assert problem.status == (400 if refused else 500)
    assert ("math" in problem.message) == refused


def test_a_trace_is_of_one_answer():
    for body in ({"prompt": ["a", "b"]}, {"prompt": "a", "n": 2}):
        with pytest.raises(ValueError, match=r"`fusion\.trace` is of a single answer"):
            CompletionRequest(**body, fusion={"trace": True})
