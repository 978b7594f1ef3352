"""The playground in a real browser: it streams, shows weights, keeps foreign text inert, stops."""

import itertools
import json
import re
import shutil
import urllib.error
import urllib.request

import pytest
from conftest import family_file
from playwright.sync_api import expect, sync_playwright
from processes import free_port
from ray import serve
from workers import STEP_S, Slow

from dlf_ray.serving.app import Settings, application

CHROMIUM = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), ""
)
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
FUSION = {"large": {"alone": "large"}, "static": {"rule": "static"}, "dynamic": {}}
"""What each pane asks for."""
PROMPT = "Twelve <b>times</b> seven?\n\tIt is"
EVIL = "<img src=http://evil.example/x.png onerror=alert(1)><script>alert(2)</script>"
TRICKY = ["Grüße", "", " 🦉\n", "\t", EVIL, " שלום", "\n", "</p>&amp;\x01", "long" * 100]
"""What a careless page would run, drop or run together."""

expect.set_options(timeout=30_000)  # a busy machine takes seconds to show a page
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on PATH")


def sse(*bodies):
    """As server-sent events."""
    return "".join(f"data: {json.dumps(body, ensure_ascii=False)}\n\n" for body in bodies)


def chunk(tokens, experts, weights, finish_reason=None):
    kl = [[0.125, 0.25]] * len(tokens)
    fusion = {"tokens": tokens, "experts": experts, "weights": weights, "kl": kl}
    choice = {"index": 0, "text": "".join(tokens), "finish_reason": finish_reason, "fusion": fusion}
    return {"id": "c", "object": "text_completion", "choices": [choice], "usage": None}


def end(tokens):
    usage = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}
    return sse({"choices": [], "usage": usage}) + "data: [DONE]\n\n"


@pytest.fixture(scope="module")
def url(ray_cluster, folder, tmp_path_factory):
    """The family of tiny models, served on the session's cluster."""
    file = family_file(folder, tmp_path_factory.mktemp("playground") / "tiny.yaml")
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    families = {"tiny": {"family": file, "chat_template": TEMPLATE}}
    settings = Settings.model_validate({"families": families})
    serve.run(application(settings, worker=Slow), name="playground")
    yield f"http://127.0.0.1:{port}/"
    serve.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def problems():
    """What the browser complained of, and whom it asked that is not the server."""
    return []


@pytest.fixture
def page(browser, url, problems):
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(30_000)
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    page.on(
        "request", lambda it: None if it.url.startswith((url, "data:")) else problems.append(it.url)
    )
    page.goto(url)
    expect(page.get_by_label("Model")).not_to_have_value("")
    page.get_by_label("Prompt").fill(PROMPT)
    yield page
    page.close()
    assert not problems


def pane(page, name):
    return page.locator(f"#pane-{name}")


def tokens(page, name):
    return pane(page, name).locator(".token")


def run(page, length=8):
    page.get_by_label("Max tokens").fill(str(length))
    page.keyboard.press("Control+Enter")


def done(page, names=FUSION):
    for name in names:
        expect(pane(page, name).locator(".figures")).not_to_be_empty(timeout=30_000)


def posted(url, fusion, length, prompt=PROMPT, messages=None):
    """The request that the page is to send, and the choices of all events that answer it."""
    path = "chat/completions" if messages else "completions"
    body = {
        "model": json.load(urllib.request.urlopen(f"{url}v1/models", timeout=30))["data"][0]["id"],
        **({"messages": messages} if messages else {"prompt": prompt}),
        "max_tokens": length,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "fusion": fusion | {"return_weights": True},
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}v1/{path}", json.dumps(body).encode(), headers)
    lines = urllib.request.urlopen(request, timeout=60).read().decode().split("\n\n")
    events = [
        json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")
    ]
    return body, [choice for event in events for choice in event["choices"]]


def joined(choices, field):
    """Of all choices that have tokens; a chat begins with one that has none."""
    return list(itertools.chain(*(each["fusion"][field] for each in choices if "fusion" in each)))


def answered_by(page, *bodies):
    """Every completion is answered by `bodies`, whatever the server would say."""
    answer = {"content_type": "text/event-stream", "body": "".join(bodies)}
    page.route("**/v1/completions", lambda route: route.fulfill(**answer))


def test_answers_stream_side_by_side(page, url):
    sent = []
    page.on("request", lambda it: sent.append(it.post_data_json) if it.method == "POST" else None)
    page.evaluate(
        """() => {
            window.times = [];
            const watch = new MutationObserver(() => times.push(performance.now()));
            watch.observe(document.querySelector("#pane-dynamic .answer"), { childList: true });
        }"""
    )
    run(page, length=40)
    done(page)
    times = page.evaluate("() => times")
    assert times[-1] - times[0] > 20 * STEP_S * 1000  # as they come, not all at the end
    for name, fusion in FUSION.items():
        body, choices = posted(url, fusion, 40)
        assert body in sent
        pieces = joined(choices, "tokens")
        assert tokens(page, name).evaluate_all("all => all.map(t => t.textContent)") == pieces
        assert pane(page, name).locator(".answer").text_content() == "".join(pieces)
        figures = pane(page, name).locator(".figures").text_content()
        reason = choices[-1]["finish_reason"]
        seen = rf"{len(pieces)} tokens · [\d.]+ s · [\d.]+ tokens/s · finish reason: {reason}"
        assert re.fullmatch(seen, figures)
        told = page.get_by_role("log").text_content()
        assert f"{figures}" in told
        assert "".join(pieces[:3]).strip() in told
    assert len(sent) == 3


def test_tokens_have_the_colour_of_their_expert(page, url):
    run(page, length=40)
    done(page)
    assert tokens(page, "large").and_(page.locator("[data-expert]")).count() == 0
    expect(pane(page, "large").locator("table")).to_be_hidden()
    # Equal weights: nobody carries the token more than others do.
    several = tokens(page, "static").and_(page.locator("[data-expert='several equally']"))
    expect(several).to_have_count(tokens(page, "static").count())
    _, choices = posted(url, {}, 40)
    experts, weights = joined(choices, "experts"), joined(choices, "weights")
    seen = tokens(page, "dynamic").evaluate_all("all => all.map(t => t.dataset.expert ?? null)")
    assert seen == experts
    looks = "t => [getComputedStyle(t).borderBottomColor, getComputedStyle(t).borderBottomStyle]"
    for name in weights[0]:
        row = pane(page, "dynamic").get_by_role("row", name=name)
        mean = sum(each[name] for each in weights) / len(weights)
        assert row.locator("td").all_text_contents() == [str(experts.count(name)), f"{mean:.2f}"]
        swatch = row.locator(".swatch").evaluate(looks)
        for token in (
            tokens(page, "dynamic").and_(page.locator(f"[data-expert='{name}']")).all()[:2]
        ):
            assert token.evaluate(looks) == swatch
    drawn = {tuple(s.evaluate(looks)) for s in pane(page, "dynamic").locator(".swatch").all()}
    assert len(drawn) == len(weights[0]) + 1  # one look for each, and one for the large model


def test_weights_of_a_token_by_pointer_and_by_keyboard(page, url):
    run(page)
    done(page)
    _, choices = posted(url, {}, 8)
    weights, kl = joined(choices, "weights"), joined(choices, "kl")
    last = len(weights) - 1
    card = page.get_by_role("tooltip")

    def shows(number):
        numbers = [*weights[number].values()]
        expect(card).to_contain_text(f"Token {number + 1},")
        assert card.locator("dd").all_text_contents() == [
            *(f"{weight:.2f}" for weight in numbers),
            *(f"{nats:.3f}" for nats in kl[number]),
        ]

    tokens(page, "dynamic").nth(2).hover()
    shows(2)
    page.get_by_role("heading", level=1).hover()
    expect(card).to_be_hidden()
    tokens(page, "dynamic").nth(1).click()  # as a tap does
    for key, number in [("ArrowRight", 2), ("End", last), ("ArrowLeft", last - 1), ("Home", 0)]:
        page.keyboard.press(key)
        expect(tokens(page, "dynamic").nth(number)).to_be_focused()
        shows(number)
    tokens(page, "dynamic").nth(3).hover()
    shows(3)
    page.get_by_role("heading", level=1).hover()
    expect(card).to_contain_text("Token 1,")  # the one in focus again
    page.keyboard.press("Escape")
    expect(card).to_be_hidden()
    # An answer is one stop of the Tab key.
    page.keyboard.press("Shift+Tab")
    expect(tokens(page, "static").first).to_be_focused()


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_foreign_text_is_inert_and_fits(page, width, scheme):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    weights = [{"math": 0.5, EVIL: -2.0}] * len(TRICKY)
    answered_by(page, sse(chunk(TRICKY, [EVIL] * len(TRICKY), weights, "stop")), end(len(TRICKY)))
    run(page)
    done(page)
    answer = pane(page, "dynamic").locator(".answer")
    assert answer.text_content() == "".join(TRICKY)
    assert answer.locator(":scope :not(.token)").count() == 0
    assert page.locator("img, .pane script").count() == 0
    last = tokens(page, "dynamic").last
    last.focus()
    expect(page.get_by_role("tooltip")).to_contain_text(f"carried by {EVIL}")
    assert page.get_by_role("tooltip").locator("img").count() == 0
    box = page.get_by_role("tooltip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert page.evaluate("() => document.documentElement.scrollWidth") == width
    page.get_by_role("radio", name="Chat").check()
    assert page.evaluate("() => document.documentElement.scrollWidth") == width
    dark = (
        page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    )
    assert dark == (scheme == "dark")


def test_events_however_they_are_cut(page):
    stream = 'data: {"a": "Grüße 🦉"}\n\n: comment\n\n'
    stream += "data: one\r\ndata: two\r\n\r\ndata: [DONE]\n\ndata: ha"
    seen = page.evaluate(
        """async text => {
            const bytes = new TextEncoder().encode(text), seen = [];
            const cut = new ReadableStream({ start(to) {
                for (let i = 0; i < bytes.length; i++) to.enqueue(bytes.slice(i, i + 1));
                to.close();
            } });
            for await (const event of events(cut)) seen.push(event);
            return seen;
        }""",
        stream,
    )
    assert seen == ['{"a": "Grüße 🦉"}', "one\ntwo", "[DONE]"]


def test_a_conversation(page, url):
    """Every pane remembers its own answers; tokens keep their colours; a new one begins anew."""
    sent = []
    page.on("request", lambda it: sent.append(it.post_data_json) if it.method == "POST" else None)
    page.get_by_role("radio", name="Chat").check()
    page.get_by_label("System message").fill("Be short.")
    said = {name: [{"role": "system", "content": "Be short."}] for name in FUSION}
    message = page.get_by_label("Message", exact=True)
    for text in ("Hello <b>there</b>", "And you?"):
        message.fill(text)
        run(page)
        expect(message).to_have_value("")
        expect(page.get_by_role("button", name="Stop")).to_be_disabled()
        for name, fusion in FUSION.items():
            said[name].append({"role": "user", "content": text})
            body, choices = posted(url, fusion, 8, messages=said[name])
            assert body in sent
            pieces, experts = joined(choices, "tokens"), joined(choices, "experts")
            now = pane(page, name).locator(".answer .token")
            assert now.evaluate_all("all => all.map(t => t.textContent)") == pieces
            assert pane(page, name).locator(".said").all_text_contents() == [
                each["content"] for each in said[name]
            ]
            if name == "dynamic":
                seen = "all => all.map(t => t.dataset.expert ?? null)"
                assert now.evaluate_all(seen) == experts
            said[name].append({"role": "assistant", "content": "".join(pieces)})
    roles = pane(page, "large").locator(".said").evaluate_all("all => all.map(e => e.dataset.role)")
    assert roles == ["system", "user", "assistant", "user"]
    assert page.locator(".said b").count() == 0
    tokens(page, "dynamic").first.click()  # one of the first answer
    expect(page.get_by_role("tooltip")).to_contain_text("Token 1,")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".said")).to_have_count(0)
    expect(page.locator(".token")).to_have_count(0)
    page.get_by_role("radio", name="Completion").check()
    expect(page.get_by_label("System message")).to_be_hidden()


def test_a_message_that_is_refused_was_not_said(page, problems):
    page.get_by_role("radio", name="Chat").check()
    message = page.get_by_label("Message", exact=True)
    message.fill("Hello")
    run(page)
    done(page)
    message.fill("word " * 300)
    run(page)
    for name in FUSION:
        expect(pane(page, name).get_by_role("alert")).to_be_visible()
        expect(pane(page, name).locator(".said")).to_have_count(2)
    expect(message).to_have_value("word " * 300)  # to be made shorter
    assert all("status of 400" in problem for problem in problems)
    problems.clear()
    message.fill("And you?")
    run(page)
    done(page)
    for name in FUSION:
        expect(pane(page, name).locator(".said")).to_have_count(3)
        expect(pane(page, name).locator(".said").last).to_have_text("And you?")


def test_the_server_refuses(page, url, problems):
    too_long = "word " * 300
    with pytest.raises(urllib.error.HTTPError) as refusal:
        posted(url, {}, 8, prompt=too_long)
    message = json.load(refusal.value)["error"]["message"]
    page.get_by_label("Prompt").fill(too_long)
    run(page)
    for name in FUSION:
        expect(pane(page, name).get_by_role("alert")).to_have_text(message)
    expect(page.get_by_role("button", name="Run")).to_be_enabled()
    assert all("status of 400" in problem for problem in problems)
    problems.clear()
    page.get_by_label("Prompt").fill(PROMPT)
    run(page)  # begins anew
    done(page)
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (sse({"error": {"message": "the model 'math' has died"}}), "the model 'math' has died"),
        ("", "The connection ended before the answer did."),
    ],
    ids=["said", "silent"],
)
def test_the_server_fails_on_the_way(page, then, message):
    answered_by(page, sse(chunk(["One", " two"], [None] * 2, [{}] * 2)), then)
    run(page)
    done(page)
    expect(pane(page, "large").get_by_role("alert")).to_have_text(message)
    expect(pane(page, "large").locator(".answer")).to_have_text("One two")
    expect(pane(page, "large").locator(".figures")).to_contain_text("2 tokens")


def test_stop(page):
    run(page, length=200)
    expect(tokens(page, "dynamic").first).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    done(page)
    expect(pane(page, "dynamic").locator(".figures")).to_contain_text("stopped by you")
    expect(page.get_by_role("alert")).to_have_count(0)
    count = tokens(page, "dynamic").count()
    assert 0 < count < 200
    expect(page.get_by_role("button", name="Run")).to_be_focused()
    run(page, length=4)
    expect(tokens(page, "dynamic")).to_have_count(4)


def test_only_what_is_asked_for_and_with_the_key(page):
    asked = []
    page.on("request", lambda request: asked.append(request))
    page.get_by_label("API key").fill("secret")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("select").select_option("blend")
    page.get_by_role("checkbox", name="Static").uncheck()
    page.get_by_role("checkbox", name="Large alone").uncheck()
    page.get_by_label("Max tokens").fill("3")
    page.get_by_role("button", name="Run").click()
    done(page, ["dynamic"])
    expect(pane(page, "static")).to_be_hidden()
    assert [request.method for request in asked] == ["GET", "POST"]  # the models once more, by key
    assert all(request.headers["authorization"] == "Bearer secret" for request in asked)
    body = asked[-1].post_data_json
    assert body["temperature"] == 0.5
    assert body["fusion"] == {"select": "blend", "return_weights": True}
    kept = "() => localStorage.length + sessionStorage.length + document.cookie.length"
    assert page.evaluate(kept) == 0
    page.get_by_role("checkbox", name="Dynamic").uncheck()
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_have_text("Choose at least one answer.")
