"""What a user holds: prompts in, outputs out, whatever runs below.

`Engine` (over Ray) and `LocalEngine` (in this process) share this part: tokenizing, checking,
per-request fusion, collecting what streams back.
"""

from __future__ import annotations

import itertools
import queue
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self, TypeAlias, TypedDict, Unpack

from rich.progress import track

from dlf_ray.config import LARGE, Family, Fusion, Rule, Select, check_bounds
from dlf_ray.messages import (
    Chunk,
    Description,
    FinishReason,
    FusionParams,
    Limits,
    Request,
    SamplingParams,
)
from dlf_ray.metrics import Span

Prompt: TypeAlias = "str | Sequence[int]"
"""Text, or token ids as they are."""
Prompts: TypeAlias = "Prompt | Mapping[str, Prompt]"
"""One prompt for all models, or a mapping from model names; `large` (else the first) is shared by
the models that are not named."""
Deliver: TypeAlias = "Callable[[Chunk | Exception], None]"


class EngineError(RuntimeError):
    """The engine itself has failed; it cannot serve any more."""


class FusionOptions(TypedDict, total=False):
    """What one request may set differently from the family file."""

    rule: Rule
    select: Select
    step: float
    experts: Sequence[str]
    """The experts that take part; all if absent, `[]` for the large model alone."""
    weights: Mapping[str, float]
    """With rule static; 1.0 for those not named."""
    bounds: Mapping[str, tuple[float, float]]
    alone: str
    """One model answers by itself, unfused."""
    trace: bool
    """Record what every actor does for the request (`Output.spans`)."""


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
        self.error = chunk.error
        self.spans += chunk.spans
        return self


class BaseEngine(ABC):
    """Generates with one family of models."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.tokenizer: Any = None
        """The large model's, as Hugging Face made it."""
        self.limits: Limits
        self._ids = itertools.count()
        self._deliver: dict[int, Deliver] = {}

    @abstractmethod
    def _send(self, request: Request) -> None:
        """Queues a request; its chunks come through `_dispatch`."""

    @abstractmethod
    def _abort(self, id: int) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Frees everything the engine holds; calling it twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompts | Sequence[Prompts],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        **fusion: Unpack[FusionOptions],
    ) -> list[Output]:
        """Generates for all prompts together; outputs come in their order.

        `sampling` is one for all or one each. Keyword arguments override the family's fusion.
        Raises `ValueError` before anything is generated where a prompt or an option is wrong; a
        request that fails later has `finish_reason` "error" and says why, the others go on.
        """
        requests = self._requests(prompts, sampling, fusion)
        return self._gather(requests, "generating", progress)

    def generate_as_completed(
        self,
        prompts: Sequence[Prompts],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        **fusion: Unpack[FusionOptions],
    ) -> Iterator[tuple[int, Output]]:
        """Like `generate`, but yields each prompt's number and output as soon as it has ended."""
        return self._as_completed(self._requests(prompts, sampling, fusion))

    def score(
        self,
        prompts: Prompts | Sequence[Prompts],
        continuations: Sequence[str | Sequence[int]],
        *,
        progress: bool = False,
        **fusion: Unpack[FusionOptions],
    ) -> list[Output]:
        """The log-probability of each token of a continuation under the fused distribution.

        One continuation for each prompt. A string is tokenized together with the prompt (of the
        large model), as lm-evaluation-harness does: white space at the end of the prompt belongs to
        the continuation, and what the tokens of both have beyond those of the prompt is scored.
        Nothing is generated; rows of logits are computed a bounded number at a time.
        Errors are those of `generate`.
        """
        requests = self._requests(prompts, None, fusion, continuations)
        return self._gather(requests, "scoring", progress)

    def score_as_completed(
        self,
        prompts: Sequence[Prompts],
        continuations: Sequence[str | Sequence[int]],
        **fusion: Unpack[FusionOptions],
    ) -> Iterator[tuple[int, Output]]:
        """Like `score`, but yields each prompt's number and output as soon as it has ended."""
        return self._as_completed(self._requests(prompts, None, fusion, continuations))

    def tokenize_pair(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both, split where those of `prompt` alone end (see `score`)."""
        stripped = prompt.rstrip()
        first = self._encode(stripped)
        whole = self._encode(prompt + continuation)
        return list(first), list(whole[len(first) :])

    def _gather(self, requests: list[Request], what: str, progress: bool) -> list[Output]:
        """Sends all requests and waits for all; their outputs in order."""
        outputs: dict[int, Output] = {}
        done = self._as_completed(requests)
        for number, output in track(done, what, total=len(requests), disable=not progress):
            outputs[number] = output
        return [outputs[number] for number in range(len(requests))]

    def _as_completed(self, requests: Sequence[Request]) -> Iterator[tuple[int, Output]]:
        """Sends all requests; yields the number and the output of each one as it ends."""
        numbers = {request.id: number for number, request in enumerate(requests)}
        outputs = [Output() for _ in requests]
        mailbox: queue.SimpleQueue[Chunk | Exception] = queue.SimpleQueue()
        with self._open(requests, mailbox.put):
            left = len(requests)
            while left:
                chunk = self._wait(mailbox)
                number = numbers[chunk.id]
                outputs[number].add(chunk, requests[number])
                if chunk.finish_reason:
                    left -= 1
                    yield number, outputs[number]

    def stream(
        self,
        prompt: Prompts,
        sampling: SamplingParams | None = None,
        **fusion: Unpack[FusionOptions],
    ) -> Iterator[Output]:
        """Yields what each step adds; leaving the loop early frees the request.

        Raises `RuntimeError` where the request fails on the way.
        """
        (request,) = self._requests([prompt], sampling, fusion)
        mailbox: queue.SimpleQueue[Chunk | Exception] = queue.SimpleQueue()
        with self._open([request], mailbox.put):
            while True:
                output = Output().add(self._wait(mailbox), request)
                if output.error:
                    raise RuntimeError(output.error)
                yield output
                if output.finish_reason:
                    return

    def _requests(
        self,
        prompts: Prompts | Sequence[Prompts],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        fusion: FusionOptions,
        continuations: Sequence[str | Sequence[int]] | None = None,
    ) -> list[Request]:
        """All requests, checked. Raises `ValueError` that names the prompt where one is wrong."""
        many = _listed(prompts)
        params = resolve(self.family, fusion)
        if sampling is None or isinstance(sampling, SamplingParams):
            default = SamplingParams() if continuations is None else SamplingParams(max_tokens=0)
            sampling = [sampling or default] * len(many)
        for what, given in (("sampling parameters", sampling), ("continuations", continuations)):
            if given is not None and len(given) != len(many):
                raise ValueError(f"{len(many)} prompts but {len(given)} {what}")
        requests = []
        for number, (prompt, each) in enumerate(zip(many, sampling, strict=True)):
            try:
                shared, own = self._tokenized(prompt)
                rest: tuple[int, ...] = ()
                if continuations is not None:
                    shared, own, rest = self._continued(prompt, shared, own, continuations[number])
                elif each.prompt_logprobs is not None:
                    if own:
                        raise ValueError(
                            "`prompt_logprobs` needs one prompt for all models: whose would it "
                            "be? `score` takes prompts of their own and a common continuation"
                        )
                    shared, rest = shared[:1], shared[1:]
                request = Request(
                    id=next(self._ids),
                    prompt=shared,
                    prompts=own,
                    continuation=rest,
                    sampling=each,
                    fusion=params,
                    trace=fusion.get("trace", False),
                )
                self.limits.check(request)
            except ValueError as error:
                where = f"prompt {number}: " if len(many) > 1 else ""
                raise ValueError(where + str(error)) from None
            requests.append(request)
        return requests

    def _tokenized(self, prompt: Prompts) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
        """The prompt of most models, and those of single ones."""
        if not isinstance(prompt, Mapping):
            return self._encode(prompt), {}
        if not prompt:
            raise ValueError("a mapping of prompts needs at least one model's")
        own = {name: self._encode(each) for name, each in prompt.items()}
        return own.get(LARGE) or next(iter(own.values())), own

    def _continued(
        self,
        prompt: Prompts,
        shared: tuple[int, ...],
        own: dict[str, tuple[int, ...]],
        continuation: str | Sequence[int],
    ) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]], tuple[int, ...]]:
        """Prompts and continuation as tokens; text is split where the tokens of the whole split."""
        if not isinstance(continuation, str):
            rest = tuple(continuation)
        elif isinstance(prompt, str):
            one, two = self.tokenize_pair(prompt, continuation)
            shared, rest = tuple(one), tuple(two)
        elif isinstance(prompt, Mapping) and all(isinstance(p, str) for p in prompt.values()):
            texts = {name: str(text) for name, text in prompt.items()}
            pairs = {n: self.tokenize_pair(text, continuation) for n, text in texts.items()}
            own = {name: tuple(one) for name, (one, _) in pairs.items()}
            shared = own.get(LARGE) or next(iter(own.values()))
            rest = tuple((pairs.get(LARGE) or next(iter(pairs.values())))[1])
        else:
            raise ValueError("a prompt of token ids needs a continuation of token ids")
        if not rest:
            raise ValueError("the continuation is empty: give at least one token to score")
        return shared, own, rest

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)

    @contextmanager
    def _open(self, requests: Sequence[Request], deliver: Deliver) -> Iterator[None]:
        """Sends the requests; whatever of them is not finished at the end is aborted."""
        try:
            for request in requests:
                self._deliver[request.id] = deliver
                self._send(request)
            yield
        finally:
            for request in requests:
                if self._deliver.pop(request.id, None):
                    self._abort(request.id)

    def _dispatch(self, chunk: Chunk) -> None:
        """Gives a chunk to whoever asked; nobody does where an abort has just crossed it."""
        deliver = self._deliver.get(chunk.id)
        if chunk.finish_reason:
            self._deliver.pop(chunk.id, None)
        if deliver:
            deliver(chunk)

    def _wait(self, mailbox: queue.SimpleQueue[Chunk | Exception]) -> Chunk:
        return raised(mailbox.get())


def raised(message: Chunk | Exception) -> Chunk:
    """The chunk, or the exception that came in its place."""
    if isinstance(message, Exception):
        raise message
    return message


def resolve(family: Family, options: FusionOptions) -> FusionParams:
    """The family's fusion with a request's own options on top.

    Raises `ValueError` for names that are not in the family and for options that clash.
    """
    if unknown := set(options) - set(FusionOptions.__annotations__):
        raise ValueError(
            f"unknown fusion options {sorted(unknown)}; there are "
            f"{sorted(FusionOptions.__annotations__)}"
        )
    alone = options.get("alone")
    if alone is not None:
        if alone not in family.models:
            raise ValueError(f"no model {alone!r} in the family; it has {list(family.models)}")
        if clash := set(options) - {"alone", "trace"}:
            raise ValueError(f"`alone` leaves nothing to fuse; drop {sorted(clash)}")
    experts = () if alone else tuple(options.get("experts", family.experts))
    bounds, weights = options.get("bounds", {}), options.get("weights", {})
    for name in (*experts, *bounds, *weights):
        if name not in family.experts:
            raise ValueError(f"no expert {name!r} in the family; it has {list(family.experts)}")
    if len(set(experts)) < len(experts):
        raise ValueError(f"`experts` names one twice: {list(experts)}")
    rule = options.get("rule", family.fusion.rule)
    # The checks of the family file, on the settings of this request.
    fusion = Fusion.checked(
        rule=rule,
        select=options.get("select", family.fusion.select),
        step=options.get("step", family.fusion.step),
        weights={**(family.fusion.weights if rule == "static" else {}), **weights},
    )
    for pair in bounds.values():
        check_bounds(pair)
    # In the order of the family, so that equal requests are fused together.
    experts = tuple(name for name in family.experts if name in experts)
    limits = {name: bounds.get(name, family.experts[name].bounds) for name in experts}
    if fusion.select == "blend" and len(set(limits.values())) > 1 and rule != "static":
        raise ValueError(
            f"`blend` has one weight for all experts: make their bounds equal, {limits}"
        )
    return FusionParams(
        rule=rule,
        select=fusion.select,
        step=fusion.step,
        experts=experts,
        bounds=tuple((float(low), float(high)) for low, high in limits.values()),
        weights=tuple(fusion.weights.get(e, 1.0) for e in experts) if rule == "static" else (),
        alone=alone,
    )


def limits_of(family: Family, descriptions: Mapping[str, Description]) -> Limits:
    """What the loaded models can take together."""
    eos = {token for each in descriptions.values() for token in each.eos_token_ids}
    longest = family.engine.max_model_len
    return Limits(
        lengths={name: min(longest, descriptions[name].context) for name in family.models},
        vocab=min(each.vocab for each in descriptions.values()),
        eos_token_ids=tuple(sorted(eos)),
    )


def decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Token ids to text, without special tokens and without beautifying."""

    def decode(ids: Sequence[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    return decode


def _listed(prompts: Prompts | Sequence[Prompts]) -> list[Prompts]:
    """A list of prompts, also from a single one: text, a mapping, or a list of token ids."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if len(prompts) and all(isinstance(each, int) for each in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
