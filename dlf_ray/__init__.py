"""Dynamic Logits Fusion on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dlf_ray.config import Family
from dlf_ray.engine.output import EngineError, Output
from dlf_ray.params import SamplingParams, StructuredOutputs

if TYPE_CHECKING:
    from dlf_ray.engine.engine import Engine
    from dlf_ray.engine.local import LocalEngine

__all__ = [
    "Engine",
    "EngineError",
    "Family",
    "LocalEngine",
    "Output",
    "SamplingParams",
    "StructuredOutputs",
]


def __getattr__(name: str) -> Any:
    # Only who asks for an engine pays for importing Ray or transformers.
    if name == "Engine":
        from dlf_ray.engine.engine import Engine

        return Engine
    if name == "LocalEngine":
        from dlf_ray.engine.local import LocalEngine

        return LocalEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
