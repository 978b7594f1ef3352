"""What stands around the routes, without Serve: sizes, lost connections, the log."""

import asyncio
import json
import logging

import pytest
from pydantic import ValidationError
from starlette.datastructures import Headers

from dlf_ray.serving.app import Settings
from dlf_ray.serving.guard import Guard, digest, with_origins
from dlf_ray.serving.http import READY_EVERY_S, Router, http_app

LIMIT = 1000


class Families:
    """In the place of a router."""

    async def listing(self):
        return {"object": "list", "data": []}

    async def answer(self, request, body, model):
        raise RuntimeError("a mistake")


@pytest.fixture
def guard(caplog):
    made = Guard(http_app(Families(), LIMIT), [], LIMIT)
    made.log.handlers = [caplog.handler]
    return made


def asked(app, *args, **kwargs):
    """The status and the body that an application answers with, see `messages`."""
    sent = messages(app, *args, **kwargs)
    starts = [message["status"] for message in sent if message["type"] == "http.response.start"]
    return starts, b"".join(message.get("body", b"") for message in sent)


def head(app, *args, **kwargs):
    """The status and the headers that an application answers with, see `messages`."""
    start, *_ = messages(app, *args, **kwargs)
    return start["status"], Headers(raw=start["headers"])


def messages(app, path="/v1/models", method="GET", headers=(), incoming=(), then=None):
    """What an application answers; `incoming` are pieces of the request's body, after which `then`
    is what happens to the connection."""
    pieces = [{"type": "http.request", "body": p, "more_body": True} for p in incoming]
    if not then:
        pieces.append({"type": "http.request", "body": b"", "more_body": False})
    sent = []

    async def receive():
        if pieces:
            return pieces.pop(0)
        if isinstance(then, Exception):
            raise then
        if then == "gone":
            return {"type": "http.disconnect"}
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.1"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "scheme": "http",
    }
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    return sent


def logged(caplog):
    """What the log has of the only request."""
    (line,) = [r.getMessage() for r in caplog.records if r.name == "dlf_ray.requests"]
    return json.loads(line)


TYPE = ("content-type", "application/json")


@pytest.mark.parametrize(
    "headers",
    [
        [("content-length", "5"), ("transfer-encoding", "chunked")],
        [("content-length", "5")],
        [("transfer-encoding", "chunked")],
        [("content-length", "x")],
        [],
    ],
    ids=str,
)
def test_bytes_are_counted_whatever_the_headers_say(guard, headers):
    pieces = [b" " * 400] * 3
    (status,), body = asked(guard, "/v1/score", "POST", [TYPE, *headers], pieces, "gone")
    assert status == 413
    assert str(LIMIT) in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("length", ["1001", "9" * 5000])
def test_a_body_that_says_it_is_too_large_is_not_read(guard, length):
    never = RuntimeError("was read")
    (status,), _ = asked(guard, "/v1/score", "POST", [("content-length", length)], [], never)
    assert status == 413


def test_the_head_of_an_answer(guard, caplog):
    (status,), body = asked(guard, method="HEAD")
    assert (status, body) == (200, b"")
    assert logged(caplog)["method"] == "HEAD"


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer the key", 200),
        ("bearer the key", 200),
        ("BEARER   the key ", 200),
        ("Bearer another", 401),
        ("Bearer", 401),
        ("the key", 401),
        ("Basic the key", 401),
        ("", 401),
    ],
)
def test_a_key_is_taken_as_clients_write_it(header, status):
    guard = Guard(http_app(Families(), LIMIT), [digest(b"the key")], LIMIT)
    (found,), body = asked(guard, headers=[("authorization", header)])
    assert found == status
    if status == 401:
        assert json.loads(body)["error"]["code"] == "invalid_api_key"


PAGE = ("origin", "https://chat.example.com")
MAY_I = [
    PAGE,
    ("access-control-request-method", "POST"),
    ("access-control-request-headers", "authorization,content-type"),
]
"""What a browser asks before a page of another origin may ask; it sends no key along."""


def of_origins(origins):
    guard = Guard(http_app(Families(), LIMIT), [digest(b"key")], LIMIT)
    return with_origins(guard, origins)


@pytest.mark.parametrize("origins", [["*"], [PAGE[1], "http://localhost:3000"]], ids=str)
def test_pages_of_other_origins_may_ask(origins):
    app = of_origins(origins)
    status, headers = head(app, "/v1/chat/completions", "OPTIONS", MAY_I)
    assert status == 200
    assert "authorization" in headers["Access-Control-Allow-Headers"]
    for key, expected in (("key", 200), ("another", 401)):
        status, headers = head(app, headers=[PAGE, ("authorization", f"Bearer {key}")])
        assert status == expected
        assert headers["Access-Control-Allow-Origin"] in ("*", PAGE[1])
        assert "Retry-After" in headers["Access-Control-Expose-Headers"]


@pytest.mark.parametrize("origins", [[], ["https://another.example.com"]], ids=str)
def test_pages_of_origins_that_are_not_named_may_not(origins):
    app = of_origins(origins)
    status, first = head(app, "/v1/chat/completions", "OPTIONS", MAY_I)
    assert status in (400, 401)
    _, second = head(app, headers=[PAGE, ("authorization", "Bearer key")])
    for headers in (first, second):
        assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize("origin", ['["*"]', "chat.example.com", "https://x.example.com/chat", ""])
def test_what_is_no_origin_is_refused(origin):
    with pytest.raises(ValidationError, match="is no origin"):
        Settings(families={"x": "x.yaml"}, cors_allow_origins=[origin])


def test_a_request_without_an_id_gets_one(guard, caplog):
    (status,), _ = asked(guard)
    assert status == 200
    assert len(logged(caplog)["id"]) == 32


def test_an_id_is_short(guard, caplog):
    (status,), body = asked(guard, headers=[("x-request-id", "i" * 257)])
    assert status == 400
    assert json.loads(body)["error"]["message"].startswith("`X-Request-Id`")
    assert logged(caplog)["id"] == "i" * 256


def errors(caplog):
    return [r for r in caplog.records if r.levelno >= logging.ERROR]


def streaming(pause_s):
    """An application that says one thing, then another after a while."""

    async def app(scope, receive, send):
        from fastapi.responses import StreamingResponse

        async def parts():
            yield b"one"
            await asyncio.sleep(pause_s)
            yield b"two"

        await StreamingResponse(parts())(scope, receive, send)

    return app


class CannotBeAsked(Exception):
    """As Ray raises where a message of the client's can be fetched no more."""


@pytest.mark.parametrize("how", ["gone", CannotBeAsked()], ids=str)
def test_a_client_that_leaves_a_stream_is_logged_as_that(caplog, how):
    guard = Guard(streaming(10), [], LIMIT)
    guard.log.handlers = [caplog.handler]
    (status,), body = asked(guard, then=how)
    assert (status, body) == (200, b"one")
    assert logged(caplog)["status"] == 499
    assert not errors(caplog)


def test_a_client_that_stays_is_not(caplog):
    guard = Guard(streaming(0), [], LIMIT)
    guard.log.handlers = [caplog.handler]
    assert asked(guard)[1] == b"onetwo"
    assert logged(caplog)["status"] == 200


@pytest.mark.parametrize("how", ["gone", CannotBeAsked()], ids=str)
def test_a_client_that_leaves_while_it_sends_is_logged_as_that(guard, caplog, how):
    asked(guard, "/v1/score", "POST", [TYPE, ("content-length", "100")], [b"{"], how)
    assert logged(caplog)["status"] == 499
    assert not errors(caplog)


def test_a_mistake_is_an_error(guard, caplog):
    body = b'{"prompt": "a", "continuation": "b"}'
    (status,), _ = asked(guard, "/v1/score", "POST", [TYPE], [body])
    assert status == 500
    assert logged(caplog)["status"] == 500
    assert errors(caplog)


def test_families_are_asked_once_a_second_whether_they_are_ready():
    class Ready:
        deployment_id = "family"
        asked = 0

        @property
        def ready(self):
            return self

        def remote(self):
            self.asked += 1
            return asyncio.sleep(0.05, True)

    async def main():
        family = Ready()
        router = Router({"a": family, "b": family}, timeout_s=1, updates=False)
        first = asyncio.ensure_future(router.is_ready())
        others = [asyncio.ensure_future(router.is_ready()) for _ in range(50)]
        await asyncio.sleep(0)
        first.cancel()  # a caller that leaves takes nothing from the others
        assert await asyncio.gather(*others) == [True] * 50
        assert await router.is_ready()
        assert family.asked == 1
        await asyncio.sleep(READY_EVERY_S + 0.1)
        assert await router.is_ready()
        assert family.asked == 2

    asyncio.run(main())
