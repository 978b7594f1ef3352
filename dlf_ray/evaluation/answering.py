"""Items answered by an engine, by generation or by the likelihood of their choices."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dlf_ray.config import LARGE
from dlf_ray.engine.chat import ends_of, rendered
from dlf_ray.engine.frontend import BaseEngine, Prompts
from dlf_ray.engine.options import FusionOptions, resolve
from dlf_ray.engine.output import Output
from dlf_ray.evaluation.dialogue import Asking
from dlf_ray.evaluation.tasks import Choice, Item, Response, Scores, Task
from dlf_ray.params import SamplingParams

PLAIN = Asking()
log = logging.getLogger("dlf_ray")


@dataclass(frozen=True)
class Answer:
    """One item, answered by one method."""

    item: Item
    response: Response
    scores: Scores
    output: Output
    """What was generated; empty for a likelihood."""
    seconds: float
    """Since the answer before it: its share of the time on the clock."""
    tokens: int
    cut: bool = False
    """Whether a prompt did not fit the context and lost its beginning."""


def answers(
    engine: BaseEngine,
    task: Task,
    items: Sequence[Item],
    options: FusionOptions,
    *,
    max_tokens: int | None = None,
    shots_for: Literal["large", "all"] = "all",
    on_overflow: Literal["truncate", "skip"] = "truncate",
    asking: Asking = PLAIN,
) -> Iterator[Answer]:
    """Answers all items, greedily or by likelihood; yields each as soon as it is there.

    An item that fails, or is left out for its length, has `output.error` and no scores.
    Raises `ValueError` where items are to be put as conversations and there is no chat template.
    """
    models = resolve(engine.family, options).models
    prompts = _Prompts(engine, models, asking, shots_for, on_overflow)
    if task.kind == "generate":
        sampling = SamplingParams(
            max_tokens=max_tokens or task.max_tokens,
            stop=task.stop,
            stop_token_ids=ends_of(engine.tokenizer, prompts.templates, engine.limits),
        )
        solved = _generated(engine, items, options, prompts, sampling)
    else:
        solved = _judged(engine, items, options, prompts)
    before = time.perf_counter()
    for item, response, output, tokens in solved:
        now = time.perf_counter()
        scores = {} if output.error else task.score(item, response)
        cut = item.id in prompts.cut
        yield Answer(item, response, scores, output, now - before, tokens, cut)
        before = now


class _Prompts:
    """Token ids of an item's prompt for the models that answer, cut to the context of each."""

    def __init__(
        self,
        engine: BaseEngine,
        models: Sequence[str],
        asking: Asking,
        shots_for: str,
        on_overflow: str,
    ) -> None:
        self.engine = engine
        self.models = models
        self.asking = asking
        self.templates = engine.templates() if asking.chat else {}
        if strange := [name for name in self.templates if name in engine.tokenizers]:
            raise ValueError(
                f"model {strange[0]!r} has tokens of its own, of which its chat template may be "
                "made, while items are put to all models in the large one's: leave out "
                "`apply_chat_template`"
            )
        self.shots_for = shots_for
        self.skip = on_overflow == "skip"
        self.cut: set[str] = set()
        """Items whose prompt did not fit."""
        self.left_out: list[tuple[Item, Response, Output, int]] = []
        """Items that were skipped for that, and not yet reported."""
        self._last: tuple[Item | None, dict[str, str]] = None, {}
        self._warned = False

    def of(self, item: Item, continuation: str, room: int) -> tuple[Prompts, list[int]]:
        """Each model's prompt, or the one of all, and the continuation's tokens.

        Raises `ValueError` to skip the item.
        """
        lengths = self.engine.limits.lengths
        texts = self._texts(item)
        pairs = {text: self._encode(text, continuation) for text in set(texts.values())}
        rest = pairs[texts[self.models[0]]][1]
        prompts = {}
        for name in self.models:
            (ids, own), limit = pairs[texts[name]], lengths[name]
            if own != rest:  # its template ends in another way, and keeps its end
                ids, _ = self._encode(texts[name], "")
            if not ids:
                raise ValueError("the prompt has no tokens")
            # The last token of a continuation is not computed; an answer needs some room.
            space = limit + 1 - len(rest) if rest else limit - min(room, limit // 2)
            if len(ids) > space:
                if self.skip or space < 1:
                    raise ValueError(
                        f"skipped: {len(ids) + len(rest)} tokens, of which model {name!r} takes "
                        f"{space + len(rest)}"
                    )
                ids = ids[-space:]
                self.cut.add(item.id)
            prompts[name] = ids
        first = prompts[self.models[0]]
        return first if all(ids == first for ids in prompts.values()) else prompts, rest

    def skipped(self, item: Item, error: ValueError) -> None:
        self.left_out.append((item, Response(), Output(error=str(error)), 0))

    def _texts(self, item: Item) -> dict[str, str]:
        """What each model is asked; of the last item they are kept, for its other choices."""
        if self._last[0] is not item:
            texts = {}
            for name in self.models:
                shots = name == LARGE or self.shots_for == "all"
                texts[name] = self._text(item, name, shots)
            self._last = item, texts
        return self._last[1]

    def _text(self, item: Item, name: str, shots: bool) -> str:
        if not self.asking.chat:
            return self.asking.text(item, shots)
        messages, template = self.asking.messages(item, shots), self.templates[name]
        try:
            return rendered(self.engine.tokenizer, template, messages)
        except ValueError as error:
            if messages[0]["role"] != "system":
                raise
            if not self._warned:
                log.warning("%s of model %r: going on without the system's message", error, name)
            self._warned = True
            return rendered(self.engine.tokenizer, template, messages[1:])  # as the harness does

    def _encode(self, text: str, continuation: str) -> tuple[list[int], list[int]]:
        bos = not self.asking.chat  # a chat template writes it
        if continuation:
            return self.engine.tokenize_pair(text, continuation, bos=bos)
        return self.engine.tokenize(text, bos=bos), []


_Solved = Iterator[tuple[Item, Response, Output, int]]


def _generated(
    engine: BaseEngine,
    items: Sequence[Item],
    options: FusionOptions,
    prompts: _Prompts,
    sampling: SamplingParams,
) -> _Solved:
    asked: list[Item] = []

    def texts() -> Iterator[Prompts]:
        for item in items:
            try:
                text, _ = prompts.of(item, "", sampling.max_tokens)
            except ValueError as error:
                prompts.skipped(item, error)
                continue
            asked.append(item)
            yield text

    for number, output in engine.generate_as_completed(texts(), sampling, **options):
        response = Response(output.text, output.finish_reason)
        yield asked[number], response, output, len(output.token_ids)
    yield from prompts.left_out


def _judged(
    engine: BaseEngine, items: Sequence[Item], options: FusionOptions, prompts: _Prompts
) -> _Solved:
    owners: list[tuple[int, int]] = []  # item and choice of each continuation

    def pairs() -> Iterator[tuple[Prompts, list[int]]]:
        for at, item in enumerate(items):
            try:
                choices = map(prompts.asking.choice, item.choices)
                found = [prompts.of(item, choice, 0) for choice in choices]
                if not all(rest for _, rest in found):
                    raise ValueError("a choice has no tokens")
            except ValueError as error:
                prompts.skipped(item, error)
                continue
            owners.extend((at, choice) for choice in range(len(found)))
            yield from found

    found: dict[int, dict[int, Output]] = {}
    for number, output in engine.score_as_completed(pairs(), **options):
        at, choice = owners[number]
        outputs = found.setdefault(at, {})
        outputs[choice] = output
        if len(outputs) == len(items[at].choices):
            ordered = [found[at][c] for c in range(len(outputs))]
            errors = [each.error for each in ordered if each.error]
            judged = tuple(Choice(sum(o.logprobs), all(o.greedy), len(o.logprobs)) for o in ordered)
            response = Response(choices=judged)
            tokens = sum(choice.tokens for choice in judged)
            yield items[at], response, Output(error=errors[0] if errors else None), tokens
            del found[at]
    yield from prompts.left_out
