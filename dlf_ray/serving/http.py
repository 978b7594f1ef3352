"""HTTP: the routes. From a request to the family that it names, and back.

The same application answers every path in OpenAI's words, errors included.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import ray
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp

from dlf_ray.rules import RULES, SELECTS
from dlf_ray.serving.experts import changes, overall, want
from dlf_ray.serving.guard import refusal
from dlf_ray.serving.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ExpertRequest,
    Problem,
    ScoreRequest,
    TokenizeRequest,
)
from dlf_ray.serving.replica import STREAM_END, Body, event, to_json
from dlf_ray.serving.wire import Json

READY_TIMEOUT_S = 2.0
READY_EVERY_S = 1.0
"""So often, at most, all families are asked whether they are ready: anybody may ask for that."""
EXPERTS_TIMEOUT_S = 10.0


class Router:
    """From a request to the family that answers it, and back to HTTP."""

    def __init__(
        self, models: Mapping[str, DeploymentHandle[Any]], *, timeout_s: float, updates: bool
    ) -> None:
        """`models` by the names of requests; `updates` says whether those may change experts."""
        self.models = models
        self.families = {handle.deployment_id: handle for handle in models.values()}
        self.timeout_s = timeout_s
        self.updates = updates
        self.created = int(time.time())
        self._ready: asyncio.Future[bool] | None = None
        self._asked = 0.0

    async def answer(self, request: Request, body: Body | None, model: str | None) -> Response:
        """The family's answer, streamed if that was asked for."""
        record = request.state.record
        user = getattr(body, "user", None) or getattr(body, "safety_identifier", None)
        record |= {"model": model, "user": user}
        if model is None and len(self.families) == 1:
            model = next(iter(self.models))
        if model is None or model not in self.models:
            return refusal(self._unknown(model))
        record["model"] = model
        items = self._items(model, body, record)
        first = await anext(items)
        if isinstance(first, Problem):
            await items.aclose()
            return refusal(first)
        record["first_s"] = round(time.perf_counter() - record["began"], 4)
        if getattr(body, "stream", False):
            headers = {"Cache-Control": "no-cache"}
            return StreamingResponse(_events(first, items), 200, headers, "text/event-stream")
        async for _ in items:
            pass  # the usage
        return Response(first, media_type="application/json")

    def _unknown(self, model: str | None) -> Problem:
        if model is None:
            return Problem(400, f"`model` is missing; there are {list(self.models)}", "model")
        message = f"there is no model {model!r}; there are {list(self.models)}"
        return Problem(404, message, "model", "model_not_found")

    async def _items(
        self, model: str, body: Body | None, record: Json
    ) -> AsyncGenerator[bytes | Problem, None]:
        """What the replica sends; ends with a problem if it fails, or takes too long."""
        stream: Any = (
            self.models[model].options(stream=True).answer.remote(model, body, record["id"])
        )
        end = asyncio.get_running_loop().time() + self.timeout_s
        try:
            while True:
                async with asyncio.timeout_at(end):
                    item = await anext(stream)
                if isinstance(item, dict):
                    record |= item
                else:
                    if isinstance(item, Problem):
                        record["error"] = item.message
                    yield item
        except StopAsyncIteration:
            return
        except TimeoutError:
            record["error"] = "timeout"
            yield Problem(
                504, f"no end within {self.timeout_s:g} s; try again later, or ask for fewer tokens"
            )
        except ray.exceptions.RayTaskError:
            raise  # not a replica that is away, but a mistake in one
        except (RayServeException, ray.exceptions.RayError) as error:
            record["error"] = type(error).__name__
            yield Problem(503, "the model has no room or is restarting; try again later")
        finally:
            stream.cancel()

    async def is_ready(self) -> bool:
        """Whether all families answer, as of a second ago."""
        now = asyncio.get_running_loop().time()
        if self._ready is None or (self._ready.done() and now > self._asked + READY_EVERY_S):
            self._asked = now
            self._ready = asyncio.ensure_future(self._all_ready())
        return await asyncio.shield(self._ready)  # it is not one caller's alone

    async def _all_ready(self) -> bool:
        asked = [_soon(handle.ready.remote()) for handle in self.families.values()]
        return all(await asyncio.gather(*asked))

    async def experts(self, model: str | None) -> Json | Problem:
        """The experts of a model's family, with their states in all of its replicas."""
        if model is None and len(self.families) == 1:
            model = next(iter(self.models))
        if model is None or model not in self.models:
            return self._unknown(model)
        handle = self.models[model]
        asked: Any = handle.broadcast("experts")
        try:
            reports = await asked.results_async(timeout_s=EXPERTS_TIMEOUT_S)
        except (TimeoutError, RayServeException, ray.exceptions.RayError):
            return Problem(503, "not all replicas of the model answer; try again later")
        noted = await asyncio.to_thread(changes, _noted_as(handle))
        data = [{"id": n, "object": "expert", **each} for n, each in overall(noted, reports)]
        return {"object": "list", "model": model, "data": data}

    async def update(self, model: str | None, name: str, expert: Json | None) -> Json | Problem:
        """Has all replicas of a model's family add an expert, or take it out."""
        if not self.updates:
            return Problem(403, "experts are fixed here: serve with `allow_expert_updates`")
        known = await self.experts(model)
        if isinstance(known, Problem):
            return known
        states = {each["id"]: each["state"] for each in known["data"]}
        if expert is not None and states.get(name) == "ready":
            return Problem(409, f"there is an expert {name!r} already", "name")
        if expert is None and name not in states:
            return Problem(404, f"there is no expert {name!r}; there are {list(states)}")
        try:
            family = _noted_as(self.models[known["model"]])
            await asyncio.to_thread(want, family, name, expert)
        except ValueError as error:
            return Problem.invalid(error)
        return {"id": name, "object": "expert", "state": "changing"}

    async def listing(self) -> Json:
        """All models, with what is known of those whose families answer."""
        asked = [_soon(handle.card.remote()) for handle in self.families.values()]
        cards = dict(zip(self.families, await asyncio.gather(*asked), strict=True))
        entry = {"object": "model", "created": self.created, "owned_by": "dlf_ray", "parent": None}
        unknown = {"root": None, "max_model_len": None}
        data = [
            {"id": name, **entry, **(cards[handle.deployment_id] or unknown)}
            for name, handle in self.models.items()
        ]
        return {"object": "list", "data": data}

    async def model(self, model: str) -> Json | Problem:
        """One of them."""
        listed = (await self.listing())["data"]
        return next((each for each in listed if each["id"] == model), self._unknown(model))


async def _soon(response: Any) -> Any:
    """What a replica answers, if it does so at once."""
    try:
        return await asyncio.wait_for(response, READY_TIMEOUT_S)
    except (TimeoutError, RayServeException, ray.exceptions.RayError):
        return None


def _noted_as(handle: DeploymentHandle[Any]) -> str:
    """The name under which changes of a family's experts are noted."""
    return f"{handle.deployment_id.app_name}#{handle.deployment_id.name}"


async def _events(
    first: bytes, items: AsyncGenerator[bytes | Problem, None]
) -> AsyncGenerator[bytes, None]:
    """The stream; a problem on the way is its last event but the end's."""
    async with aclosing(items) as rest:
        yield first
        async for item in rest:
            if isinstance(item, Problem):
                yield event(item.body) + STREAM_END
            else:
                yield item


def said(what: Json | Problem, status: int = 200) -> Response:
    if isinstance(what, Problem):
        return refusal(what)
    return Response(to_json(what), status, media_type="application/json")


def http_app(router: Router, max_body_bytes: int) -> ASGIApp:
    """The routes, with every error in OpenAI's words."""
    app = FastAPI(
        title="dlf_ray",
        description="Dynamic Logits Fusion behind OpenAI's API.",
        version=version("dlf_ray"),
    )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return refusal(Problem.of_validation(error.errors()))

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> Response:
        message = {
            404: f"there is nothing at {request.url.path}; see /docs",
            405: f"{request.url.path} does not take {request.method}",
            413: f"the body is larger than {max_body_bytes} bytes",
        }.get(error.status_code, str(error.detail))
        return refusal(Problem(error.status_code, message))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        id = request.state.record["id"]
        return refusal(Problem(500, f"the server failed; its log has the request as {id}"))

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await router.answer(request, body, body.model)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await router.answer(request, body, body.model)

    @app.post("/v1/score")
    async def score(request: Request, body: ScoreRequest) -> Response:
        return await router.answer(request, body, body.model)

    @app.post("/tokenize")
    async def tokenize(request: Request, body: TokenizeRequest) -> Response:
        return await router.answer(request, body, body.model)

    @app.post("/detokenize")
    async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
        return await router.answer(request, body, body.model)

    @app.get("/tokenizer_info")
    async def tokenizer_info(request: Request, model: str | None = None) -> Response:
        return await router.answer(request, None, model)

    @app.get("/v1/models")
    async def models() -> Response:
        return said(await router.listing())

    @app.get("/v1/models/{model:path}")
    async def one_model(model: str) -> Response:
        return said(await router.model(model))

    @app.get("/v1/experts")
    async def experts(model: str | None = None) -> Response:
        return said(await router.experts(model))

    @app.post("/v1/experts")
    async def add_expert(body: ExpertRequest) -> Response:
        return said(await router.update(body.model, body.name, body.expert), 202)

    @app.delete("/v1/experts/{name}")
    async def remove_expert(name: str, model: str | None = None) -> Response:
        return said(await router.update(model, name, None), 202)

    @app.get("/health")
    async def health() -> Json:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        if await router.is_ready():
            return Response(to_json({"status": "ready"}), media_type="application/json")
        return refusal(Problem(503, "not all models answer yet"))

    page = _playground()

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return HTMLResponse(page)

    return app


def _playground() -> str:
    """The page, with the rules and selections that there are."""
    page = (files("dlf_ray.serving") / "playground.html").read_text(encoding="utf-8")
    # Given weights are a pane of their own.
    rules = [name for name, rule in RULES.items() if not rule.given]
    for place, names in (("{rules}", rules), ("{selects}", list(SELECTS))):
        page = page.replace(place, "".join(f"<option>{name}</option>" for name in names))
    return page
