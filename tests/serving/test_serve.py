"""The endpoint over HTTP: a real Serve application with a tiny family under three names."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import requests
from asking import PROMPT, SOON_S, TIMEOUT_S, completed, events, post, refused
from bodies import BAD, MEANT, accepted, meant
from conftest import EXPERTS, family_file
from processes import TESTS

from dlf_ray import Family, LocalEngine, SamplingParams
from dlf_ray.evaluation.answering import answers
from dlf_ray.evaluation.tasks import own_task

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not that') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    return family_file(folder, tmp_path_factory.mktemp("serve") / "tiny.yaml")


@pytest.fixture(scope="module")
def url(root, file):
    """One endpoint with the family under three names."""
    from ray import serve

    from dlf_ray.serving.app import Settings, build_app

    families = {
        "dlf": {"family": file},
        "static": {"family": file, "fusion": {"rule": "static"}},
        "large": {"family": file, "fusion": {"experts": []}, "chat_template": TEMPLATE},
    }
    settings = Settings.model_validate({"families": families})
    serve.run(build_app(settings), name="main", route_prefix="/")
    return root


@pytest.fixture(scope="module")
def local(file):
    with LocalEngine(Family.from_yaml(file)) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(url):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)


# What it says, as a client of OpenAI's reads it


def test_the_client_reads_completions(client, local):
    (expected,) = local.generate(PROMPT, SamplingParams(max_tokens=8))
    answer = client.completions.create(model="dlf", prompt=PROMPT, max_tokens=8, temperature=0)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.id.startswith("cmpl-")
    assert answer.usage.prompt_tokens == len(local.tokenizer.encode(PROMPT))
    assert answer.usage.completion_tokens == 8
    pieces = client.completions.create(
        model="dlf",
        prompt=PROMPT,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *pieces, last = list(pieces)
    assert "".join(piece.choices[0].text for piece in pieces) == expected.text
    assert len(pieces) == 8
    assert all(piece.usage is None for piece in pieces)
    assert last.choices == []
    assert last.usage == answer.usage


def test_the_client_reads_chat(client, local):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    text = "system: Be short.\nuser: Hello\nassistant:"
    (expected,) = local.generate(text, SamplingParams(max_tokens=6, logprobs=2), experts=[])
    asked = {"model": "large", "messages": messages, "max_completion_tokens": 6, "temperature": 0}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected.text
    entries = answer.choices[0].logprobs.content
    assert [e.logprob for e in entries] == pytest.approx(expected.logprobs, abs=1e-4)
    assert all(len(e.top_logprobs) == 2 for e in entries)
    assert all(e.logprob == e.top_logprobs[0].logprob for e in entries)  # it was greedy
    pieces = list(client.chat.completions.create(**asked, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content for p in pieces) == expected.text
    assert pieces[-1].choices[0].finish_reason == "length"
    endless = client.chat.completions.create(
        **{**asked, "max_completion_tokens": None}, extra_body={"ignore_eos": True}
    )
    assert endless.usage.total_tokens == 256  # up to the context


def test_the_client_reads_errors(client):
    import openai

    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt", prompt="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="chat_template"):
        client.chat.completions.create(model="dlf", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="not that"):
        client.chat.completions.create(model="large", messages=[{"role": "user", "content": "no"}])
    assert [model.id for model in client.models.list()] == ["dlf", "static", "large"]


def test_the_asynchronous_client(url, local):
    openai = pytest.importorskip("openai")
    prompts = [PROMPT, "A train leaves", "def add"]
    expected = local.generate(prompts, SamplingParams(max_tokens=6))

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:

            async def streamed(prompt):
                asked = {"model": "dlf", "prompt": prompt, "max_tokens": 6, "temperature": 0}
                pieces = await client.completions.create(**asked, stream=True)
                return "".join([piece.choices[0].text async for piece in pieces])

            return await asyncio.wait_for(asyncio.gather(*map(streamed, prompts)), TIMEOUT_S)

    assert asyncio.run(main()) == [output.text for output in expected]


# What it says, beside the engine in this process


@pytest.mark.parametrize(
    ("body", "sampling"),
    [
        ({"seed": 3}, {"temperature": 1.0, "seed": 3}),
        ({"seed": 3, "top_p": 0.5, "temperature": 0.7}, {"seed": 3, "top_p": 0.5}),
        ({"seed": 4, "top_k": 3, "min_p": 0.1}, {"temperature": 1.0, "top_k": 3, "min_p": 0.1}),
        ({"temperature": 0, "logit_bias": {"65": 100}}, {"logit_bias": {65: 100.0}}),
        ({"temperature": 0, "stop": "the"}, {"stop": ("the",)}),
        (
            {"temperature": 0, "presence_penalty": 1, "frequency_penalty": 0.5},
            {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        ),
        ({"temperature": 0, "repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"temperature": 0, "stop_token_ids": [1], "min_tokens": 3}, {"stop_token_ids": (1,)}),
        ({"temperature": 0, "user": "me", "stop": None, "n": None, "best_of": 1}, {}),
    ],
    ids=lambda value: "-".join(value),
)
def test_options_arrive(url, local, body, sampling):
    for name in ("seed", "temperature", "min_tokens"):
        if name in body:
            sampling = {**sampling, name: body[name]}
    expected = SamplingParams(max_tokens=8, **sampling)
    (output,) = local.generate(PROMPT, expected)
    (choice,) = completed(url, prompt=PROMPT, max_tokens=8, **body)
    assert choice["text"] == output.text
    assert choice["finish_reason"] == output.finish_reason
    assert choice["stop_reason"] == output.stop_reason


def test_prompts_of_every_kind(url, local):
    texts = ["The moon", "A train leaves"]
    ids = [local.tokenizer.encode(text) for text in texts]
    sampling = SamplingParams(max_tokens=4)
    expected = [output.text for output in local.generate(texts, sampling)]
    for prompt, count in ((texts[0], 1), (texts, 2), (ids[0], 1), (ids, 2)):
        choices = completed(url, prompt=prompt, max_tokens=4, temperature=0)
        assert [choice["index"] for choice in choices] == list(range(count))
        assert [choice["text"] for choice in choices] == expected[:count]


def test_several_answers_draw_with_seeds_in_a_row(url, local):
    drawn = [
        local.generate(text, SamplingParams(max_tokens=4, temperature=1.0, seed=7 + k))[0].text
        for text in ("The", "A")
        for k in range(3)
    ]
    body = {"prompt": ["The", "A"], "n": 3, "seed": 7, "max_tokens": 4}
    assert [choice["text"] for choice in completed(url, **body)] == drawn
    answer = post(url, **body, stream=True, stream_options={"include_usage": True})
    *chunks, last = events(answer)
    texts = [""] * 6
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == drawn
    assert last["usage"]["prompt_tokens"] == 2  # each prompt once
    assert last["usage"]["completion_tokens"] == 24


def test_fusion_per_request_and_per_name(url, local):
    sampling = SamplingParams(max_tokens=6)

    def text(prompt=PROMPT, **options):
        return local.generate(prompt, sampling, **options)[0].text

    def said(**body):
        return completed(url, max_tokens=6, temperature=0, **{"prompt": PROMPT, **body})[0]["text"]

    assert said(model="static") == text(rule="static")
    assert said(model="large") == text(experts=[])
    assert said(fusion={"alone": "math"}) == text(alone="math")
    # A request's own options stand above those of the name.
    assert said(model="large", fusion={"experts": ["math"]}) == text(experts=["math"])
    assert said(model="static", fusion={"rule": "grid"}) == text(rule="grid")
    weights = {"rule": "static", "weights": {"math": 0.3}, "experts": ["math"]}
    assert said(fusion=weights) == text(**weights)
    bounds = {"bounds": {"math": [0.5, 1.0]}, "experts": ["math"], "step": 0.25}
    assert said(fusion=bounds) == text(**{**bounds, "bounds": {"math": (0.5, 1.0)}})
    own = {"large": "The moon", "base": "A train"}
    assert said(prompt=None, prompts=own) == text(own)
    others = dict.fromkeys(local.family.models, PROMPT)
    assert said(prompts={"base": "A train"}) == text({**others, "base": "A train"})


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_weights_come_along(url, local, chat):
    asked = {"max_tokens": 6, "temperature": 0, "model": "large"}
    asked["fusion"] = {"return_weights": True, "experts": ["math", "facts"]}
    path = "/v1/completions"
    text = PROMPT
    if chat:
        path, text = "/v1/chat/completions", f"user: {PROMPT}\nassistant:"
        asked["messages"] = [{"role": "user", "content": PROMPT}]
    else:
        asked["prompt"] = PROMPT
    (expected,) = local.generate(text, SamplingParams(max_tokens=6), experts=["math", "facts"])
    whole = post(url, path, **asked).json()["choices"][0]["fusion"]
    assert whole["tokens"] == expected.pieces
    assert whole["experts"] == expected.experts
    assert [set(each) for each in whole["weights"]] == [{"math", "facts"}] * 6
    for shown, kl in zip(whole["kl"], expected.kl, strict=True):
        assert shown == pytest.approx(kl, abs=1e-4)
    chunks = [each["choices"][0] for each in events(post(url, path, **asked, stream=True))]
    parts = [each["fusion"] for each in chunks if "fusion" in each]
    assert [token for part in parts for token in part["tokens"]] == whole["tokens"]
    assert [w for part in parts for w in part["weights"]] == whole["weights"]


def test_a_trace_shows_every_actor(url):
    asked = {"prompt": PROMPT, "max_tokens": 3, "fusion": {"trace": True}}
    whole = post(url, **asked).json()["choices"][0]["fusion"]
    *_, last = events(post(url, **asked, stream=True))
    for fusion in (whole, last["choices"][0]["fusion"]):
        names = {e["args"]["name"] for e in fusion["trace"]["traceEvents"] if "args" in e}
        assert names == {"replica", "coordinator", "large", "base", *EXPERTS}
    assert "fusion" not in post(url, prompt=PROMPT, max_tokens=3).json()["choices"][0]


def test_scores_are_the_engines(url, local):
    rests = [" rock.", " cheese"]
    outputs = local.score([PROMPT] * 2, rests)
    answer = post(url, "/v1/score", prompt=PROMPT, continuation=rests).json()
    for entry, output in zip(answer["data"], outputs, strict=True):
        assert entry["token_logprobs"] == pytest.approx(output.logprobs, abs=1e-4)
        assert entry["score"] == pytest.approx(sum(output.logprobs), abs=1e-3)
        assert entry["is_greedy"] == all(output.greedy)
    ids = [local.tokenizer.encode(PROMPT), [5, 6]]
    again = post(url, "/v1/score", prompt=ids, continuation=[[7], [8, 9]]).json()["data"]
    assert [entry["token_ids"] for entry in again] == [[7], [8, 9]]
    refused(post(url, "/v1/score", prompt=["a", "b"], continuation="c"), 400, "continuation")
    refused(post(url, "/v1/score", prompt="a", continuation=[1]), 400, "continuation")


def test_echo_scores_the_prompt(url, local):
    """The form in which lm-evaluation-harness asks."""
    ids = local.tokenizer.encode(PROMPT)
    (expected,) = local.score([ids[:1]], [ids[1:]])
    body = {"prompt": [ids], "temperature": 0, "logprobs": 1, "seed": 1234, "echo": True}
    answer = post(url, **body, max_tokens=1)
    assert "NaN" not in answer.text
    assert "Infinity" not in answer.text
    (choice,) = answer.json()["choices"]
    shown = choice["logprobs"]
    assert [len(part) for part in shown.values()] == [len(ids) + 1] * 4
    assert shown["token_logprobs"][0] is None
    assert shown["top_logprobs"][0] is None
    assert shown["token_logprobs"][1:-1] == pytest.approx(expected.logprobs, abs=1e-4)
    for logprob, top, greedy in zip(
        shown["token_logprobs"][1:],
        shown["top_logprobs"][1:],
        [*expected.greedy, True],
        strict=True,
    ):
        assert (logprob == max(top.values())) == greedy
    offsets = [sum(map(len, shown["tokens"][:k])) for k in range(len(ids) + 1)]
    assert shown["text_offset"] == offsets
    assert choice["text"].startswith(PROMPT)
    only = post(url, **body, max_tokens=0).json()
    assert only["choices"][0]["text"] == PROMPT
    assert only["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(
        expected.logprobs, abs=1e-4
    )
    assert only["usage"]["completion_tokens"] == 0
    chunks = events(post(url, **body, max_tokens=2, stream=True))
    streamed = [v for c in chunks for v in c["choices"][0]["logprobs"]["token_logprobs"]]
    assert streamed[1:-2] == pytest.approx(expected.logprobs, abs=1e-4)


def test_a_token_that_ends_the_text_is_scored_too(url, local):
    end = local.tokenizer.eos_token_id
    body = {"prompt": [[5]], "max_tokens": 4, "logprobs": 1, "logit_bias": {str(end): 100}}
    (choice,) = completed(url, **body)
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == ""
    assert len(choice["logprobs"]["token_logprobs"]) == 1
    assert choice["logprobs"]["tokens"] == [local.tokenizer.eos_token]
    (longer,) = completed(url, **{**body, "ignore_eos": True})
    assert len(longer["logprobs"]["tokens"]) == 4


def test_tokens_there_and_back(url, local):
    tokens = post(url, "/tokenize", prompt=PROMPT, add_special_tokens=False).json()
    ids = local.tokenizer.encode(PROMPT)
    assert tokens == {"tokens": ids, "count": len(ids), "max_model_len": 256}
    assert post(url, "/detokenize", tokens=ids).json() == {"prompt": PROMPT}
    info = requests.get(f"{url}/tokenizer_info", params={"model": "large"}, timeout=TIMEOUT_S)
    assert info.json()["eos_token"] == local.tokenizer.eos_token
    assert info.json()["chat_template"] == TEMPLATE
    refused(post(url, "/detokenize", tokens=[300]), 400, "tokens", "vocabulary")


# lm-evaluation-harness

ITEMS = [
    {"question": "The moon is made of", "choices": ["rock", "cheese", "logits"], "answer": 0},
    {"question": "12 times 7 is", "choices": ["84", "five", "a train"], "answer": 0},
    {"question": "A train leaves at", "choices": ["four", "noon", "the moon"], "answer": 1},
    {"question": "Two and three is", "choices": ["five", "four", "84"], "answer": 0},
]


def test_the_harness_scores_as_our_own_evaluation_does(url, local, tmp_path):
    pytest.importorskip("lm_eval")
    questions = [item["question"] for item in ITEMS]
    said = [o.text for o in local.generate(questions, SamplingParams(max_tokens=8, stop=("\n",)))]
    assert all(text.strip() for text in said)
    lines = [{**item, "said": said[n] if n % 2 else "x"} for n, item in enumerate(ITEMS)]
    data = tmp_path / "items.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    files = TESTS / "fixtures" / "lm_eval"
    options = {
        "model": "local-completions",
        "model_args": f"model=dlf,base_url={url}/v1/completions,num_concurrent=8,max_length=255",
        "tasks": ",".join(
            str(files / f"{name}.yaml") for name in ("tiny_choice", "tiny_generation")
        ),
        "output_path": "found",
    }
    done = subprocess.run(
        [Path(sys.executable).parent / "lm_eval", "run", "--log_samples"]
        + [word for name, value in options.items() for word in (f"--{name}", value)],
        cwd=tmp_path,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OPENAI_API_KEY": "none"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "found").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]
    samples = {
        name: sorted(
            map(json.loads, next((tmp_path / "found").rglob(f"samples_{name}_*.jsonl")).open()),
            key=lambda sample: sample["doc_id"],
        )
        for name in ("tiny_choice", "tiny_generation")
    }
    ours = {}
    for name, metric, answer in (
        ("tiny_choice", "multiple_choice", "answer"),
        ("tiny_generation", "exact_match", "said"),
    ):
        task = own_task(data, "{question}", metric, answer=answer, max_tokens=8, stop=("\n",))
        items = task.load(data).items
        answered = {each.item.id: each for each in answers(local, task, items, {})}
        ours[name] = [answered[item.id] for item in items]

    def mean(task, metric):
        return sum(answer.scores[metric] for answer in ours[task]) / len(ITEMS)

    theirs = [resp[0] for sample in samples["tiny_choice"] for resp in sample["resps"]]
    choices = [choice for answer in ours["tiny_choice"] for choice in answer.response.choices]
    assert [float(t[0]) for t in theirs] == pytest.approx([c.logprob for c in choices], abs=1e-3)
    for metric in ("acc", "acc_norm"):
        assert found["tiny_choice"][f"{metric},none"] == mean("tiny_choice", metric)
    texts = [sample["resps"][0][0] for sample in samples["tiny_generation"]]
    assert texts == [answer.output.text for answer in ours["tiny_generation"]] == said
    assert found["tiny_generation"]["exact_match,none"] == mean(
        "tiny_generation", "exact_match_trimmed"
    )
    assert found["tiny_generation"]["exact_match,none"] == 0.5


# What it refuses


def test_bad_requests_are_refused_by_name(url):
    for body, status, words in BAD:
        began = time.perf_counter()
        answer = post(url, **body)
        took = time.perf_counter() - began
        if status == 200:
            assert answer.status_code == 200, answer.text
        else:
            refused(answer, status, words)
            assert took < SOON_S, body
    chat = "/v1/chat/completions"
    message = {"role": "user", "content": "x"}
    for body, words in [
        ({}, "`messages`"),
        ({"messages": []}, "`messages`"),
        ({"messages": [{**message, "nickname": "me"}]}, "`messages.0.nickname`"),
        ({"messages": [{**message, "role": "tool"}]}, "`messages.0.role`"),
        ({"messages": [message], "tools": [{"type": "function"}]}, "`tools`: tool calling"),
        ({"messages": [{**message, "role": "robot"}]}, "`messages.0.role`"),
        ({"messages": [message], "top_logprobs": 2}, "`top_logprobs`"),
        ({"messages": [message], "max_tokens": 0}, "`max_tokens`"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content`"),
    ]:
        refused(post(url, chat, **{"model": "large", **body}), 400, words)
    assert completed(url, prompt="x")


def test_bodies_that_are_none(url):
    def sent(data, type="application/json"):
        headers = {"Content-Type": type}
        return requests.post(f"{url}/v1/completions", data=data, headers=headers, timeout=SOON_S)

    refused(sent(b'{"prompt": '), 400, "JSON")
    refused(sent(b'{"prompt": "\xff"}'), 400)
    refused(sent(b"[" * 100_000), 400)
    refused(sent(b'{"prompt": "x", "temperature": NaN}'), 400, "`temperature`")
    refused(sent(b"[1]"), 400, "object")
    refused(sent(b"x=1", "application/x-www-form-urlencoded"), 400, "application/json")
    refused(requests.get(f"{url}/v1/nothing", timeout=SOON_S), 404, "/v1/nothing")
    refused(requests.get(f"{url}/v1/completions", timeout=SOON_S), 405, "GET")
    assert completed(url, prompt="x")


def test_a_body_of_100_mb_is_refused_unread(url):
    host, port = url.removeprefix("http://").split(":")
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with closing(socket.create_connection((host, int(port)), timeout=SOON_S)) as connection:
        connection.sendall(f"{head}Content-Length: 100000000\r\n\r\n".encode())
        assert b" 413 " in connection.recv(65536)
    with closing(socket.create_connection((host, int(port)), timeout=SOON_S)) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
        for _ in range(6):
            connection.sendall(chunk)
        assert b" 413 " in connection.recv(65536)
    refused(post(url, prompt="x" * 5_000_000), 413, "4194304")
    assert completed(url, prompt="x")


def test_connections_that_end_in_the_middle(url):
    host, port = url.removeprefix("http://").split(":")
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    body = json.dumps({"model": "dlf", "prompt": "x", "max_tokens": 2}).encode()
    for sent, shut in (
        (f"{head}Content-Length: 1000\r\n\r\n".encode() + body, False),
        (f"{head}Content-Length: 1000\r\n\r\n".encode() + body, True),
        (b"POST /v1/comp", True),
        (b"\x16\x03\x01\x02\x00", True),
    ):
        with closing(socket.create_connection((host, int(port)), timeout=SOON_S)) as connection:
            connection.sendall(sent)
            if shut:
                connection.shutdown(socket.SHUT_WR)
                connection.recv(65536)
    assert completed(url, prompt="x")


# Load


def test_64_at_once_get_what_single_ones_get(url, local):
    prompts = [[5 + k, 6, 7 + k % 5] for k in range(64)]
    expected = local.generate(prompts, SamplingParams(max_tokens=6))
    with ThreadPoolExecutor(64) as pool:
        answers = pool.map(
            lambda prompt: completed(url, prompt=prompt, max_tokens=6, temperature=0)[0]["text"],
            prompts,
        )
        assert list(answers) == [output.text for output in expected]


# Everything at once


@pytest.mark.slow
def test_no_request_of_the_schema_is_a_server_error(url):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    answers = {}

    def check(case):
        if case.meta.generation.mode.is_positive:
            case.body = meant(case.body, operation.path)
        answer = case.call(timeout=TIMEOUT_S)
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        answers.setdefault(operation.path, []).append(answer.status_code)

    bounded = settings(
        max_examples=20,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:
            if mode.is_positive or operation.body:
                bounded(given(operation.as_strategy(generation_mode=mode))(check))()
    print({path: {code: seen.count(code) for code in set(seen)} for path, seen in answers.items()})
    for path in MEANT:  # half of the bodies of each are meant to be good
        assert answers[path].count(200) >= 15, (path, answers[path])
        assert 400 in answers[path]
    assert 200 in answers["/v1/models"]


@pytest.mark.slow
def test_no_accepted_request_changes_what_another_is_answered(url, local):
    """Whatever is asked beside it, an innocent one's stream is what it is alone."""
    from hypothesis import HealthCheck, Phase, given, settings

    innocent = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    sampling = SamplingParams(max_tokens=24, ignore_eos=True)
    expected = local.generate(PROMPT, sampling)[0].text

    def streamed():
        answer = post(url, **innocent, stream=True)
        return "".join(each["choices"][0]["text"] for each in events(answer))

    with ThreadPoolExecutor(1) as beside:

        @settings(
            max_examples=40,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(accepted())
        def check(body):
            stream = beside.submit(streamed)
            answer = post(url, prompt=[5, 6, 7], max_tokens=4, **body)
            assert answer.status_code == 200, (body, answer.text)
            assert stream.result(TIMEOUT_S) == expected, body

        check()


def test_searches_of_too_many_candidates_are_refused(url):
    for fusion in ({"step": 1e-9}, {"step": 0.001}, {"bounds": {"math": [-100, 100]}}):
        answer = post(url, prompt="x", fusion=fusion)
        assert refused(answer, 400, "candidates")["param"] == "bounds"
    assert completed(url, prompt="x")
