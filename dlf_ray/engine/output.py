"""What comes back: the output of one prompt, whole or in pieces, and the engine's own failure."""

from __future__ import annotations

from dataclasses import dataclass, field

from dlf_ray.messages import Chunk, FinishReason, Request
from dlf_ray.metrics import Span


class EngineError(RuntimeError):
    """The engine itself has failed; it cannot serve any more."""


@dataclass
class Output:
    """What was generated for one prompt; while streaming, what is new of it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    """The text that each token completed; together `text`."""
    weights: list[dict[str, float]] = field(default_factory=list)
    """The weight of every expert that took part, per token."""
    experts: list[str | None] = field(default_factory=list)
    """The expert that weighed most, per token; None where the large model spoke for itself."""
    kl: list[tuple[float, float]] = field(default_factory=list)
    """KL(fused || large) and KL(large || fused) in nats, per token."""
    lost: list[str] = field(default_factory=list)
    """Experts that some of the tokens had to do without (`on_expert_loss: drop`)."""
    logprobs: list[float] = field(default_factory=list)
    """From `score`, or with `logprobs`: the log-probability of each token under the fused
    distribution, in nats."""
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    """With `logprobs` above 0: those of the most probable tokens, in that order, per token."""
    greedy: list[bool] = field(default_factory=list)
    """From `score`: whether each token is the most probable one."""
    prompt_logprobs: list[float] = field(default_factory=list)
    """With `prompt_logprobs`: as `logprobs`, for the tokens of the prompt but the first."""
    prompt_top_logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    """`stop` (an end token or a stop string), `length`, `error`; None while more is to come."""
    stop_reason: str | int | None = None
    """The stop string or stop token that ended the text; None for the model's own end token."""
    error: str | None = None
    """Why the request failed, where it did."""
    refused: bool = False
    """With an error: the request was not taken, as it does not fit the family any more."""
    spans: list[Span] = field(default_factory=list)
    """With `trace`, at the end: what every actor did for the request; see `metrics`."""

    def add(self, chunk: Chunk, request: Request) -> Output:
        """Appends what one step brought."""
        # Of a prompt that is scored, there are log-probabilities only; `score` is about no other
        # tokens.
        start = 0 if request.sampling.prompt_logprobs is None else chunk.given
        top = [dict(each) for each in chunk.top_logprobs]
        self.text += chunk.text
        self.token_ids += chunk.token_ids[start:]
        self.pieces += [chunk.text] if len(chunk.token_ids) > chunk.given else []
        self.kl += chunk.kl[start:]
        self.lost += [name for name in chunk.lost if name not in self.lost]
        self.greedy += chunk.greedy[start : chunk.given]
        self.prompt_logprobs += chunk.logprobs[:start]
        self.prompt_top_logprobs += top[:start]
        if start == 0 or request.sampling.logprobs is not None:
            self.logprobs += chunk.logprobs[start:]
            self.top_logprobs += top[start:]
        for weights in chunk.weights[start:]:
            named = dict(zip(request.fusion.experts, weights, strict=True))
            self.weights.append(named)
            loudest = max(named, key=lambda name: abs(named[name]), default=None)
            self.experts.append(loudest if loudest and named[loudest] else None)
        self.finish_reason, self.stop_reason = chunk.finish_reason, chunk.stop_reason
        self.error, self.refused = chunk.error, chunk.refused
        self.spans += chunk.spans
        return self

    def checked(self) -> Output:
        """Itself. Raises `ValueError` where the request was refused, `RuntimeError` where it failed
        on the way."""
        if self.error:
            raise ValueError(self.error) if self.refused else RuntimeError(self.error)
        return self


def raised(message: Chunk | Exception) -> Chunk:
    """The chunk, or the exception that came in its place."""
    if isinstance(message, Exception):
        raise message
    return message
