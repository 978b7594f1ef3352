"""Around the routes: API keys, sizes, the log, clients that leave, pages of other origins."""

import hashlib
import hmac
import json
import logging
import sys
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dlf_ray.serving.openai import Problem
from dlf_ray.serving.replica import to_json
from dlf_ray.serving.wire import MAX_NAME, Json

OPEN_PATHS = ("/", "/health", "/ready")
"""What needs no API key."""
LEFT = 499
"""The status in the log of a request whose client did not wait for the end of its answer."""
log = logging.getLogger("ray.serve")


def with_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """An application that pages of these origins may ask, or of all with `*`. Whether they may is
    asked before they send their key."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["Retry-After", "X-Request-Id"],
    )


def refusal(problem: Problem) -> Response:
    return Response(
        to_json(problem.body), problem.status, problem.headers, media_type="application/json"
    )


class Connection:
    """The client's end of one request: how much it sends, whether it stays for the answer."""

    def __init__(
        self, receive: Receive, send: Send, max_body_bytes: int, *, head: bool = False
    ) -> None:
        """With `head`, the client wants no body."""
        self._receive = receive
        self._send = send
        self._max = max_body_bytes
        self._head = head
        self._read = 0
        self._answered = False
        self._status = LEFT
        self.left = False
        """It went away before its answer was complete."""

    @property
    def status(self) -> int:
        """Of the answer, if the client got all of it."""
        return self._status if self._answered else LEFT

    @status.setter
    def status(self, status: int) -> None:
        self._status, self._answered = status, True

    async def receive(self) -> Message:
        """Raises `HTTPException` 413 where the body is too large, whatever its header says."""
        message: Message = {"type": "http.disconnect"}
        try:
            message = await self._receive()
        except Exception as error:  # Serve could not ask the proxy any more: as good as that
            log.debug("the connection of a client ended: %r", error)
        if message["type"] == "http.disconnect":
            self.left = self.left or not self._answered
        self._read += len(message.get("body", b""))
        if self._read > self._max:
            raise HTTPException(413)
        return message

    async def send(self, message: Message) -> None:
        bare = self._head and message["type"] == "http.response.body"
        await self._send({**message, "body": b""} if bare else message)
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif not message.get("more_body", False):
            self._answered = not self.left


class Guard:
    """Around everything else: API keys, the size limit, one line in the log for each request."""

    def __init__(self, app: ASGIApp, keys: Sequence[bytes], max_body_bytes: int) -> None:
        self.app = app
        self.keys = keys
        self.max_body_bytes = max_body_bytes
        self.log = logging.getLogger("dlf_ray.requests")
        self.log.propagate = False
        self.log.setLevel(logging.INFO)
        self.log.handlers = [logging.StreamHandler(sys.stdout)]  # a line of JSON and nothing else

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        # The client's, or one that Serve has given; another front may give none.
        id = headers.get("x-request-id") or uuid.uuid4().hex
        record: Json = {"id": id[:MAX_NAME], "began": time.perf_counter()}
        scope.setdefault("state", {})["record"] = record
        head, method = scope["method"] == "HEAD", scope["method"]
        connection = Connection(receive, send, self.max_body_bytes, head=head)
        scope = {**scope, "method": "GET"} if head else scope  # the same but for the body
        try:
            if problem := self._refused(scope, headers, id):
                await refusal(problem)(scope, receive, connection.send)
            else:
                await self.app(scope, connection.receive, connection.send)
        except Exception:
            # The client has its answer, from the application's handler or cut off; or it has left.
            if not connection.left:
                log.exception("request %s failed", record["id"])
                connection.status = 500
        finally:
            record["status"] = connection.status
            seconds = time.perf_counter() - record.pop("began")
            known = {name: value for name, value in record.items() if value is not None}
            place = {"method": method, "path": scope["path"]}
            self.log.info(
                json.dumps({"time": time.time(), **place, **known, "seconds": round(seconds, 4)})
            )

    def _refused(self, scope: Scope, headers: Headers, id: str) -> Problem | None:
        """Why a request gets no further, by its headers alone."""
        if not self._allowed(scope):
            return Problem(401, "no valid API key: send `Authorization: Bearer KEY`")
        if len(id) > MAX_NAME:
            return Problem(400, f"`X-Request-Id` is longer than {MAX_NAME} characters")
        length = headers.get("content-length", "")
        # Compared as text as well: Python makes no number of thousands of digits.
        if length.isdecimal() and (len(length) > 18 or int(length) > self.max_body_bytes):
            return Problem(413, f"the body is larger than {self.max_body_bytes} bytes")
        return None

    def _allowed(self, scope: Scope) -> bool:
        if not self.keys or scope["path"].removeprefix(scope["root_path"]) in OPEN_PATHS:
            return True
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        sent = digest(given.strip())
        # All of them, so that the time says nothing about which one came close.
        matches = [hmac.compare_digest(sent, key) for key in self.keys]
        return scheme.lower() == b"bearer" and any(matches)


def digest(key: bytes) -> bytes:
    """What is kept of an API key."""
    return hashlib.sha256(key).digest()
