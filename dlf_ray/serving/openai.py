"""OpenAI's wire format: what a request may say, and what its answer looks like. Pure functions.

The names are those of OpenAI's API, with vLLM's additions where it has any, and `fusion`, `prompts`
and `/v1/score` on top. A field that could only be ignored is refused by its name; one that is null
counts as absent.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import Field, model_validator

from dlf_ray.engine.options import FusionOptions
from dlf_ray.messages import ContextLengthError
from dlf_ray.params import (
    MAX_BIASES,
    MAX_LOGPROBS,
    MAX_STOP_TOKENS,
    MAX_STOPS,
    SamplingParams,
    StructuredOutputs,
)
from dlf_ray.rules import RULES, Rule, Select
from dlf_ray.serving.anyway import HINTS, Anyway, AnywayInChat, AnywayInMessage, AnywayInText, No
from dlf_ray.serving.shapes import ResponseFormat, Structured
from dlf_ray.serving.wire import (
    MAX_NAME,
    MAX_NAMES,
    UNSUPPORTED,
    AnyObject,
    ByName,
    Count,
    Json,
    Listed,
    Name,
    Prompt,
    Prompts,
    Some,
    Stop,
    Text,
    Weight,
    Wire,
    at_most,
)

GREEDY = 1e-5
"""Temperatures below it are taken for 0, as in vLLM: logits divided by them would overflow."""


class FusionSettings(Wire):
    """How to fuse, where it differs from the family file; see the README."""

    rule: Rule | None = None
    select: Select | None = None
    step: Annotated[float, Field(gt=0, le=2)] | None = None
    experts: Annotated[list[Name], at_most(MAX_NAMES), Field(max_length=MAX_NAMES)] | None = None
    """Those that take part; `[]` for the large model alone."""
    weights: ByName[Weight] | None = None
    """With rule static."""
    bounds: ByName[Annotated[tuple[Weight, Weight], Field(strict=False)]] | None = None
    alone: Name | None = None
    """One model of the family by itself, unfused."""

    def options(self, default: FusionSettings | None = None) -> FusionOptions:
        """As the engine takes them, on top of a model's own `default`."""
        own = self._given()
        below = default._given() if default else {}
        if "alone" in own:
            below = {}
        elif "rule" in own and not RULES[own["rule"]].given:
            below.pop("weights", None)  # they belong to rules that are given some
        return FusionOptions(**{**below, **own})  # type: ignore[typeddict-item]

    def _given(self) -> Json:
        return self.model_dump(exclude_none=True, include=set(FusionSettings.model_fields))


class FusionRequest(FusionSettings):
    return_weights: bool = False
    """Show for each token which expert weighed how much, as `fusion` of the choice."""
    trace: bool = False
    """End with what every actor did when, as `fusion.trace` of the choice, in Chrome's format."""


class StreamOptions(Wire):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """Usage so far in every chunk, as vLLM has it."""
    include_obfuscation: No = False


class Generate(Anyway):
    """What completions and chat completions have in common."""

    model: Name | None = None
    """May be absent where only one is served."""
    n: Annotated[int, Field(ge=1, le=128)] = 1
    """So many answers to each prompt; answer k draws with `seed` + k."""
    best_of: int | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] = 0
    """0 or -1: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], at_most(MAX_STOPS), Field(max_length=MAX_STOPS)] = []
    stop_token_ids: Annotated[
        list[Count], at_most(MAX_STOP_TOKENS), Field(max_length=MAX_STOP_TOKENS)
    ] = []
    ignore_eos: bool = False
    min_tokens: Count = 0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    logit_bias: Annotated[
        dict[
            Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
            Annotated[float, Field(ge=-100, le=100)],
        ],
        at_most(MAX_BIASES),
        Field(max_length=MAX_BIASES),
    ] = {}
    """Token ids, as strings."""
    response_format: ResponseFormat | None = None
    structured_outputs: Structured | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    fusion: FusionRequest = FusionRequest()

    @model_validator(mode="after")
    def _fits_together(self) -> Generate:
        if self.best_of not in (None, self.n):
            raise ValueError("`best_of` is not supported, unless it equals `n`")
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ValueError("`stream_options` needs `stream`")
        _ = self.shape  # it says itself what is wrong with it
        return self

    @property
    def shape(self) -> StructuredOutputs | None:
        """What answers must be like. Raises `ValueError` with the field's name."""
        shaped = self.response_format.shape if self.response_format else None
        if shaped and self.structured_outputs:
            raise ValueError("give `response_format` or `structured_outputs`, not both")
        return self.structured_outputs.shape if self.structured_outputs else shaped

    def recommended(self, sampling: Mapping[str, Any]) -> Self:
        """The request with the `sampling` that is recommended where it says nothing of it."""
        given = self.model_fields_set
        return self.model_copy(update={n: v for n, v in sampling.items() if n not in given})

    def _sampling(self, max_tokens: int, **logprobs: int | None) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature if self.temperature >= GREEDY else 0.0,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            structured_outputs=self.shape,
            **logprobs,
        )


class CompletionRequest(AnywayInText, Generate):
    prompt: Prompts | None = None
    prompts: ByName[Prompt] | None = None
    """Prompts of single models of the family; those not named take `prompt`, or the large one's."""
    max_tokens: Count = 16
    echo: bool = False
    """The prompt before the answer; with `logprobs`, with its log-probabilities."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _has_a_prompt(self) -> CompletionRequest:
        if not self.prompt and not self.prompts:
            raise ValueError("`prompt` is empty: give text or at least one token")
        if self.prompts and self.prompt and len(listed(self.prompt)) > 1:
            raise ValueError("`prompts` are for a single request; give one `prompt` beside them")
        if not self.max_tokens and not self.echo:
            raise ValueError("`max_tokens` 0 asks for nothing without `echo`")
        if self.fusion.trace and self.sequences > 1:
            raise ValueError("`fusion.trace` is of a single answer; ask for one prompt with `n` 1")
        return self

    @property
    def sequences(self) -> int:
        """How many the engine has to decode."""
        return self.n * (len(listed(self.prompt)) if self.prompt else 1)

    @property
    def texts(self) -> list[tuple[str, Prompt]]:
        """Everything that is to be tokenized, each with the name of its field."""
        own = [("prompts", each) for each in (self.prompts or {}).values()]
        return [("prompt", each) for each in listed(self.prompt or [])] + own

    def sampling(self, context: int) -> SamplingParams:
        """Raises `ValueError` with the field's name. `context` bounds what can be generated."""
        echoed = self.logprobs if self.echo else None
        most = min(self.max_tokens, context)
        return self._sampling(most, logprobs=self.logprobs, prompt_logprobs=echoed)


class TextPart(Wire):
    type: Literal["text"]
    text: Text


class Message(AnywayInMessage):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Some[TextPart]
    name: Annotated[Text, Field(max_length=MAX_NAME)] | None = None
    """Of who speaks, for templates that show it."""

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = [self.content] if isinstance(self.content, str) else [p.text for p in self.content]
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": "".join(parts), **named}


class ChatRequest(AnywayInChat, Generate):
    messages: Annotated[Some[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    """The new name of `max_tokens`; without either, up to the context."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    chat_template_kwargs: AnyObject = {}
    """What the template is given beside the messages, such as `{"enable_thinking": false}`."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs`")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("`max_completion_tokens` is the new name of `max_tokens`; give one")
        if 0 in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("`max_tokens` must be at least 1")
        if self.fusion.trace and self.n > 1:
            raise ValueError("`fusion.trace` is of a single answer; ask for `n` 1")
        return self

    @property
    def sequences(self) -> int:
        return self.n

    @property
    def texts(self) -> list[tuple[str, Prompt]]:
        """See `CompletionRequest.texts`: a template makes one text of all messages."""
        return [("messages", "".join(each.plain()["content"] for each in self.messages))]

    def sampling(self, context: int) -> SamplingParams:
        """See `CompletionRequest.sampling`."""
        most = min(self.max_completion_tokens or self.max_tokens or context, context)
        return self._sampling(most, logprobs=self.top_logprobs if self.logprobs else None)


class ScoreRequest(Wire):
    """How probable continuations are: one of each prompt, or several of a single prompt."""

    model: Name | None = None
    prompt: Prompts
    continuation: Prompts
    """Text where the prompt is text, token ids where it is token ids."""
    fusion: FusionSettings = FusionSettings()

    @model_validator(mode="after")
    def _pairs_up(self) -> ScoreRequest:
        self.pairs()
        return self

    @property
    def sequences(self) -> int:
        return len(self.pairs())

    @property
    def texts(self) -> list[tuple[str, Prompt]]:
        """See `CompletionRequest.texts`."""
        prompts = [("prompt", each) for each in listed(self.prompt)]
        return prompts + [("continuation", each) for each in listed(self.continuation)]

    def pairs(self) -> list[tuple[Prompt, Prompt]]:
        """Each prompt with its continuation. Raises `ValueError` where they do not pair up."""
        prompts, rests = listed(self.prompt), listed(self.continuation)
        if len(prompts) == 1:
            prompts = prompts * len(rests)
        if len(prompts) != len(rests):
            raise ValueError(
                f"`continuation` has {len(rests)} entries for {len(prompts)} prompts; give one for "
                "each prompt, or one prompt"
            )
        for prompt, rest in zip(prompts, rests, strict=True):
            if not rest:
                raise ValueError("`continuation` is empty: give text or at least one token")
            if isinstance(prompt, str) != isinstance(rest, str):
                raise ValueError("`continuation` must be text or token ids, as `prompt` is")
        return list(zip(prompts, rests, strict=True))


class TokenizeRequest(Wire):
    model: Name | None = None
    prompt: Text
    add_special_tokens: bool = True

    @property
    def texts(self) -> list[tuple[str, Prompt]]:
        """See `CompletionRequest.texts`."""
        return [("prompt", self.prompt)]


class DetokenizeRequest(Wire):
    model: Name | None = None
    tokens: Listed[int]

    @property
    def texts(self) -> list[tuple[str, Prompt]]:
        """See `CompletionRequest.texts`."""
        return [("tokens", self.tokens)]


class ExpertRequest(Wire):
    """An expert that is to join a family."""

    model: Name | None = None
    name: Annotated[str, Field(pattern=r"^[\w.-]+$", max_length=MAX_NAME)]
    expert: AnyObject
    """As in a family file: `model`, `num_gpus`, `bounds`, ..."""


def listed(prompt: str | Sequence[Any]) -> list[Prompt]:
    """A list of prompts, also from a single one."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)


def seeded(sampling: SamplingParams, k: int) -> SamplingParams:
    """The parameters of answer `k` to a prompt."""
    if sampling.seed is None or not k:
        return sampling
    return msgspec.structs.replace(sampling, seed=sampling.seed + k)


KINDS = {
    401: ("authentication_error", "invalid_api_key"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}
"""The type and the code of an error, by which clients tell what to do."""


@dataclass(frozen=True)
class Problem:
    """Why a request is not served, as OpenAI words it."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None

    @property
    def body(self) -> Json:
        other = "invalid_request_error" if self.status < 500 else "server_error"
        kind, code = KINDS.get(self.status, (other, None))
        # A half of a surrogate pair, which JSON may hold, cannot be sent back.
        message = self.message.encode(errors="replace").decode()
        error = {"message": message, "type": kind, "param": self.param, "code": self.code or code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"} if self.status in (429, 503) else {}

    @classmethod
    def invalid(cls, error: ValueError) -> Problem:
        """From a message that names the field in backticks, if it is about one."""
        named = re.search(r"`([\w.]+)`", str(error))
        return cls(400, str(error), param=named and named[1])

    @classmethod
    def too_long(
        cls, error: ContextLengthError, texts: Sequence[tuple[str, Prompt]], context: int
    ) -> Problem:
        """As clients know it; they look for these words too. `texts` are the request's."""
        fields = [field for field, _ in texts]
        named = [field for field in fields if f"`{field}`" in str(error)]
        message = f"{error}. This model's maximum context length is {context} tokens."
        return cls(400, message, (named or fields)[0], "context_length_exceeded")

    @classmethod
    def of_validation(cls, errors: Sequence[Mapping[str, Any]]) -> Problem:
        """From what pydantic found wrong in a request."""
        first, name = errors[0], _place(errors[0]["loc"])
        if first["type"] == "json_invalid":
            return cls(400, f"the body is not JSON: {first['ctx']['error']} at {name}")
        if not name:
            if first["type"] == "value_error":
                return cls.invalid(ValueError(_said(first)))
            return cls(400, "the body must be a JSON object, of content type application/json")
        if first["type"] == "extra_forbidden":
            todo = HINTS.get(name, "leave it out")
            return cls(400, f"`{name}` is not supported; {todo}", name, UNSUPPORTED)
        # A field that may be several things has an error for each of them.
        alike = [_said(each) for each in errors if _place(each["loc"]) == name]
        code = UNSUPPORTED if first["type"] == UNSUPPORTED else None
        return cls(400, f"`{name}`: {'; or: '.join(dict.fromkeys(alike))}", name, code)


def _said(error: Mapping[str, Any]) -> str:
    return str(error["msg"]).removeprefix("Value error, ")


def _place(loc: Sequence[str | int]) -> str:
    """A field's name from ("body", field, ...), up to where types are named that it may have."""
    kind = re.compile(r"str|constrained-str|(dict|list|function-\w+)\[.*\]")
    parts = itertools.takewhile(lambda part: not kind.fullmatch(part), map(str, loc[1:]))
    return ".".join(parts)
