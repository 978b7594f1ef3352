"""What a coordinator counts and times: fed once a step, beside the path of a token."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from dlf_ray.decoding.stream import Stream
from dlf_ray.messages import Chunk, Recovery
from dlf_ray.metrics import Clock, Metrics, Sink

DIRECTIONS = ("fused_large", "large_fused")


class Telemetry:
    """Records into a sink; keeps the trace of each request that asked for one."""

    def __init__(self, sink: Sink | None) -> None:
        self.record = Metrics(sink)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._traced: set[Stream] = set()

    def started(self, sequences: Iterable[Stream]) -> None:
        """These have been given a slot; for some of them it is not the first."""
        for sequence in sequences:
            if not sequence.started:
                sequence.started = True
                waited = time.time() - sequence.arrived
                sequence.spans.append(("coordinator", "queue", sequence.arrived, waited))
                if sequence.request.trace:
                    self._traced.add(sequence)
                request = sequence.request
                tokens = len(request.prompt_of(request.models[0])) + len(request.continuation)
                self.record("request_queue_time_seconds", waited)
                self.record("prompt_tokens", tokens)

    def ended(self, sequence: Stream, reason: str) -> None:
        self._traced.discard(sequence)
        self.record("request_success", 1, finished_reason=reason)

    def recovered(self, recovery: Recovery) -> None:
        self.record("recoveries", 1, model=recovery.model, reason=recovery.reason)
        self.record("recovery_time_seconds", recovery.seconds)

    def stage(self, stage: str, seconds: float) -> None:
        """Seconds of a stage that is not part of a step's clock."""
        self.seconds[stage] += seconds
        self.record("step_time_seconds", seconds, stage=stage)

    def step(self, clock: Clock, news: Sequence[tuple[Stream, Chunk]]) -> list[tuple[str, Chunk]]:
        """Counts one step; its news for their clients, those of traced requests with a trace."""
        for stage, seconds in clock.stages.items():
            self.stage(stage, seconds)
        for model, seconds in clock.forwards.items():
            self.seconds[f"forward {model}"] += seconds
            self.record("forward_time_seconds", seconds, model=model)
        for sequence in self._traced:
            sequence.spans += clock.spans
        now = time.time()
        generated = 0
        told = []
        for sequence, chunk in news:
            if len(chunk.token_ids) > chunk.given:
                generated += 1
                self._token(sequence, chunk, now)
            if chunk.finish_reason:
                self.record("e2e_request_latency_seconds", now - sequence.arrived)
                if sequence.request.trace:
                    chunk = replace(chunk, spans=tuple(sequence.spans))
                self.ended(sequence, str(chunk.finish_reason))
            told.append((sequence.client, chunk))
        if generated:
            self.record("generation_tokens", generated)
        return told

    def _token(self, sequence: Stream, chunk: Chunk, now: float) -> None:
        first = sequence.emitted is None
        name = "time_to_first_token_seconds" if first else "inter_token_latency_seconds"
        self.record(name, now - (sequence.emitted or sequence.arrived))
        sequence.emitted = now
        if weights := chunk.weights[-1]:
            for expert, weight in zip(sequence.request.fusion.experts, weights, strict=True):
                self.record("expert_weight", weight, expert=expert)
            for direction, nats in zip(DIRECTIONS, chunk.kl[-1], strict=True):
                self.record("kl_divergence", nats, direction=direction)
