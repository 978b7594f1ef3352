"""The OpenAI-compatible endpoint on Ray Serve.

One light ingress speaks HTTP: it checks keys, sizes and bodies, and passes each request to the
family that serves the model it names. Each replica of a family owns an engine in the placement
group that Serve made for the replica, so that Serve adds and removes whole families. A client that
goes away is noticed by Serve, which cancels the ingress' task and with it the replica's; that frees
the engine's slots.
"""
# No `from __future__ import annotations`: Serve validates an application's arguments by the class
# that its builder is annotated with.

import asyncio
import hashlib
import hmac
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import ray
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dlf_ray.config import Family
from dlf_ray.engine import Engine
from dlf_ray.experts import Follower, want
from dlf_ray.frontend import EngineError, resolve
from dlf_ray.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ExpertRequest,
    Json,
    Problem,
    ScoreRequest,
    TokenizeRequest,
)
from dlf_ray.placement import check_cluster, label_selectors, needs, resources
from dlf_ray.replica import STREAM_END, Body, Model, Replica, event, to_json
from dlf_ray.worker import ModelWorker

FRONT_CPUS = 0.1
"""Of the ingress and of a replica's own process: they tokenize and write JSON, little else."""
READY_TIMEOUT_S = 2.0
HEALTH_PERIOD_S = 3.0
"""Serve replaces a replica after three checks that failed."""
KEYS = "DLF_API_KEYS"
OPEN_PATHS = ("/", "/health", "/ready")
"""What needs no API key."""
log = logging.getLogger("ray.serve")


class Settings(BaseModel):
    """The arguments of the application."""

    model_config = ConfigDict(extra="forbid")

    families: Annotated[dict[str, Model], Field(min_length=1)]
    """By the name that requests give as `model`; a file alone stands for its `family`."""
    autoscaling_config: AutoscalingConfig | None = None
    """Of every family's replicas, as Serve documents it; without it there is one of each."""
    max_queued: Annotated[int, Field(ge=0)] = 256
    """Sequences that may wait in a replica for a slot."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    max_body_bytes: Annotated[int, Field(gt=0)] = 4 * 2**20
    allow_expert_updates: bool = False
    """Whether requests may add experts to a family and take them out, with models of their choice:
    for those who trust whoever can send them."""

    @field_validator("families", mode="before")
    @classmethod
    def _files_alone(cls, families: Any) -> Any:
        if not isinstance(families, Mapping):
            return families
        return {k: {"family": v} if isinstance(v, str) else v for k, v in families.items()}


def build_app(args: Settings) -> Application:
    """The application, for `serve run` and `serve deploy`; see cluster/serve.yaml.

    API keys come from the environment that builds it (`DLF_API_KEYS`, by commas). Raises
    `ValueError` or `FileNotFoundError` where a family file, or what is set for it, is wrong.
    """
    return application(args)


def application(settings: Settings, worker: type[ModelWorker] = ModelWorker) -> Application:
    """See `build_app`; `worker` is what every model's actor runs."""
    shared: dict[str, dict[str, Model]] = {}
    for name, model in settings.families.items():
        shared.setdefault(str(Path(model.family).resolve()), {})[name] = model
    handles: dict[str, Any] = {}
    for number, (path, models) in enumerate(shared.items()):
        family = Family.from_yaml(path)
        for name, model in models.items():
            try:
                resolve(family, model.fusion.options())
            except ValueError as error:
                raise ValueError(f"model {name!r}: {error}") from None
            models[name] = model.model_copy(update={"chat_template": _template(model)})
        own = _family_deployment(f"family-{number}-{_plain(Path(path).stem)}", family, settings)
        bound = own.bind(family, models, settings.max_queued, worker)
        handles |= dict.fromkeys(models, bound)
    # In the order of the settings: the first one answers where a request names none.
    ordered = {name: handles[name] for name in settings.families}
    return Ingress.bind(ordered, settings, _key_digests(os.environ.get(KEYS)))  # type: ignore[attr-defined, no-any-return]


def _family_deployment(name: str, family: Family, settings: Settings) -> serve.Deployment:
    capacity = family.engine.max_num_seqs + settings.max_queued
    options: Json = {"num_replicas": 1}
    if settings.autoscaling_config:
        options = {"autoscaling_config": settings.autoscaling_config}
    labels = [{}, *label_selectors(family).values()]
    if any(labels):
        options["placement_group_bundle_label_selector"] = labels
    made: serve.Deployment = serve.deployment(
        name=name,
        ray_actor_options={"num_cpus": FRONT_CPUS},
        placement_group_bundles=[{"CPU": FRONT_CPUS}, *resources(family).values()],
        placement_group_strategy=family.engine.placement_strategy,
        # The replica refuses what it has no room for; Serve must let it come that far.
        max_ongoing_requests=2 * capacity,
        max_queued_requests=capacity,
        graceful_shutdown_timeout_s=settings.request_timeout_s,
        health_check_period_s=HEALTH_PERIOD_S,
        logging_config=LoggingConfig(enable_access_log=False),
        **options,
    )(FamilyServer)
    return made


def _plain(name: str) -> str:
    return re.sub(r"[^\w-]", "_", name)


def _template(model: Model) -> str | dict[str, str] | None:
    """The template's text. Raises `FileNotFoundError` where it names a file that is not there."""

    def text(given: str) -> str:
        return given if "{" in given else Path(given).read_text(encoding="utf-8")

    if isinstance(model.chat_template, dict):
        return {name: text(each) for name, each in model.chat_template.items()}
    return model.chat_template and text(model.chat_template)


def _key_digests(listed_keys: str | None) -> list[bytes]:
    """What is kept of the API keys. Raises `ValueError` where none is in the list."""
    if listed_keys is None:
        return []
    keys = [key.strip() for key in listed_keys.split(",") if key.strip()]
    if not keys:
        raise ValueError(f"{KEYS} holds no key; unset it to serve without keys")
    return [_digest(key.encode()) for key in keys]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class FamilyServer(Replica):
    """A replica that makes its engine in the placement group that Serve has made for it."""

    def __init__(
        self,
        family: Family,
        models: Mapping[str, Model],
        max_queued: int,
        worker: type[ModelWorker] = ModelWorker,
    ) -> None:
        group = ray.util.get_current_placement_group()
        engine = Engine(family, worker=worker, group=group, model_name=next(iter(models)))
        super().__init__(engine, models, max_queued)
        here = serve.get_replica_context()
        self.follower = Follower(engine, f"{here.app_name}#{here.deployment}")

    def experts(self) -> dict[str, str]:
        """The state of each expert."""
        return self.follower.states()

    def __del__(self) -> None:
        if engine := getattr(self, "engine", None):  # none if it did not start
            engine.close()

    def check_health(self) -> None:
        """Serve replaces a replica whose engine has failed."""
        if self.engine.failure:
            raise self.engine.failure

    async def ready(self) -> bool:
        """A replica that can say so is."""
        return True


@serve.deployment(
    ray_actor_options={"num_cpus": FRONT_CPUS},
    max_ongoing_requests=10_000,  # the families set the limits
    logging_config=LoggingConfig(enable_access_log=False),
)
@serve.ingress()
class Ingress:
    """Speaks HTTP and routes by the model's name."""

    def __init__(
        self, models: dict[str, DeploymentHandle[Any]], settings: Settings, keys: list[bytes]
    ) -> None:
        self.models = models
        self.settings = settings
        self.keys = keys

    def __serve_build_asgi_app__(self) -> ASGIApp:
        app = http_app(Router(self.models, self.settings), self.settings.max_body_bytes)
        return Guard(app, self.keys, self.settings.max_body_bytes)


class Router:
    """From a request to the family that answers it, and back to HTTP."""

    def __init__(self, models: Mapping[str, DeploymentHandle[Any]], settings: Settings) -> None:
        self.models = models
        self.families = {handle.deployment_id: handle for handle in models.values()}
        self.timeout_s = settings.request_timeout_s
        self.updates = settings.allow_expert_updates
        self.created = int(time.time())

    async def answer(self, request: Request, body: Body | None, model: str | None) -> Response:
        """The family's answer, streamed if that was asked for."""
        record = request.state.record
        record |= {"model": model, "user": getattr(body, "user", None)}
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
        except (RayServeException, ray.exceptions.RayActorError) as error:
            record["error"] = type(error).__name__
            yield Problem(503, "the model has no room or is restarting; try again later")
        finally:
            stream.cancel()

    async def is_ready(self) -> bool:
        async def asked(handle: DeploymentHandle[Any]) -> bool:
            try:
                return bool(await asyncio.wait_for(handle.ready.remote(), READY_TIMEOUT_S))
            except (TimeoutError, RayServeException, ray.exceptions.RayError):
                return False

        return all(await asyncio.gather(*map(asked, self.families.values())))

    async def experts(self, model: str | None) -> Json | Problem:
        """The experts of a model's family, as one of its replicas has them."""
        if model is None and len(self.families) == 1:
            model = next(iter(self.models))
        if model is None or model not in self.models:
            return self._unknown(model)
        states = await self.models[model].experts.remote()
        data = [{"id": n, "object": "expert", "state": state} for n, state in states.items()]
        return {"object": "list", "model": model, "data": data}

    async def update(self, model: str | None, name: str, expert: Json | None) -> Json | Problem:
        """Has all replicas of a model's family add an expert, or take it out."""
        if not self.updates:
            return Problem(403, "experts are fixed here: serve with `allow_expert_updates`")
        known = await self.experts(model)
        if isinstance(known, Problem):
            return known
        there = [each["id"] for each in known["data"] if each["state"] == "ready"]
        if expert is not None and name in there:
            return Problem(409, f"there is an expert {name!r} already", "name")
        if expert is None and name not in there:
            return Problem(404, f"there is no expert {name!r}; there are {there}")
        family = self.models[known["model"]].deployment_id
        try:
            want(f"{family.app_name}#{family.name}", name, expert)
        except ValueError as error:
            return Problem.invalid(error)
        return {"id": name, "object": "expert", "state": "changing"}

    def listing(self) -> Json:
        entry = {"object": "model", "created": self.created, "owned_by": "dlf_ray"}
        return {"object": "list", "data": [{"id": name, **entry} for name in self.models]}


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


def refusal(problem: Problem) -> Response:
    return Response(
        to_json(problem.body), problem.status, problem.headers, media_type="application/json"
    )


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
    async def models() -> Json:
        return router.listing()

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

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return FileResponse(str(files("dlf_ray") / "playground.html"), media_type="text/html")

    return app


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
        id = Headers(scope=scope)["x-request-id"]  # the client's, or one that Serve has given
        record: Json = {"id": id, "began": time.perf_counter(), "status": 499}
        scope.setdefault("state", {})["record"] = record

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                record["status"] = message["status"]
            await send(message)

        # Nothing is read of a body that says it is too large; others may grow until they are.
        length = Headers(scope=scope).get("content-length", "0")
        read = int(length) if length.isdecimal() else 0

        async def received() -> Message:
            nonlocal read
            message: Message = {"type": "http.disconnect"}
            if read <= self.max_body_bytes:
                message = await receive()
                read += len(message.get("body", b"")) if length == "0" else 0
            if read > self.max_body_bytes:
                raise StarletteHTTPException(413)
            return message

        try:
            if self._allowed(scope):
                await self.app(scope, received, sent)
            else:
                problem = Problem(401, "no valid API key: send `Authorization: Bearer KEY`")
                await refusal(problem)(scope, receive, sent)
        except Exception:
            # The client has its answer, from the application's handler or cut off.
            log.exception("request %s failed", id)
            record["status"] = 500
        finally:
            seconds = time.perf_counter() - record.pop("began")
            known = {name: value for name, value in record.items() if value is not None}
            place = {"method": scope["method"], "path": scope["path"]}
            self.log.info(
                json.dumps({"time": time.time(), **place, **known, "seconds": round(seconds, 4)})
            )

    def _allowed(self, scope: Scope) -> bool:
        if not self.keys or scope["path"].removeprefix(scope["root_path"]) in OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        digest = _digest(given.removeprefix(b"Bearer "))
        # All of them, so that the time says nothing about which one came close.
        matches = [hmac.compare_digest(digest, key) for key in self.keys]
        return any(matches)


def run_server(settings: Settings, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serves until it is interrupted or terminated; joins the Ray cluster that runs, or starts one.

    Raises `ValueError` or `EngineError` where the application cannot start.
    """
    started, mine = not ray.is_initialized(), False
    try:
        if started:
            ray.init(logging_level=logging.WARNING, include_dashboard=False)
        # Only now, since Ray sets a handler of its own, which aborts after three seconds.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        for model in settings.families.values():
            family = Family.from_yaml(model.family)
            check_cluster(needs(family), family.engine.placement_strategy)
        app = build_app(settings)
        if serve.status().proxies:
            raise EngineError(
                "the cluster runs Serve already; deploy to it with `serve deploy`, see "
                "cluster/serve.yaml"
            )
        mine = True
        serve.start(http_options=HTTPOptions(host=host, port=port))
        serve.run(app, name="dlf_ray")
        say(f"serving {', '.join(settings.families)} at http://{host}:{port}/v1; ctrl-C ends it")
        signal.pause()
    except KeyboardInterrupt:
        say("stopping")
    except EngineError:
        raise
    except RuntimeError as error:
        raise EngineError(f"the application did not start: {error}") from error
    finally:
        if mine:
            serve.shutdown()
        if started:
            ray.shutdown()
