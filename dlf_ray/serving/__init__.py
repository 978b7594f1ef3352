"""OpenAI's API for families, as an application for Ray Serve: `dlf_ray.serving:build_app`.

`app` are the deployments, `http` the routes, `guard` what stands around them, `openai` the
requests, `wire` what their fields are made of, `anyway` those fields that change nothing, `shapes`
those that say what answers must be like, `answers` what is said to them, `tokens` what single
tokens read, `replica` a family behind them, `experts` those that join or leave it meanwhile.
FastAPI and Serve are imported nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlf_ray.serving.app import build_app

__all__ = ["build_app"]


def __getattr__(name: str) -> Any:
    # Only who builds the application pays for importing Serve.
    if name == "build_app":
        from dlf_ray.serving.app import build_app

        return build_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
