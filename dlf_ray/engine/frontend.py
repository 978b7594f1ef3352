"""What a user holds: prompts in, outputs out, whatever runs below.

`Engine` (over Ray) and `LocalEngine` (in this process) share this part: tokenizing, checking,
per-request fusion, collecting what streams back.
"""

from __future__ import annotations

import itertools
import queue
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeAlias, Unpack

from rich.progress import track

from dlf_ray.config import LARGE, Family
from dlf_ray.decoding.structured import grammar
from dlf_ray.engine.chat import Conversation, Rendered, Templates, assigned, render
from dlf_ray.engine.options import FusionOptions, resolve
from dlf_ray.engine.output import Output, raised
from dlf_ray.messages import Chunk, ContextLengthError, Limits, Request
from dlf_ray.params import FusionParams, SamplingParams

Prompt: TypeAlias = "str | Sequence[int]"
"""Text, or token ids as they are."""
Prompts: TypeAlias = "Prompt | Mapping[str, Prompt]"
"""One prompt for all models, or a mapping from model names; `large` (else the first) is shared by
the models that are not named."""
Continuation: TypeAlias = "str | Sequence[int]"
Deliver: TypeAlias = "Callable[[Chunk | Exception], None]"
WINDOW = 4
"""Requests that are under way together, as a multiple of `max_num_seqs`: enough for every slot to
have a successor waiting, and a queue that does not grow with what was asked."""
SPACES = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\r\n")
"""White space but line breaks."""


class BaseEngine(ABC):
    """Generates with one family of models."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.tokenizer: Any = None
        """The large model's, as Hugging Face made it."""
        self.tokenizers: dict[str, Any] = {}
        """Of the models whose vocabularies are not all the large one's."""
        self.chat_templates: dict[str, str] = {}
        """Of the loaded models that have one."""
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

    def default_sampling(self, **given: Any) -> SamplingParams:
        """How tokens are drawn where a request does not say: greedily, as in the paper, or with
        `engine.generation_config: auto` as the large model's checkpoint recommends; with what is
        `given` on top."""
        return SamplingParams(**{**self.limits.sampling, **given})

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
        prompts: Iterable[Prompts],
        sampling: SamplingParams | None = None,
        **fusion: Unpack[FusionOptions],
    ) -> Iterator[tuple[int, Output]]:
        """Like `generate`, but yields each prompt's number and output as soon as it has ended.

        An iterator of prompts may have any number of them: they are taken, and checked, as there
        is room.
        """
        params = resolve(self.family, fusion)
        sampling, trace = sampling or self.default_sampling(), fusion.get("trace", False)
        requests = (
            self._request(f"prompt {number}: ", prompt, sampling, params, trace)
            for number, prompt in enumerate(prompts)
        )
        return self._as_completed(requests if isinstance(prompts, Iterator) else list(requests))

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: Templates | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        progress: bool = False,
        **fusion: Unpack[FusionOptions],
    ) -> list[Output]:
        """Generates the next message of one conversation, or of each of a list of them.

        Conversations become prompts as `render` says; else as `generate`, errors too. The token
        that ends a turn by the chat template ends the answer.
        """
        talks = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [
            self.render(
                talk,  # type: ignore[arg-type]
                chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
            for talk in talks
        ]
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or self.default_sampling()] * len(prompts)
        if len(sampling) != len(prompts):
            raise ValueError(
                f"{len(prompts)} conversations but {len(sampling)} sampling parameters"
            )
        ended = [each.ending(own) for each, own in zip(prompts, sampling, strict=True)]
        return self.generate([each.prompt for each in prompts], ended, progress=progress, **fusion)

    def render(
        self,
        messages: Conversation,
        *,
        chat_template: Templates | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> Rendered:
        """A conversation as the prompt of every model by its own chat template (see `templates`).

        `chat_template_kwargs` are variables of the template, such as `enable_thinking`. What a
        template writes is tokenized as it is: it writes the BOS token too, if the model knows one.
        Raises `ValueError` where there is no template, or the conversation does not fit it.
        """
        own = {*self.chat_templates, *(chat_template if isinstance(chat_template, Mapping) else ())}
        return render(
            self.tokenizer,
            # what is another's template has to be made of tokens that the model knows
            {name: each for name, each in self.tokenizers.items() if name in own},
            self.templates(chat_template),
            self.limits,
            messages,
            chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def templates(self, given: Templates | None = None) -> dict[str, str]:
        """The chat template of each loaded model: what is `given` for all or for it, else its own,
        else the large model's. Raises `ValueError` where that has none."""
        self.limits.check_names(given if isinstance(given, Mapping) else ())
        return assigned(self.limits.lengths, self.chat_templates, given, self.tokenizer)

    def score(
        self,
        prompts: Prompts | Sequence[Prompts],
        continuations: Sequence[Continuation],
        *,
        progress: bool = False,
        **fusion: Unpack[FusionOptions],
    ) -> list[Output]:
        """The log-probability of each token of a continuation under the fused distribution.

        One continuation for each prompt; a string is tokenized as `tokenize_pair` says (with the
        prompt of the large model).
        Nothing is generated; rows of logits are computed a bounded number at a time.
        Errors are those of `generate`.
        """
        requests = self._requests(prompts, None, fusion, continuations)
        return self._gather(requests, "scoring", progress)

    def score_as_completed(
        self,
        pairs: Iterable[tuple[Prompts, Continuation]],
        **fusion: Unpack[FusionOptions],
    ) -> Iterator[tuple[int, Output]]:
        """Like `score`, but yields the number and output of each pair of a prompt and its
        continuation as soon as it has ended; of an iterator as in `generate_as_completed`."""
        params = resolve(self.family, fusion)
        sampling, trace = SamplingParams(max_tokens=0), fusion.get("trace", False)
        requests = (
            self._request(f"prompt {number}: ", prompt, sampling, params, trace, continuation)
            for number, (prompt, continuation) in enumerate(pairs)
        )
        return self._as_completed(requests if isinstance(pairs, Iterator) else list(requests))

    def tokenize(self, prompt: str, *, bos: bool = True) -> list[int]:
        """The tokens of a prompt, with the BOS token that the tokenizer begins texts with; a text
        that has it already, as chat templates write it, gets no second one, and without `bos` none
        is added."""
        token = self.tokenizer.bos_token
        begun = bool(token) and prompt.startswith(token)
        return list(self.tokenizer.encode(prompt, add_special_tokens=bos and not begun))

    def tokenize_pair(
        self, prompt: str, continuation: str, *, bos: bool = True
    ) -> tuple[list[int], list[int]]:
        """The tokens of a prompt (`bos` as in `tokenize`), and those of what follows it.

        Both are tokenized as one text and split where the tokens of the prompt alone end, as
        lm-evaluation-harness does. Spaces at the end of the prompt belong to the continuation, to
        whose first word tokenizers join them; a line break there ends the prompt. (The harness
        moves that too, and so scores it with every continuation.) Where a token reaches over the
        boundary, each side is tokenized by itself: the text stays what it is, and nothing of
        another side is scored.
        """
        kept = prompt.rstrip(SPACES)
        if not self.tokenize(kept, bos=bos):  # nothing but spaces, and no BOS token before them
            kept = prompt
        first = self.tokenize(kept, bos=bos)
        whole = self.tokenize(prompt + continuation, bos=bos)
        if whole[: len(first)] == first and len(whole) > len(first):
            return first, whole[len(first) :]
        return first, self._inside(prompt[len(kept) :] + continuation)

    def _inside(self, text: str) -> list[int]:
        """The tokens of a text that does not begin one: no BOS, nor a space that some tokenizers
        put before the first word."""

        def plain(text: str) -> list[int]:
            return list(self.tokenizer.encode(text, add_special_tokens=False))

        before = plain("\n")
        both = plain("\n" + text)
        return both[len(before) :] if both[: len(before)] == before else plain(text)

    def _gather(self, requests: list[Request], what: str, progress: bool) -> list[Output]:
        """Sends all requests and waits for all; their outputs in order."""
        outputs: dict[int, Output] = {}
        done = self._as_completed(requests)
        for number, output in track(done, what, total=len(requests), disable=not progress):
            outputs[number] = output
        return [outputs[number] for number in range(len(requests))]

    def _as_completed(self, requests: Iterable[Request]) -> Iterator[tuple[int, Output]]:
        """Yields the number and the output of each request as it ends.

        A window of requests is under way: each that ends is followed by the next one.
        """
        window = WINDOW * self.family.engine.max_num_seqs
        numbered = enumerate(requests)
        running: dict[int, tuple[int, Request, Output]] = {}
        mailbox: queue.SimpleQueue[Chunk | Exception] = queue.SimpleQueue()
        try:
            while True:
                for number, request in itertools.islice(numbered, window - len(running)):
                    running[request.id] = number, request, Output()
                    self._deliver[request.id] = mailbox.put
                    self._send(request)
                if not running:
                    return
                chunk = self._wait(mailbox)
                number, request, output = running[chunk.id]
                output.add(chunk, request)
                if chunk.finish_reason:
                    del running[chunk.id]
                    yield number, output
        finally:
            self._forget(running)

    def stream(
        self,
        prompt: Prompts,
        sampling: SamplingParams | None = None,
        **fusion: Unpack[FusionOptions],
    ) -> Iterator[Output]:
        """Yields what each step adds; leaving the loop early frees the request.

        Raises `RuntimeError` where the request fails on the way, `ValueError` where it is refused.
        """
        (request,) = self._requests([prompt], sampling, fusion)
        mailbox: queue.SimpleQueue[Chunk | Exception] = queue.SimpleQueue()
        with self._open([request], mailbox.put):
            while True:
                output = Output().add(self._wait(mailbox), request).checked()
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
            scores = continuations is not None
            default = SamplingParams(max_tokens=0) if scores else self.default_sampling()
            sampling = [sampling or default] * len(many)
        for what, given in (("sampling parameters", sampling), ("continuations", continuations)):
            if given is not None and len(given) != len(many):
                raise ValueError(f"{len(many)} prompts but {len(given)} {what}")
        rests: Sequence[Continuation | None] = continuations or [None] * len(many)
        trace = fusion.get("trace", False)
        return [
            self._request(
                f"prompt {number}: " if len(many) > 1 else "", prompt, each, params, trace, rest
            )
            for number, (prompt, each, rest) in enumerate(zip(many, sampling, rests, strict=True))
        ]

    def _request(
        self,
        where: str,
        prompt: Prompts,
        sampling: SamplingParams,
        params: FusionParams,
        trace: bool,
        continuation: Continuation | None = None,
    ) -> Request:
        """One request, checked. Raises `ValueError` that begins with `where` it is."""
        try:
            shared, own = self._tokenized(prompt)
            rest: tuple[int, ...] = ()
            if continuation is not None:
                shared, own, rest = self._continued(prompt, shared, own, continuation)
            # Nothing is sent, or held in a queue, once for each model if it is the same.
            own = {name: tokens for name, tokens in own.items() if tokens != shared}
            if continuation is None and sampling.prompt_logprobs is not None:
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
                sampling=sampling,
                fusion=params,
                trace=trace,
            )
            self.limits.check(request)
            if sampling.structured_outputs is not None:
                grammar(sampling.structured_outputs)
        except ContextLengthError as error:
            raise ContextLengthError(where + str(error)) from None
        except ValueError as error:
            raise ValueError(where + str(error)) from None
        return request

    def _tokenized(self, prompt: Prompts) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
        """The prompt of most models, and those of the models that are named."""
        if not isinstance(prompt, Mapping):
            return self._encode(prompt), {}
        if not prompt:
            raise ValueError("a mapping of prompts needs at least one model's")
        self.limits.check_names(prompt)
        own = {name: self._encode(each) for name, each in prompt.items()}
        return own.get(LARGE) or next(iter(own.values())), own

    def _continued(
        self,
        prompt: Prompts,
        shared: tuple[int, ...],
        own: dict[str, tuple[int, ...]],
        continuation: Continuation,
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
            rest = tuple((pairs.get(LARGE) or next(iter(pairs.values())))[1])
            own = {
                # one that ends in another way keeps its end
                name: tuple(one) if tuple(two) == rest else self._encode(texts[name])
                for name, (one, two) in pairs.items()
            }
            shared = own.get(LARGE) or next(iter(own.values()))
        else:
            raise ValueError("a prompt of token ids needs a continuation of token ids")
        if not rest:
            raise ValueError("the continuation is empty: give at least one token to score")
        return shared, own, rest

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(self.tokenize(prompt) if isinstance(prompt, str) else prompt)

    @contextmanager
    def _open(self, requests: Sequence[Request], deliver: Deliver) -> Iterator[None]:
        """Sends the requests; whatever of them is not finished at the end is aborted."""
        try:
            for request in requests:
                self._deliver[request.id] = deliver
                self._send(request)
            yield
        finally:
            self._forget(request.id for request in requests)

    def _forget(self, ids: Iterable[int]) -> None:
        """Aborts what has not ended."""
        for id in ids:
            if self._deliver.pop(id, None):
                self._abort(id)

    def _dispatch(self, chunk: Chunk) -> None:
        """Gives a chunk to whoever asked; nobody does where an abort has just crossed it."""
        deliver = self._deliver.get(chunk.id)
        if chunk.finish_reason:
            self._deliver.pop(chunk.id, None)
        if deliver:
            deliver(chunk)

    def _wait(self, mailbox: queue.SimpleQueue[Chunk | Exception]) -> Chunk:
        return raised(mailbox.get())


def _listed(prompts: Prompts | Sequence[Prompts]) -> list[Prompts]:
    """A list of prompts, also from a single one: text, a mapping, or a list of token ids."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if len(prompts) and all(isinstance(each, int) for each in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
