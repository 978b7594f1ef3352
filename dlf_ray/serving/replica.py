"""One family behind OpenAI's requests: an engine, its tokenizer, and a limit to what may wait.

A plain class; `serve` runs it as a deployment.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict

from dlf_ray.config import LARGE
from dlf_ray.engine.engine import Engine
from dlf_ray.engine.frontend import Prompts
from dlf_ray.engine.options import FusionOptions, resolve
from dlf_ray.engine.output import EngineError, Output
from dlf_ray.messages import ContextLengthError
from dlf_ray.params import SamplingParams
from dlf_ray.serving.answers import Answer, finite, usage
from dlf_ray.serving.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    FusionSettings,
    Problem,
    ScoreRequest,
    TokenizeRequest,
    listed,
    seeded,
)
from dlf_ray.serving.tokens import Reading, token_bytes
from dlf_ray.serving.wire import Json, Prompt

STREAM_END = b"data: [DONE]\n\n"
SHORT = 2**15
"""Characters, or tokens, that are tokenized, or read, in a few milliseconds."""
log = logging.getLogger("ray.serve")
to_json = msgspec.json.encode
T = TypeVar("T")
Body: TypeAlias = (
    CompletionRequest | ChatRequest | ScoreRequest | TokenizeRequest | DetokenizeRequest
)
Item: TypeAlias = "bytes | Problem | Json"
"""What a replica answers: parts of the response, why there is none, and at the end its usage."""


class Model(BaseModel):
    """One name under which a family is served."""

    model_config = ConfigDict(extra="forbid")

    family: str
    """The family file. Models of the same file share its replicas."""
    fusion: FusionSettings = FusionSettings()
    """What a request to this name gets where it says nothing else."""
    chat_template: str | dict[str, str] | None = None
    """A Jinja template or a file of one, for all models instead of their own; or one for each model
    that is named."""


class Replica:
    """An engine, and what it answers to OpenAI's requests."""

    def __init__(self, engine: Engine, models: Mapping[str, Model], max_queued: int) -> None:
        self.engine = engine
        self.models = models
        self.capacity = engine.family.engine.max_num_seqs + max_queued
        self.context = max(self.engine.limits.lengths.values())
        self.sequences = 0
        """That run or wait now."""
        tokenizer = engine.tokenizer
        self.longest = self.context * max(map(len, tokenizer.get_vocab()))
        """The most characters that the tokens of a context read."""
        self._token_bytes = token_bytes(tokenizer)
        # Those written in Rust let go of Python's lock, and change nothing in themselves once they
        # have left off what their file says of padding and cutting. None is made for more than one
        # thread else.
        tokenizer.encode("")
        self._brief = ThreadPoolExecutor(2 if tokenizer.is_fast else 1)
        self._lengthy = ThreadPoolExecutor(1) if tokenizer.is_fast else self._brief

    async def card(self) -> Json:
        """What lists of models say of the family."""
        return {"root": self.engine.family.large.model, "max_model_len": self.context}

    async def _aside(self, size: int, function: Callable[..., T], *args: object) -> T:
        """Runs a function beside the loop whose time grows with `size`: what is short does not wait
        for what is long, and what is long waits for one piece of each other request at most."""
        pool = self._brief if size <= SHORT else self._lengthy
        return await asyncio.get_running_loop().run_in_executor(pool, function, *args)

    def _check_sizes(self, texts: Iterable[tuple[str, str | Sequence[int]]]) -> None:
        """Raises `ContextLengthError` where a text is too long for any model, before it is
        tokenized."""
        for field, text in texts:
            unit, most = (
                ("characters", self.longest) if isinstance(text, str) else ("tokens", self.context)
            )
            if len(text) > most:
                raise ContextLengthError(
                    f"`{field}` has {len(text)} {unit}; at most {most} are taken"
                )

    async def answer(self, model: str, request: Body | None, id: str) -> AsyncGenerator[Item, None]:
        """Answers one request; without any, says what the tokenizer is."""
        try:
            async with aclosing(self._answer(model, request, id)) as items:
                async for item in items:
                    yield item
        except ContextLengthError as error:
            yield Problem.too_long(error, request.texts if request else (), self.context)
        except ValueError as error:
            yield Problem.invalid(error)
        except EngineError:
            log.exception("request %s: the engine has failed", id)
            yield Problem(503, "the model is being restarted; try again later")
        except Exception:
            log.exception("request %s failed", id)
            yield Problem(500, f"the request failed; the log has it as {id}")

    async def _answer(
        self, model: str, request: Body | None, id: str
    ) -> AsyncGenerator[Item, None]:
        if request is None:
            yield to_json(self._tokenizer_info(model))
            return
        self._check_sizes(request.texts)
        if isinstance(request, TokenizeRequest):
            yield to_json(await self._aside(len(request.prompt), self._tokenize, request))
        elif isinstance(request, DetokenizeRequest):
            tokens = request.tokens
            read = await self._aside(len(tokens), self._read, tokens, "tokens")
            yield to_json({"prompt": read})
        elif request.sequences > self.capacity:
            raise ValueError(
                f"the request asks for {request.sequences} sequences, of which the server takes "
                f"{self.capacity} at once; send several requests"
            )
        elif self.sequences + request.sequences > self.capacity:
            yield Problem(429, "too many requests are waiting; try again later")
        else:
            self.sequences += request.sequences
            answer = self._score if isinstance(request, ScoreRequest) else self._generate
            try:
                async with aclosing(answer(model, request, id)) as items:  # type: ignore[arg-type]
                    async for item in items:
                        yield item
            finally:
                self.sequences -= request.sequences

    async def _generate(
        self, model: str, request: CompletionRequest | ChatRequest, id: str
    ) -> AsyncGenerator[Item, None]:
        start, began = time.time(), time.perf_counter()
        asked = await self._asked(model, request)
        tokenized = ("replica", "tokenize", start, time.perf_counter() - began)
        asked = [each for each in asked for _ in range(request.n)]
        request = request.recommended(self.engine.limits.sampling)
        sampling = request.sampling(self.context)
        calls = [
            (each, seeded(each.ending(sampling), k % request.n)) for k, each in enumerate(asked)
        ]
        options = request.fusion.options(self.models[model].fusion)
        options["trace"] = request.fusion.trace
        answer = Answer(
            request,
            id=f"{'chatcmpl' if isinstance(request, ChatRequest) else 'cmpl'}-{id}",
            model=model,
            prompts=[each.ids for each in asked],
            echoes=[each.text for each in asked],
            bytes_of=self._token_bytes,
            spans=[tokenized],
        )
        if request.stream:
            streams = [self._streamed(*call, options) for call in calls]
            async with aclosing(merged(streams)) as news:
                async for batch in news:
                    chunks = [c for index, piece in batch for c in answer.chunks(index, piece)]
                    yield b"".join(map(event, chunks))
            yield b"".join(map(event, answer.closing())) + STREAM_END
        else:
            outputs = await together([self._generated(*call, options) for call in calls])
            entries = sum(map(_entries, outputs))
            yield await self._aside(entries, lambda: to_json(answer.whole(outputs)))
        yield answer.usage

    async def _generated(
        self, asked: Asked, sampling: SamplingParams, options: FusionOptions
    ) -> Output:
        if self._only_shown(asked, sampling, options):
            return Output(finish_reason="length")
        return await self.engine.agenerate(asked.prompt, sampling, **options)

    async def _streamed(
        self, asked: Asked, sampling: SamplingParams, options: FusionOptions
    ) -> AsyncGenerator[Output, None]:
        if self._only_shown(asked, sampling, options):
            yield Output(finish_reason="length")
            return
        stream: Any = self.engine.astream(asked.prompt, sampling, **options)
        async with aclosing(stream) as pieces:
            async for piece in pieces:
                yield piece

    def _only_shown(self, asked: Asked, sampling: SamplingParams, options: FusionOptions) -> bool:
        """Whether nothing is to be computed: an echo without scores, or of a single token, which
        has none. Raises `ValueError` where the engine would not take the options."""
        scored = sampling.prompt_logprobs is not None and len(asked.ids) > 1
        if sampling.max_tokens or scored:
            return False
        resolve(self.engine.family, options)
        return True

    async def _score(
        self, model: str, request: ScoreRequest, id: str
    ) -> AsyncGenerator[Item, None]:
        pairs = await self._pairs(request)
        options = request.fusion.options(self.models[model].fusion)
        outputs = await together([self.engine.ascore(*pair, **options) for pair in pairs])
        data = []
        for index, ((_, rest), output) in enumerate(zip(pairs, outputs, strict=True)):
            logprobs = [finite(each) for each in output.logprobs]
            reading = Reading(self._token_bytes)
            data.append(
                {
                    "index": index,
                    "object": "score",
                    "score": sum(logprobs),
                    "is_greedy": all(output.greedy),
                    "token_ids": rest,
                    "tokens": [reading.take(token) for token in rest],
                    "token_logprobs": logprobs,
                }
            )
        used = usage(sum(len(one) + len(two) for one, two in pairs), 0)
        answer = {"id": f"score-{id}", "object": "list", "created": int(time.time())}
        yield to_json({**answer, "model": model, "data": data, "usage": used})
        yield used

    async def _asked(self, model: str, request: CompletionRequest | ChatRequest) -> list[Asked]:
        """The prompts of a request, tokenized one by one."""
        if isinstance(request, ChatRequest):
            size = sum(len(text) for _, text in request.texts)
            return [await self._aside(size, self._chat, model, request)]

        async def one(prompt: Prompt, field: str = "prompt") -> Asked:
            return await self._aside(len(prompt), self._prompt, prompt, field)

        if not request.prompts:
            return [await one(each) for each in listed(request.prompt or [])]
        there = self.engine.family.models
        if strange := [name for name in request.prompts if name not in there]:
            raise ValueError(
                f"`prompts` names {strange[0]!r}, which the family does not have; it has "
                f"{list(there)}"
            )
        own = {name: await one(each, "prompts") for name, each in request.prompts.items()}
        if request.prompt:
            shared = await one(listed(request.prompt)[0])
            own = {**dict.fromkeys(there, shared), **own}
        shown = own.get(LARGE) or next(iter(own.values()))
        return [Asked({name: each.ids for name, each in own.items()}, shown.ids, shown.text)]

    def _prompt(self, prompt: Prompt, field: str) -> Asked:
        if isinstance(prompt, str):
            ids = self.engine.tokenizer.encode(prompt)
            self._check_sizes([(field, ids)])
            return Asked(ids, ids, prompt)
        return Asked(prompt, prompt, self._read(prompt, field))

    def _chat(self, model: str, request: ChatRequest) -> Asked:
        """The prompt of a conversation, by the chat templates. Raises `ValueError` without one."""
        made = self.engine.render(
            [message.plain() for message in request.messages],
            chat_template=self.models[model].chat_template,
            chat_template_kwargs=request.chat_template_kwargs,
        )
        self._check_sizes([("messages", made.ids)])
        return Asked(made.prompt, made.ids, made.text, made.ending)

    async def _pairs(self, request: ScoreRequest) -> list[tuple[list[int], list[int]]]:
        """Tokens of each prompt and its continuation."""
        pairs = []
        for prompt, rest in request.pairs():
            pairs.append(await self._aside(len(prompt) + len(rest), self._pair, prompt, rest))
        return pairs

    def _pair(self, prompt: Prompt, rest: Prompt) -> tuple[list[int], list[int]]:
        if isinstance(prompt, str) and isinstance(rest, str):
            one, two = self.engine.tokenize_pair(prompt, rest)
        else:
            one, two = list(prompt), list(rest)  # type: ignore[arg-type]
        for field, ids in (("prompt", one), ("continuation", two)):
            if not ids:
                raise ValueError(f"`{field}` has no tokens; give at least one")
            self._check_sizes([(field, ids)])
            self._check_tokens(ids, field)
        return one, two

    def _tokenizer_info(self, model: str) -> Json:
        tokenizer, template = self.engine.tokenizer, self.models[model].chat_template
        names = ("eos_token", "bos_token", "pad_token")
        own = template if isinstance(template, str) else None
        return {
            "tokenizer_class": type(tokenizer).__name__,
            **{name: getattr(tokenizer, name) for name in names},
            "chat_template": own or tokenizer.chat_template,
        }

    def _tokenize(self, request: TokenizeRequest) -> Json:
        tokens = self.engine.tokenizer.encode(
            request.prompt, add_special_tokens=request.add_special_tokens
        )
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self.context}

    def _read(self, ids: Sequence[int], field: str) -> str:
        """What tokens read. Raises `ValueError` where one is none, naming `field`."""
        self._check_tokens(ids, field)
        return str(self.engine.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _check_tokens(self, ids: Sequence[int], field: str) -> None:
        vocab = self.engine.limits.vocab
        if strange := [token for token in ids if not 0 <= token < vocab]:
            raise ValueError(
                f"`{field}` holds token {strange[0]}, outside the vocabulary of {vocab}"
            )


@dataclass(frozen=True)
class Asked:
    """One prompt, ready for the engine."""

    prompt: Prompts
    ids: list[int]
    """Of the large model, where they differ."""
    text: str
    ending: Callable[[SamplingParams], SamplingParams] = lambda given: given
    """Adds what ends an answer to this prompt."""


async def merged(
    streams: Sequence[AsyncIterator[Output]],
) -> AsyncGenerator[list[tuple[int, Output]], None]:
    """What several streams bring, with their numbers, as soon as it is there."""
    news: asyncio.Queue[tuple[int, Output] | BaseException | None] = asyncio.Queue()

    async def read(index: int, stream: AsyncIterator[Output]) -> None:
        try:
            async for piece in stream:
                news.put_nowait((index, piece))
            news.put_nowait(None)
        except Exception as error:
            news.put_nowait(error)

    tasks = [asyncio.create_task(read(*each)) for each in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            waiting = [await news.get()]
            waiting += [news.get_nowait() for _ in range(news.qsize())]
            batch = []
            for each in waiting:
                if isinstance(each, BaseException):
                    raise each
                if each is None:
                    left -= 1
                else:
                    batch.append(each)
            if batch:
                yield batch
    finally:
        await _cancelled(tasks)


async def together(calls: Iterable[Any]) -> list[Output]:
    """All outputs; the first one that fails cancels the others and is raised."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        outputs = await asyncio.gather(*tasks)
    finally:
        await _cancelled(tasks)
    return [output.checked() for output in outputs]


def _entries(output: Output) -> int:
    """How much there is to write of an output."""
    tops = (*output.top_logprobs, *output.prompt_top_logprobs)
    return len(output.token_ids) + len(output.prompt_logprobs) + sum(map(len, tops))


async def _cancelled(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def event(data: Json) -> bytes:
    """A server-sent event."""
    return b"data: " + to_json(data) + b"\n\n"
