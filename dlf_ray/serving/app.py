"""The OpenAI-compatible endpoint on Ray Serve: its settings, its deployments, its life.

One light ingress speaks HTTP (see `http`) and passes each request to the family that serves the
model it names. Each replica of a family owns an engine in the placement group that Serve made for
the replica, so that Serve adds and removes whole families. A client that goes away is noticed by
Serve, which cancels the ingress' task and with it the replica's; that frees the engine's slots.
"""
# No `from __future__ import annotations`: Serve validates an application's arguments by the class
# that its builder is annotated with.

import hashlib
import logging
import os
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import ray
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from dlf_ray.config import Family
from dlf_ray.engine.engine import Engine
from dlf_ray.engine.options import resolve
from dlf_ray.engine.output import EngineError
from dlf_ray.engine.placement import check_cluster, label_selectors, needs, resources, settled
from dlf_ray.models.worker import ModelWorker
from dlf_ray.serving.experts import Follower, Report
from dlf_ray.serving.guard import Guard, digest, with_origins
from dlf_ray.serving.http import Router, http_app
from dlf_ray.serving.replica import Model, Replica
from dlf_ray.serving.wire import Json

FRONT_CPUS = 0.1
"""Of the ingress and of a replica's own process: they tokenize and write JSON, little else."""
HEALTH_PERIOD_S = 3.0
"""Serve replaces a replica after three checks that failed."""
KEYS = "DLF_API_KEYS"


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
    cors_allow_origins: list[str] = []
    """Of pages elsewhere that browsers may let ask: `https://chat.example.com`, or `*` for all."""
    allow_expert_updates: bool = False
    """Whether requests may add experts to a family and take them out, with models of their choice:
    for those who trust whoever can send them."""

    @field_validator("families", mode="before")
    @classmethod
    def _files_alone(cls, families: Any) -> Any:
        if not isinstance(families, Mapping):
            return families
        return {k: {"family": v} if isinstance(v, str) else v for k, v in families.items()}

    @field_validator("cors_allow_origins")
    @classmethod
    def _origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(
                    f"{origin!r} is no origin: give `*`, or one without a path, such as "
                    "https://chat.example.com"
                )
        return origins


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
        shared.setdefault(_path(model), {})[name] = model
    handles: dict[str, Any] = {}
    families = _families(settings)
    for path, models in shared.items():
        family = families[path]
        for name, model in models.items():
            try:
                resolve(family, model.fusion.options())
            except ValueError as error:
                raise ValueError(f"model {name!r}: {error}") from None
            models[name] = model.model_copy(update={"chat_template": _template(model)})
        own = _family_deployment(_deployment_name(path), family, settings)
        bound = own.bind(family, models, settings.max_queued, worker)
        handles |= dict.fromkeys(models, bound)
    # In the order of the settings: the first one answers where a request names none.
    ordered = {name: handles[name] for name in settings.families}
    # Requests wait here for a family that is being replaced, which takes as long as it loads; where
    # the ingress is replaced too, the old one has to stay for them.
    ingress: Any = Ingress.options(graceful_shutdown_timeout_s=settings.request_timeout_s)  # type: ignore[attr-defined]
    made: Application = ingress.bind(ordered, settings, _key_digests(os.environ.get(KEYS)))
    return made


def _families(settings: Settings) -> dict[str, Family]:
    """The families by the paths of their files, each with what it takes of the cluster, if that is
    known here, beside the ingress and the other replicas."""
    paths = dict.fromkeys(map(_path, settings.families.values()))
    families = {path: Family.from_yaml(path) for path in paths}
    if not ray.is_initialized():
        return families
    scaling = settings.autoscaling_config
    copies = len(families) * (scaling.max_replicas if scaling else 1)
    return {path: settled(each, copies, 2 * FRONT_CPUS) for path, each in families.items()}


def _path(model: Model) -> str:
    return str(Path(model.family).resolve())


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


def _deployment_name(path: str) -> str:
    """By the file alone, so that a family stays what it is where others come or go."""
    digest = hashlib.sha256(path.encode()).hexdigest()[:8]
    plain = re.sub(r"[^\w-]", "_", Path(path).stem)
    return f"family-{plain}-{digest}"


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
    return [digest(key.encode()) for key in keys]


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
        self.follower = Follower(engine, f"{here.app_name}#{here.deployment}", here.replica_tag)
        self.follower.start()

    def experts(self) -> Report:
        """The state of each expert in this replica."""
        return self.follower.report

    def __del__(self) -> None:
        if engine := getattr(self, "engine", None):  # none if it did not start
            engine.close()

    def check_health(self) -> None:
        """Serve replaces a replica whose engine has failed, or does not answer."""
        self.engine.check_health()

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
        own = self.settings
        router = Router(
            self.models, timeout_s=own.request_timeout_s, updates=own.allow_expert_updates
        )
        guard = Guard(http_app(router, own.max_body_bytes), self.keys, own.max_body_bytes)
        return with_origins(guard, own.cors_allow_origins)


def run_server(settings: Settings, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serves until it is interrupted or terminated; joins the Ray cluster that runs, or starts one.

    Raises `ValueError` or `EngineError` where the application cannot start.
    """
    started, mine = not ray.is_initialized(), False
    try:
        if started:
            # Of Ray's processes: 5 s are too few for a proxy that starts on a busy machine.
            os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
            ray.init(logging_level=logging.WARNING, include_dashboard=False)
        # Only now, since Ray sets a handler of its own, which aborts after three seconds.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        for family in _families(settings).values():
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
