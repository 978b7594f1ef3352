"""What is counted and timed, and the trace of a request; where the figures go is injected.

Names, labels and buckets are vLLM's wherever it measures the same thing, with the prefix `dlf_` in
the place of `vllm:`, so that its dashboards need no more than another prefix.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

PREFIX = "dlf_"
MODEL_NAME = "model_name"
"""The label that every metric has: the name under which the family is served."""

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
_LATENCY = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0)
_STAGE = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_WEIGHTS = (0.01, *(i / 5 for i in range(1, 11)))
_NATS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Metric:
    """One row of the table: its kind decides what a value does to it."""

    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()
    """Beside `model_name`."""
    buckets: tuple[float, ...] = ()


METRICS: Mapping[str, Metric] = {
    "num_requests_running": Metric("gauge", "Sequences that have a slot."),
    "num_requests_waiting": Metric("gauge", "Sequences that wait for a slot."),
    "kv_cache_usage_perc": Metric("gauge", "Used share of the large model's cache, 0 to 1."),
    "prompt_tokens": Metric("counter", "Tokens of prompts that were taken in."),
    "generation_tokens": Metric("counter", "Tokens generated."),
    "request_success": Metric("counter", "Requests that ended, by reason.", ("finished_reason",)),
    "request_queue_time_seconds": Metric("histogram", "Wait for a slot.", (), _LATENCY),
    "time_to_first_token_seconds": Metric("histogram", "Arrival to first token.", (), _SECONDS),
    "inter_token_latency_seconds": Metric("histogram", "Token to token.", (), _SECONDS),
    "e2e_request_latency_seconds": Metric("histogram", "Arrival to the end.", (), _LATENCY),
    "step_time_seconds": Metric("histogram", "Time of a step, by stage.", ("stage",), _STAGE),
    "forward_time_seconds": Metric("histogram", "Forward pass of a model.", ("model",), _STAGE),
    "expert_weight": Metric("histogram", "Weight of an expert, per token.", ("expert",), _WEIGHTS),
    "kl_divergence": Metric(
        "histogram",
        "Divergence of the fused distribution from the large model's and back, nats.",
        ("direction",),
        _NATS,
    ),
    "recoveries": Metric("counter", "Models that came back.", ("model", "reason")),
    "recovery_time_seconds": Metric("histogram", "Loss of a model to its return.", (), _LATENCY),
}


class Sink(Protocol):
    """Where values go."""

    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """Adds to the counter, sets the gauge, or observes in the histogram of that name."""


class MemorySink:
    """A sink that remembers: counters as sums, gauges as last values, histograms as lists."""

    def __init__(self) -> None:
        self.values: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)

    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        held = self.values[(name, *labels.values())]
        kind = METRICS[name].kind
        if kind == "counter":
            value += held[0] if held else 0.0
        if kind != "histogram":
            held.clear()
        held.append(value)


class Metrics:
    """Records into a sink, if there is one."""

    def __init__(self, sink: Sink | None = None) -> None:
        self._sink = sink

    def __call__(self, name: str, value: float, **labels: str) -> None:
        if self._sink is not None:
            self._sink.record(name, value, labels)


Span = tuple[str, str, float, float]
"""Actor, what it did, start in seconds since 1970, seconds."""


class Clock:
    """Where the time of one step goes."""

    def __init__(self) -> None:
        self.stages: defaultdict[str, float] = defaultdict(float)
        """Seconds of the coordinator's stages; `wait` is for models and transport."""
        self.forwards: dict[str, float] = {}
        """Seconds of each model's forward pass."""
        self.spans: list[Span] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start, began = time.time(), time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self.stages[name] += seconds
            self.spans.append(("coordinator", name, start, seconds))

    def forward(self, model: str, start: float, seconds: float) -> None:
        self.forwards[model] = seconds
        self.spans.append((model, "forward", start, seconds))


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """Spans in Chrome's trace event format.

    https://ui.perfetto.dev and chrome://tracing show it; every actor is a process there.
    """
    actors = {actor: number for number, actor in enumerate(dict.fromkeys(s[0] for s in spans))}
    names = [
        {"ph": "M", "name": "process_name", "pid": number, "tid": 0, "args": {"name": actor}}
        for actor, number in actors.items()
    ]
    events = [
        {
            "ph": "X",
            "name": what,
            "pid": actors[actor],
            "tid": 0,
            "ts": start * 1e6,
            "dur": seconds * 1e6,
        }
        for actor, what, start, seconds in spans
    ]
    return {"traceEvents": [*names, *events], "displayTimeUnit": "ms"}
