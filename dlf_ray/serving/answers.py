"""OpenAI's answers: choices with their log-probabilities, whole or in chunks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dlf_ray.engine.output import Output
from dlf_ray.metrics import Span, chrome_trace
from dlf_ray.serving.openai import ChatRequest, CompletionRequest
from dlf_ray.serving.tokens import BytesOf, Reading
from dlf_ray.serving.wire import Json

LOWEST = -9999.0
"""Stands for the logarithm of 0, which JSON cannot write; the number is vLLM's."""


@dataclass
class Tokens:
    """Tokens with their log-probabilities, as both kinds of answers show them."""

    ids: Sequence[int]
    logprobs: Sequence[float | None]
    top: Sequence[Mapping[int, float]]
    """As many as `ids`, or none at all."""

    @classmethod
    def of(cls, output: Output, prompt: Sequence[int] = ()) -> Tokens:
        """Those that were generated, after those of an echoed `prompt`, whose first has none."""
        shown: list[int] = []
        logprobs: list[float | None] = []
        top: list[Mapping[int, float]] = []
        if prompt:
            shown, logprobs, top = [*prompt], [None], [{}]
            logprobs += output.prompt_logprobs
            top += output.prompt_top_logprobs or [{}] * len(output.prompt_logprobs)
        top += output.top_logprobs or [{}] * len(output.logprobs)
        return cls([*shown, *output.token_ids], [*logprobs, *output.logprobs], top)


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def completion_logprobs(tokens: Tokens, reading: Reading) -> Json:
    """The `logprobs` of a completion, of tokens that go on with a text."""
    shown: list[str] = []
    offsets: list[int] = []
    tops: list[dict[str, float] | None] = []
    for id, logprob, top in zip(tokens.ids, tokens.logprobs, tokens.top, strict=True):
        named: dict[str, float] = {}
        for other, value in top.items():  # the most probable of those that read alike stays
            named.setdefault(reading.instead(other), finite(value))
        offsets.append(reading.length)
        shown.append(reading.take(id))
        if logprob is not None:
            named.setdefault(shown[-1], finite(logprob))
        tops.append(None if logprob is None else named)
    return {
        "tokens": shown,
        "token_logprobs": [None if value is None else finite(value) for value in tokens.logprobs],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def chat_logprobs(tokens: Tokens, reading: Reading) -> Json:
    """The `logprobs` of a chat completion, of tokens that go on with a text."""

    def entry(token: int, read: str, logprob: float | None) -> Json:
        known = list(reading.bytes_of(token))
        return {"token": read, "logprob": finite(logprob or 0.0), "bytes": known}

    content = []
    for id, logprob, top in zip(tokens.ids, tokens.logprobs, tokens.top, strict=True):
        others = [entry(other, reading.instead(other), value) for other, value in top.items()]
        content.append({**entry(id, reading.take(id), logprob), "top_logprobs": others})
    return {"content": content}


def shown_fusion(output: Output) -> Json:
    """The `fusion` of a choice: one entry per generated token."""
    return {
        "tokens": output.pieces,
        "experts": output.experts,
        "weights": output.weights,
        "kl": output.kl,
    }


def usage(prompt: int, completion: int) -> Json:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


@dataclass
class Answer:
    """Writes the answer to one request, whole or in chunks; choices are numbered as sequences."""

    request: CompletionRequest | ChatRequest
    id: str
    model: str
    prompts: Sequence[Sequence[int]]
    """The prompt of each choice, of the large model where they differ."""
    bytes_of: BytesOf
    echoes: Sequence[str]
    """What the prompt of each choice reads."""
    spans: Sequence[Span] = ()
    """What was done for the request before it came to the engine, if it is traced."""
    created: int = field(default_factory=lambda: int(time.time()))
    generated: int = 0
    """Tokens so far."""
    _readings: dict[int, Reading] = field(default_factory=dict)
    """Of each choice that has begun."""
    _held: dict[int, Output] = field(default_factory=dict)
    """Scores of echoed prompts, which come before anything is generated."""

    @property
    def usage(self) -> Json:
        # Each prompt counts once, however many answers it gets.
        return usage(sum(map(len, self.prompts[:: self.request.n])), self.generated)

    def whole(self, outputs: Sequence[Output]) -> Json:
        choices = [self._choice(index, output, whole=True) for index, output in enumerate(outputs)]
        return {**self._head(choices, ""), "usage": self.usage}

    def chunks(self, index: int, output: Output) -> list[Json]:
        """What one step added to one choice."""
        if output.prompt_logprobs or index in self._held:
            held = self._held.setdefault(index, Output())
            held.prompt_logprobs += output.prompt_logprobs
            held.prompt_top_logprobs += output.prompt_top_logprobs
            if not output.token_ids and not output.finish_reason:
                return []
            del self._held[index]
            output.prompt_logprobs = held.prompt_logprobs
            output.prompt_top_logprobs = held.prompt_top_logprobs
        opening = []
        if isinstance(self.request, ChatRequest) and index not in self._readings:
            delta = {"role": "assistant", "content": ""}
            opening = [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]
        made = [*opening, self._choice(index, output, whole=False)]
        return [{**self._head([choice], ".chunk"), **self._usage_so_far()} for choice in made]

    def closing(self) -> list[Json]:
        """The chunk after the last one, where usage was asked for."""
        if not self.request.stream_options.include_usage:
            return []
        return [{**self._head([], ".chunk"), "usage": self.usage}]

    def _usage_so_far(self) -> Json:
        options = self.request.stream_options
        if options.continuous_usage_stats:
            return {"usage": self.usage}
        return {"usage": None} if options.include_usage else {}

    def _head(self, choices: list[Json], part: str) -> Json:
        chat = isinstance(self.request, ChatRequest)
        return {
            "id": self.id,
            "object": f"chat.completion{part}" if chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _choice(self, index: int, output: Output, whole: bool) -> Json:
        request, first = self.request, index not in self._readings
        self.generated += len(output.token_ids)
        reading = self._readings.setdefault(index, Reading(self.bytes_of))
        choice: Json = {"index": index}
        if isinstance(request, ChatRequest):
            delta = {"role": "assistant"} if whole else {}
            choice["message" if whole else "delta"] = {**delta, "content": output.text}
            given = chat_logprobs(Tokens.of(output), reading) if request.logprobs else None
        else:
            echoed = self.prompts[index] if request.echo and first else ()
            choice["text"] = (self.echoes[index] if echoed else "") + output.text
            given = None
            if request.logprobs is not None:
                given = completion_logprobs(Tokens.of(output, echoed), reading)
        choice["logprobs"] = given
        choice["finish_reason"] = output.finish_reason
        choice["stop_reason"] = output.stop_reason
        fusion = shown_fusion(output) if request.fusion.return_weights else {}
        if output.lost:
            fusion["lost"] = output.lost
        if output.spans:
            fusion["trace"] = chrome_trace([*self.spans, *output.spans])
        if fusion:
            choice["fusion"] = fusion
        return choice
