"""Everything that crosses an actor boundary, in one file.

Two kinds of traffic, neither of them pickled:

- control messages between clients, coordinator and workers: `msgspec` structs as msgpack, decoded
  against these types, so that a malformed one is refused and never executed;
- the step itself: a `Plan` out to every worker and `Logits` back, fixed binary headers followed by
  raw arrays, because they are sent for every token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from dlf_ray.params import MAX_WEIGHT, FusionParams, SamplingParams, check_candidates
from dlf_ray.rules import RULES

FinishReason = Literal["stop", "length", "abort", "error"]


class ContextLengthError(ValueError):
    """A prompt for which the models have no room: what a client can shorten."""


class Request(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Client to coordinator: one prompt to go on with."""

    id: int
    """Unique among the requests of its client."""
    prompt: tuple[int, ...]
    prompts: dict[str, tuple[int, ...]] = {}
    """Prompts of single models where they differ from `prompt`."""
    continuation: tuple[int, ...] = ()
    """Tokens to be scored after the prompt, before any are generated."""
    sampling: SamplingParams = SamplingParams()
    fusion: FusionParams
    trace: bool = False
    """Record what every actor does for it, step by step."""

    @property
    def models(self) -> tuple[str, ...]:
        """The models that must compute for this request, those of its fusion first to last."""
        return self.fusion.models

    def prompt_of(self, model: str) -> tuple[int, ...]:
        return self.prompts.get(model, self.prompt)


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Client to coordinator: forget this request."""

    id: int


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """What one step adds to one request."""

    id: int
    text: str = ""
    """Text that is final: no half characters, nothing that may yet become a stop string."""
    token_ids: tuple[int, ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    """The weight of each of the request's experts, per token."""
    lost: tuple[str, ...] = ()
    """Those of the experts that took no part, as they were lost (`on_expert_loss: drop`)."""
    kl: tuple[tuple[float, float], ...] = ()
    """KL(fused || large) and KL(large || fused) in nats, per token."""
    given: int = 0
    """How many of the tokens, the first ones, were not chosen but are of the continuation."""
    logprobs: tuple[float, ...] = ()
    """The log-probability of each token under the fused distribution, where that was asked for."""
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    """As many of the most probable tokens as asked for, with theirs, per token."""
    greedy: tuple[bool, ...] = ()
    """Of a continuation: whether each token is the most probable one."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or the id of the stop token that ended the text."""
    error: str | None = None
    refused: bool = False
    """With an error: the request cannot be served as it is; nothing has failed."""
    spans: tuple[tuple[str, str, float, float], ...] = ()
    """With the end of a request that is traced: see `metrics.Span`."""


class Chunks(msgspec.Struct, frozen=True, tag=True):
    """Coordinator to client: all that one step has for it."""

    chunks: tuple[Chunk, ...]


class AskTimings(msgspec.Struct, frozen=True, tag=True):
    """Client to coordinator: where does the time go? That it is answered is a sign of life."""

    id: int = 0
    """Comes back with the answer."""


class Timings(msgspec.Struct, frozen=True, tag=True):
    """Coordinator to client: seconds since its start, by stage and by model."""

    steps: int
    seconds: dict[str, float]
    """Stages of a step (`plan`, `wait`, `aim`, `weigh`, `sample`, `commit`, `text`), and
    `forward NAME`."""
    recoveries: tuple[Recovery, ...] = ()
    """The losses of models that are over, oldest first."""
    id: int = 0
    """Of the question."""


LossReason = Literal["died", "hung", "out of memory"]


class Recovery(msgspec.Struct, frozen=True):
    """A model lost its state, and has it again."""

    model: str
    reason: LossReason
    seconds: float
    """From the moment the loss was noticed until the model's logits were used again."""


class Pool(msgspec.Struct, frozen=True):
    """A cache of blocks, which the models of one worker share."""

    worker: str
    tokens: int
    """Of all sequences together, as many as fit."""
    block: int
    """Tokens that are given out together."""


class AddModel(msgspec.Struct, frozen=True, tag=True):
    """Client to coordinator: make room for one more expert. Answered twice by `Done`: with what the
    worker needs to connect, and once it has."""

    name: str
    length: int
    """The tokens that a sequence may have in it."""
    vocab: int
    """The tokens that it knows."""
    ends: tuple[int, ...] = ()
    """Those that end a text of it."""
    unlike: tuple[int, ...] = ()
    """The ids of the large model's vocabulary that are not in its own."""
    positions: int | None = None
    """Slots x length that its cache has room for, where it is a rectangle and that is known."""
    pool: Pool | None = None
    """Its cache, where that is one of blocks."""


class RemoveModel(msgspec.Struct, frozen=True, tag=True):
    """Client to coordinator: take no more requests for an expert; `Done` once none is under way."""

    name: str


class GiveUp(msgspec.Struct, frozen=True, tag=True):
    """Client to coordinator: a lost expert will not come back; fail what cannot do without it."""

    name: str
    error: str


class Process(msgspec.Struct, frozen=True):
    """One process of the cluster; the time tells it from a later one of the same number."""

    node: str = ""
    pid: int = 0
    created: float = 0.0


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Worker to coordinator, once connected: the model is loaded, remembers nothing, and waits for
    plans. From a worker that has said it before, it means that its process was restarted."""

    shared: bool
    """Whether it could open the coordinator's shared memory, that is, is on the same node."""
    process: Process = Process()


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Engine to coordinator, coordinator to worker: end your loop."""


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Coordinator to worker: nothing to do. That it could be sent says that there is a worker."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Worker to coordinator: the forward pass of a step raised."""

    step: int
    error: str
    out_of_memory: bool = False
    """Then the worker has forgotten all it had computed, for room."""


@dataclass(frozen=True)
class Lost:
    """A model is away, and what it had computed with it."""

    reason: LossReason
    error: str = ""


@dataclass(frozen=True)
class Ready:
    """A model waits for plans, with nothing computed: it is new, or back."""


@dataclass(frozen=True)
class Description:
    """What a loaded model says of itself, before any step."""

    vocab: int
    """Length of its tokenizer; logits are cut to it."""
    tokenizer_digest: str
    """Equal digests: the same tokens under the same ids."""
    eos_token_ids: tuple[int, ...]
    context: int
    """Positions it was made for."""
    parameters: int
    device: str
    dtype: str
    split: tuple[int, ...] = ()
    """How its tokenizer splits a sample of text; empty if unknown."""
    cache_bytes_per_position: int = 0
    """Of one token's keys and values in all layers; 0 if unknown."""
    free_bytes: int | None = None
    """What its device has left for the cache, a step's own needs put aside; None if unknown."""
    node: str = ""
    """The machine that it runs on: its models share the main memory."""
    block: int = 0
    """Tokens of a block, where the cache is one of blocks; 0 where it is a rectangle."""
    blocks: int = 0
    """How many blocks there are, of all layers together."""
    backend: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    """What the checkpoint recommends, by the names of `SamplingParams`."""
    chat_templates: tuple[str | None, ...] = ()
    """Of each of its worker's models, its own first; None where there is none."""


@dataclass(frozen=True)
class Limits:
    """What a running family can take; the same check guards the caller and the coordinator."""

    lengths: dict[str, int]
    """For each model that is loaded, large and base first, the tokens a sequence may have in it."""
    vocab: int
    """The tokens of answers, and of prompts: the large model's."""
    vocabs: dict[str, int] = field(default_factory=dict)
    """Of the prompts that models have of their own; the large one's where that is not known."""
    ends: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """For each model, the tokens that end a text."""
    unlike: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """For each model whose vocabulary is not all the large one's, the ids of that which it gives
    another meaning, or none: it takes no part in their probability."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Of requests that do not say how they are sampled, by the names of `SamplingParams`."""
    positions: dict[str, int] = field(default_factory=dict)
    """For each model whose cache is a rectangle and whose memory is known: slots x length."""
    pools: dict[str, Pool] = field(default_factory=dict)
    """For each model whose cache is one of blocks."""

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(name for name in self.lengths if name not in ("large", "base"))

    @property
    def every_end(self) -> tuple[int, ...]:
        """The tokens that end a text of some model."""
        return tuple(sorted({token for each in self.ends.values() for token in each}))

    def ends_of(self, request: Request) -> frozenset[int]:
        """The tokens that end a text of one of the models that the request asks for: what else is
        loaded has no say."""
        return frozenset(token for name in request.models for token in self.ends.get(name, ()))

    def apart(self, models: Collection[str]) -> tuple[int, ...]:
        """The ids that not all of some models give the same meaning."""
        return tuple(sorted({token for name in models for token in self.unlike.get(name, ())}))

    def adding(self, added: AddModel) -> Limits:
        """The limits of the same family with one more expert."""
        return dataclasses.replace(
            self,
            lengths={**self.lengths, added.name: added.length},
            vocabs={**self.vocabs, added.name: added.vocab},
            ends={**self.ends, added.name: added.ends},
            unlike={**self.unlike, added.name: added.unlike},
        )

    def without(self, name: str) -> Limits:
        """The limits of the same family without an expert."""
        lengths = {each: length for each, length in self.lengths.items() if each != name}
        return dataclasses.replace(self, lengths=lengths)

    def check_names(self, models: Collection[str]) -> None:
        """Raises `ValueError` where one of the models is not there."""
        for name in models:
            if name not in self.lengths:
                raise ValueError(f"no model {name!r} is loaded; there are {list(self.lengths)}")

    def check(self, request: Request) -> None:
        """Raises `ValueError`, saying what to change, where the request cannot be served; for a
        prompt that is too long, a `ContextLengthError`."""
        fusion = request.fusion
        self.check_names((*request.prompts, *request.models))
        if not (request.sampling.max_tokens or request.continuation):
            raise ValueError(
                "`max_tokens` must be at least 1 where there is nothing to score (a prompt of two "
                "tokens with `prompt_logprobs`, or a continuation)"
            )
        if len(fusion.bounds) != len(fusion.experts):
            raise ValueError("one pair of bounds for each expert is needed")
        if RULES[fusion.rule].given and len(fusion.weights) != len(fusion.experts):
            raise ValueError(f"one weight for each expert is needed with rule {fusion.rule}")
        sizes = [abs(number) for pair in (*fusion.bounds, fusion.weights) for number in pair]
        if not all(size <= MAX_WEIGHT for size in sizes):
            raise ValueError(f"`weights` and `bounds` must be at most {MAX_WEIGHT:g} in size")
        if RULES[fusion.rule].searches:
            if not fusion.step > 0 or not all(low < high for low, high in fusion.bounds):
                raise ValueError("`step` must be above 0, and `bounds` low < high")
            check_candidates(fusion.bounds, fusion.step)
        for name in request.models:
            tokens = request.prompt_of(name)
            if not tokens:
                raise ValueError(
                    "the prompt is empty; give at least one token (the model's BOS token, say)"
                )
            size, room = len(tokens) + len(request.continuation), self.lengths[name]
            if not request.sampling.max_tokens and size - 1 > room:
                raise ContextLengthError(
                    f"prompt and continuation have {size} tokens, of which model {name!r} takes "
                    f"{room}; shorten the prompt or raise `engine.max_model_len`, if the model's "
                    "context allows"
                )
            if request.sampling.max_tokens and size >= room:
                raise ContextLengthError(
                    f"the prompt of model {name!r} has {size} tokens, which leaves no room "
                    f"to answer in its {room}; shorten it or raise `engine.max_model_len`, if the "
                    "model's context allows"
                )
            tokens = tokens + request.continuation
            own = name in request.prompts and not request.continuation
            vocab = self.vocabs.get(name, self.vocab) if own else self.vocab
            if not 0 <= min(tokens) <= max(tokens) < vocab:
                raise ValueError(f"a prompt token is outside the vocabulary of {vocab}")
        for what in ("logit_bias", "stop_token_ids"):
            for token in getattr(request.sampling, what):
                if not 0 <= token < self.vocab:
                    raise ValueError(
                        f"`{what}` names token {token}, outside the vocabulary of {self.vocab}"
                    )

    def max_new_tokens(self, request: Request) -> int:
        """The most tokens that may be generated for `request`."""
        given = len(request.continuation)
        rooms = (self.lengths[name] - len(request.prompt_of(name)) for name in request.models)
        return min(request.sampling.max_tokens, *(room - given for room in rooms))
