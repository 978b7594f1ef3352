"""The endpoint as clients use it: real ones, over HTTP, with whatever they send by themselves."""

import json

import pytest
import requests
from asking import PROMPT, TIMEOUT_S
from conftest import family_file

from dlf_ray import Family, LocalEngine, SamplingParams

KEY = "a-key"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}: {{ m.content }}\n"
    "{% endfor %}assistant:"
)
HELLO = {"role": "user", "content": "Hello"}
TEXT = "user: Hello\nassistant:"
"""What the template makes of it."""
LONG = "moon " * 300
"""More tokens than the context has."""
SCHEMA = {
    "title": "Person",
    "description": "Somebody.",
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["age"],
    "additionalProperties": False,
}
PATHS = {"completions": {"prompt": "x"}, "chat/completions": {"messages": [HELLO]}}


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    return family_file(folder, tmp_path_factory.mktemp("clients") / "tiny.yaml")


@pytest.fixture(scope="module")
def url(root, file):
    """An endpoint that asks for a key, with one family under two names."""
    from ray import serve

    from dlf_ray.serving.app import Settings, build_app

    model = {"family": file, "chat_template": TEMPLATE}
    settings = Settings.model_validate({"families": {"dlf": model, "org/other": model}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLF_API_KEYS", KEY)
        app = build_app(settings)
    serve.run(app, name="clients", route_prefix="/")
    return f"{root}/v1"


@pytest.fixture(scope="module")
def said(file):
    """What the family says in eight tokens."""
    with LocalEngine(Family.from_yaml(file)) as engine:
        yield lambda text: engine.generate(text, SamplingParams(max_tokens=8))[0].text


# The openai package


@pytest.fixture(scope="module")
def client(url):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=TIMEOUT_S)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": [5] * 256}, "prompt"),  # no room to answer
        ("completions", {"prompt": [5] * 257}, "prompt"),
        ("completions", {"prompt": LONG}, "prompt"),
        ("completions", {"prompt": LONG * 100}, "prompt"),  # not even tokenized
        ("chat/completions", {"messages": [{**HELLO, "content": LONG}]}, "messages"),
        ("chat/completions", {"messages": [{**HELLO, "content": LONG * 100}]}, "messages"),
        ("chat/completions", {"messages": [HELLO] * 90, "stream": True}, "messages"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_prompt_beyond_the_context_has_openais_code(client, path, body, param):
    import openai

    ask = client.completions if path == "completions" else client.chat.completions
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256") as caught:
        ask.create(model="dlf", max_tokens=4, **body)
    error = caught.value
    assert (error.code, error.type) == ("context_length_exceeded", "invalid_request_error")
    assert error.param == param


def test_errors_are_those_that_the_package_knows(client):
    import openai

    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key="another").models.list()
    assert caught.value.code == "invalid_api_key"
    for ask in (
        lambda: client.models.retrieve("gpt"),
        lambda: client.chat.completions.create(model="gpt", messages=[HELLO]),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "model_not_found"
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with pytest.raises(openai.BadRequestError, match="`tools`: tool calling is not supported"):
        client.chat.completions.create(model="dlf", messages=[HELLO], tools=[tool])


def test_models_are_described(client, folder):
    first, second = client.models.list()
    assert (first.id, second.id) == ("dlf", "org/other")
    assert first.max_model_len == second.max_model_len == 256
    assert first.root == str(folder / "large")
    assert client.models.retrieve("org/other") == second


def test_heads_are_answered(url):
    headers = {"Authorization": f"bearer  {KEY}"}
    for path in ("/models", "/models/dlf"):
        answer = requests.head(url + path, headers=headers, timeout=TIMEOUT_S)
        assert (answer.status_code, answer.content) == (200, b"")
        assert int(answer.headers["Content-Length"]) > 10


def test_conversations_go_on_with_the_clients_own_messages(client, said):
    asked = {"model": "dlf", "max_tokens": 8, "temperature": 0}
    first = client.chat.completions.create(
        messages=[{**HELLO, "name": "Ann"}], store=False, user="me", tools=[], **asked
    )
    assert first.choices[0].message.content == said("user Ann: Hello\nassistant:")
    messages = [HELLO, first.choices[0].message, {"role": "user", "content": "Yes?"}]
    second = client.chat.completions.create(messages=messages, **asked)
    text = f"user: Hello\nassistant: {first.choices[0].message.content}\nuser: Yes?\nassistant:"
    assert second.choices[0].message.content == said(text)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "shape",
    [
        {"response_format": {"type": "json_object"}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
            }
        },
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"regex": "[ab]+"}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
    ],
    ids=["object", "schema", "json", "regex", "choice"],
)
def test_shapes_are_taken(url, path, shape):
    body = {"model": "dlf", "max_tokens": 4, **PATHS[path], **shape}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = requests.post(f"{url}/{path}", json=body, headers=headers, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text


EMOJI = "The moon \U0001f600 é"


def test_parts_of_characters_have_their_bytes(client):
    echo = {"model": "dlf", "prompt": EMOJI, "echo": True, "logprobs": 2, "max_tokens": 0}
    shown = client.completions.create(**echo).choices[0].logprobs
    assert "".join(shown.tokens) == EMOJI
    assert "" in shown.tokens  # the first parts of a character
    before = ["".join(shown.tokens[:k]) for k in range(len(shown.tokens))]
    assert shown.text_offset == list(map(len, before))
    asked = {"prompt": "The moon", "continuation": EMOJI}
    scored = posted(client, "/v1/score", **asked)["data"][0]["tokens"]
    assert "".join(scored) == EMOJI
    tokens = posted(client, "/tokenize", prompt="\U0001f600")["tokens"]
    answer = client.chat.completions.create(
        model="dlf",
        messages=[HELLO],
        max_tokens=12,
        logprobs=True,
        top_logprobs=1,
        logit_bias={str(token): 100 for token in tokens},
    )
    entries = answer.choices[0].logprobs.content
    said = b"".join(bytes(each.bytes) for each in entries)
    assert len(said) == 12  # each token is a byte
    assert set(said) <= set("\U0001f600".encode())


def posted(client, path, **body):
    answer = requests.post(
        str(client.base_url).replace("/v1/", path),
        json={"model": "dlf", **body},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=TIMEOUT_S,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


# LiteLLM


@pytest.fixture
def litellm(url, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    found = pytest.importorskip("litellm")
    found.suppress_debug_info = True
    return found


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm_chats(litellm, url, said, provider):
    asked = {"model": f"{provider}/dlf", "api_base": url, "api_key": KEY, "messages": [HELLO]}
    asked |= {"max_tokens": 8, "temperature": 0}
    answer = litellm.completion(**asked)
    assert answer.choices[0].message.content == said(TEXT)
    chunks = litellm.completion(**asked, stream=True, stream_options={"include_usage": True})
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == said(TEXT)


def test_litellm_completes(litellm, url, said):
    answer = litellm.text_completion(
        model="text-completion-openai/dlf",
        api_base=url,
        api_key=KEY,
        prompt=PROMPT,
        max_tokens=8,
        temperature=0,
    )
    assert answer.choices[0].text == said(PROMPT)


def test_litellm_knows_the_errors(litellm, url):
    asked = {"model": "openai/dlf", "api_base": url, "api_key": KEY, "num_retries": 0}
    for messages, changed, error in (
        ([{**HELLO, "content": LONG}], {}, litellm.ContextWindowExceededError),
        ([{**HELLO, "content": LONG * 100}], {}, litellm.ContextWindowExceededError),
        ([HELLO] * 90, {"stream": True}, litellm.ContextWindowExceededError),
        ([HELLO], {"api_key": "another"}, litellm.AuthenticationError),
        ([HELLO], {"model": "openai/gpt"}, litellm.NotFoundError),
        ([HELLO], {"top_k": -5}, litellm.BadRequestError),
    ):
        with pytest.raises(error):
            litellm.completion(messages=messages, **{**asked, **changed})


# LangChain


@pytest.fixture
def chat(url):
    openai = pytest.importorskip("langchain_openai")
    return openai.ChatOpenAI(
        base_url=url, api_key=KEY, model="dlf", max_tokens=8, temperature=0, max_retries=0
    )


def test_langchain_chats(chat, said):
    assert chat.invoke("Hello").content == said(TEXT)
    assert "".join(piece.content for piece in chat.stream("Hello")) == said(TEXT)
    assert chat.bind_tools([]).invoke("Hello").content == said(TEXT)
    named = chat.invoke([("system", "Be short."), {**HELLO, "name": "Ann"}]).content
    assert named == said("system: Be short.\nuser Ann: Hello\nassistant:")
    assert [each.content for each in chat.batch(["Hello"] * 3)] == [said(TEXT)] * 3


def test_langchain_asks_for_a_schema(chat):
    patient = chat.model_copy(update={"max_tokens": 90, "temperature": 1.0, "seed": 0})
    shaped = patient.with_structured_output(SCHEMA, method="json_schema")
    for each in shaped.batch(["Hello", "Good bye", "Who?"]):
        assert set(each) == {"age"}
        assert 0 <= each["age"] < 100


def test_langchain_asks_for_an_object(chat):
    import openai

    shaped = chat.with_structured_output(SCHEMA, method="json_mode")
    with pytest.raises(openai.LengthFinishReasonError) as caught:  # of eight tokens
        shaped.invoke("Hello")
    assert caught.value.completion.choices[0].message.content.startswith("{")


def test_langchain_is_told_what_there_is_not(chat):
    import openai

    for asking in (
        chat.with_structured_output(SCHEMA, method="function_calling"),
        chat.bind_tools([SCHEMA]),
    ):
        with pytest.raises(openai.BadRequestError, match="tool calling is not supported"):
            asking.invoke("Hello")
    with pytest.raises(openai.BadRequestError) as caught:
        chat.invoke(LONG)
    assert caught.value.code == "context_length_exceeded"


def test_langchain_completes(url, said):
    openai = pytest.importorskip("langchain_openai")
    llm = openai.OpenAI(
        base_url=url, api_key=KEY, model="dlf", max_tokens=8, temperature=0, max_retries=0
    )
    assert llm.invoke(PROMPT) == said(PROMPT)
    assert "".join(llm.stream(PROMPT)) == said(PROMPT)


# LlamaIndex


@pytest.mark.parametrize("chat_model", [True, False])
def test_llama_index_asks(url, said, chat_model):
    like = pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.llms import ChatMessage

    llm = like.OpenAILike(
        model="dlf",
        api_base=url,
        api_key=KEY,
        is_chat_model=chat_model,
        max_tokens=8,
        temperature=0,
        max_retries=0,
    )
    text = "user: The moon\nassistant:" if chat_model else "The moon"
    assert llm.complete("The moon").text == said(text)
    assert "".join(piece.delta for piece in llm.stream_complete("The moon")) == said(text)
    if chat_model:
        messages = [ChatMessage(role="system", content="Be short."), ChatMessage(content="Hello")]
        text = "system: Be short.\nuser: Hello\nassistant:"
        assert llm.chat(messages).message.content == said(text)
        assert "".join(each.delta for each in llm.stream_chat(messages)) == said(text)


# lm-evaluation-harness


def test_the_harness_chats(url, said, monkeypatch):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    lm = LocalChatCompletion(base_url=f"{url}/chat/completions", model="dlf", num_concurrent=2)
    contexts = [lm.apply_chat_template([{**HELLO, "content": text}]) for text in ("Hello", "Yes")]
    how = {"until": ["\n\n\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}
    asked = [
        Instance("generate_until", {}, (context, dict(how)), number, ("task", number, 1))
        for number, context in enumerate(contexts)
    ]
    expected = [said(TEXT), said("user: Yes\nassistant:")]
    assert lm.generate_until(asked, disable_tqdm=True) == expected
    assert json.loads(contexts[0].prompt)[0]["content"] == "Hello"
