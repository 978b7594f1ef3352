"""Answers of a given shape: which tokens may come next, and when one is complete.

llguidance keeps the state of a grammar and says after each token which may follow. (xgrammar was
considered: it passes over the keywords of JSON schema that it does not know, where llguidance
refuses them by name, and compiles a grammar for the whole vocabulary before the first token.) Its
matchers can be rolled back, should tokens that were tried be withdrawn.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from copy import copy
from functools import lru_cache
from typing import Any

import llguidance
import numpy as np
import torch
from torch import Tensor

from dlf_ray.params import StructuredOutputs

WHITESPACE = r"[ \t]{0,2}|\r?\n[ \t]{0,80}"
"""Between the tokens of JSON: what people and models write, but no endless row of blank lines, with
which an unsure model would fill its answer."""


def grammar(wanted: StructuredOutputs) -> str:
    """In llguidance's own form. Raises `ValueError`, saying what is wrong, where there is none."""
    try:
        made = _converted(wanted)
    except Exception as error:  # the converters raise whatever they like
        raise ValueError(f"`structured_outputs` cannot be read: {error}") from None
    if wrong := _wrong(made):
        raise ValueError(_unfollowed(wrong))
    return made


@lru_cache(maxsize=64)
def _wrong(made: str) -> str:
    """Why a grammar cannot be followed; most requests come with one of the last few."""
    return llguidance.LLMatcher.validate_grammar(made)


def _converted(wanted: StructuredOutputs) -> str:
    if wanted.json is not None or wanted.json_object:
        schema = {"type": "object"} if wanted.json is None else wanted.json
        options: Any = {"whitespace_pattern": WHITESPACE}
        return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=options)
    if wanted.regex is not None:
        return llguidance.LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.grammar is not None:
        return llguidance.grammar_from("grammar", wanted.grammar)
    choices = (json.dumps(each, ensure_ascii=False) for each in wanted.choice)
    return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(choices))


class Grammars:
    """Makes the shapes of answers, for one tokenizer."""

    def __init__(self, tokenizer: Any, end_tokens: Collection[int]) -> None:
        self._tokenizer: llguidance.LLTokenizer | ValueError
        try:
            self._tokenizer = _wrapped(tokenizer, end_tokens)
        except Exception as error:  # whoever asks for a shape is told; all others can do without
            self._tokenizer = ValueError(
                f"`structured_outputs` do not know this tokenizer: {error}"
            )
        self._started = lru_cache(maxsize=64)(self._start)

    def shape(self, wanted: StructuredOutputs) -> Shape:
        """The shape of an answer that has not begun. Raises `ValueError` where there is none."""
        return Shape(self._started(grammar(wanted)).deep_copy())

    def _start(self, made: str) -> llguidance.LLMatcher:
        if isinstance(self._tokenizer, ValueError):
            raise self._tokenizer
        matcher = llguidance.LLMatcher(self._tokenizer, made, log_level=0)
        if matcher.is_error():
            raise ValueError(_unfollowed(matcher.get_error()))
        return matcher


def _wrapped(tokenizer: Any, end_tokens: Collection[int]) -> llguidance.LLTokenizer:
    """A tokenizer for llguidance: half a second for 50,000 tokens, in which nobody waits yet."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("it is not of the tokenizers library")
    backend = copy(backend)
    backend.no_padding()
    backend.no_truncation()
    return llguidance.LLTokenizer(
        backend.to_str(), n_vocab=len(tokenizer), eos_token=list(end_tokens)
    )


def _unfollowed(error: str) -> str:
    """What to say of llguidance's reason, which may end in all that it knows."""
    reason = " ".join(error.split("<state>")[0].split())
    return f"`structured_outputs` cannot be followed: {reason}"


class Shape:
    """What one answer, as far as it has come, may go on with."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher
        self._allowed: np.ndarray[Any, Any] | None = None

    def prepare(self) -> None:
        """Finds the tokens that may come next, where that is not known yet: the costly part, for
        which there is time while models compute. Raises `ValueError` where it cannot."""
        if self._allowed is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            if self._matcher.is_error():
                raise ValueError(_unfollowed(self._matcher.get_error()))
            self._allowed = np.unpackbits(bits, bitorder="little").astype(bool)

    def bar(self, row: Tensor) -> None:
        """Leaves only the tokens that may come next of the logits [V], in place; what is not
        prepared is left as it is."""
        if self._allowed is not None:
            allowed = torch.from_numpy(self._allowed[: len(row)]).to(row.device)
            row.masked_fill_(~allowed, -torch.inf)

    def push(self, token: int) -> None:
        """One more token of the answer."""
        self._allowed = None
        self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()


def shaped(logits: Tensor, shapes: Sequence[Shape | None]) -> Tensor:
    """Logits [R, V] of which each row's shape has barred tokens; a new tensor if any does."""
    if not any(shapes):
        return logits
    changed = logits.clone()
    for row, shape in enumerate(shapes):
        if shape is not None:
            shape.bar(changed[row])
    return changed
