"""Tokens to text as they come: no half characters, nothing that may yet become a stop string."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any, Protocol

from tokenizers.decoders import DecodeStream

CONTEXT = 6
"""Prompt tokens decoded along, since some tokenizers drop a leading space of the first token."""
LONGEST = 16
"""Tokens without whole characters after which some of them are taken to be broken ones."""
CHARACTER = 4
"""The most tokens that make one character, each a byte."""
INCOMPLETE = "\ufffd"
Decode = Callable[[Sequence[int]], str]
Step = Callable[[int], str | None]
"""What one more token completes, as `DecodeStream.step`; an exception where it cannot go on."""


class Detokenizer(Protocol):
    """Decodes one sequence token by token."""

    def push(self, token: int) -> str:
        """The text that `token` completes, possibly none."""

    def flush(self) -> str:
        """What is left at the end, incomplete characters as U+FFFD."""


def detokenizers(tokenizer: Any) -> Callable[[Sequence[int]], Detokenizer]:
    """What makes the detokenizer of a sequence from its prompt, for a Hugging Face tokenizer.

    Special tokens have no text, and text is not beautified.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        tokens = backend.get_added_tokens_decoder().items()
        special = frozenset(token for token, added in tokens if added.special)

        def stream(context: Sequence[int]) -> Step:
            return partial(DecodeStream(list(context), skip_special_tokens=True).step, backend)

        return partial(_Detokenizer, backend.decode, stream, special)

    def decode(tokens: Sequence[int]) -> str:
        how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(tokens, **how))

    special = frozenset(getattr(tokenizer, "all_special_ids", ()))
    return partial(_Detokenizer, decode, lambda context: _Window(decode, context).step, special)


class _Window:
    """What `DecodeStream` does, for a tokenizer that is not of its library.

    Decoding is not additive over tokens (a character may span several, a space may depend on the
    token before), so each new piece is the difference of decoding a short window with and without
    the newest tokens; the window starts where text was last complete. The algorithm is that of
    Hugging Face's text-generation-inference.
    """

    def __init__(self, decode: Decode, context: Sequence[int]) -> None:
        self._decode = decode
        self._tokens = list(context)
        self._read = len(self._tokens)
        self._before = decode(self._tokens)

    def step(self, token: int) -> str | None:
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if len(text) <= len(self._before) or text.endswith(INCOMPLETE):
            return None
        if not text.startswith(self._before):
            raise ValueError(f"{text!r} does not go on from {self._before!r}")
        new = text[len(self._before) :]
        self._tokens = self._tokens[self._read :]
        self._read = len(self._tokens)
        self._before = self._decode(self._tokens)
        return new


class _Detokenizer:
    """A stream of text, wherever the prompt ends and whatever bytes come."""

    def __init__(
        self,
        decode: Decode,
        stream: Callable[[Sequence[int]], Step],
        special: Collection[int],
        prompt: Sequence[int],
    ) -> None:
        self._decode = decode
        self._stream = stream
        self._special = special
        # special tokens have no text, so they would only fill the window
        texts = (token for token in reversed(prompt) if token not in special)
        last = [*islice(texts, CONTEXT + CHARACTER - 1)][::-1]
        self._context, self._pending = _split(decode, last)
        """The tokens of the newest text, and those after it that have shown none yet."""
        self._prompt = self._text(self._pending)
        """What the end of the prompt shows of a character that the answer may complete."""
        self._step = self._started()

    def push(self, token: int) -> str:
        if token in self._special:
            return ""
        self._pending.append(token)
        try:
            text = self._step(token)
        except Exception:  # it has no type of its own: a broken character changes the text before
            text = self._decode(self._pending)
            self._step = self._stream(self._pending)
        if text is None:
            return "" if len(self._pending) < LONGEST else self._broken()
        self._context, self._pending = self._pending, []
        return self._without_prompt(text)

    def flush(self) -> str:
        text, self._pending = self._text(self._pending), []
        return self._without_prompt(text)

    def _started(self) -> Step:
        step = self._stream(self._context)
        for token in self._pending:
            step(token)
        return step

    def _text(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, after their context where that can be told."""
        before, whole = self._decode(self._context), self._decode([*self._context, *tokens])
        return whole[len(before) :] if whole.startswith(before) else self._decode(tokens)

    def _broken(self) -> str:
        """The first of the pending tokens as text, if none of them belongs to a character that the
        others begin; so what never completes is shown, and costs no more for each token."""
        text = self._text(self._pending)
        for count in range(len(self._pending) - 1, len(self._pending) - 1 - CHARACTER, -1):
            rest = self._decode(self._pending[count:])
            first = self._text(self._pending[:count])
            if rest.endswith(INCOMPLETE) and first + rest == text:
                self._context, self._pending = [], self._pending[count:]
                self._step = self._started()
                return self._without_prompt(first)
        return ""

    def _without_prompt(self, text: str) -> str:
        if self._prompt:
            pairs = enumerate(zip(text, self._prompt, strict=False))
            shown = min(len(text), len(self._prompt))
            text, self._prompt = text[next((n for n, (a, b) in pairs if a != b), shown) :], ""
        return text


class StopStrings:
    """Finds the first of several strings in a stream, and holds back what may become one.

    Each string is looked for as by Knuth, Morris and Pratt, but only from where its first character
    is met: a character costs a look at those strings of which the text now ends with a beginning.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._starting: dict[str, list[str]] = {}
        for stop in stops:
            self._starting.setdefault(stop[0], []).append(stop)
        self._begun: dict[str, int] = {}
        """How many characters of which strings the text ends with."""
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Text that may be shown now, and the stop string that was met (it is cut off).

        Where it may not stop, a string that ends in `text` is plain text, one that begins there is
        not.
        """
        if not self._starting:
            return text, None
        held, self._held = len(self._held), self._held + text
        for end, char in enumerate(text, start=held + 1):
            begun: dict[str, int] = {}
            met = ""
            for stop in {*self._begun, *self._starting.get(char, ())}:
                size = self._begun.get(stop, 0)
                while size and stop[size] != char:
                    size = _borders(stop)[size - 1]
                size += stop[size] == char
                if size == len(stop):
                    met = max(met, stop, key=len)
                    size = _borders(stop)[size - 1]
                if size:
                    begun[stop] = size
            if met and may_stop:
                before, self._held, self._begun = self._held[: end - len(met)], "", {}
                return before, met
            self._begun = begun
        shown = len(self._held) - max(self._begun.values(), default=0)
        text, self._held = self._held[:shown], self._held[shown:]
        return text, None

    def flush(self) -> str:
        """What was held back and is now known to be plain text."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """A sequence's text: detokenised, cut at stop strings."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._stopped: str | None = None

    def push(self, token: int, *, may_stop: bool = True) -> tuple[str, str | None]:
        """The text that is final now, and the stop string that ended it.

        As in vLLM, a stop string counts if it ends where the text may stop, wherever it began.
        """
        text, self._stopped = self._stops.push(self._detokenizer.push(token), may_stop=may_stop)
        return text, self._stopped

    def end(self) -> str:
        """The rest of the text; nothing after a stop string."""
        if self._stopped is not None:
            return ""
        text, stopped = self._stops.push(self._detokenizer.flush())
        return text if stopped else text + self._stops.flush()


@lru_cache(maxsize=256)
def _borders(stop: str) -> list[int]:
    """For each beginning of `stop`, the length of its longest proper beginning that ends it too."""
    borders = [0]
    for char in stop[1:]:
        size = borders[-1]
        while size and stop[size] != char:
            size = borders[size - 1]
        borders.append(size + (stop[size] == char))
    return borders


def _split(decode: Decode, last: Sequence[int]) -> tuple[list[int], list[int]]:
    """The last tokens of a prompt that are whole characters, and those of one that may go on."""
    spare = max(0, len(last) - CONTEXT)
    for end in range(len(last), 0, -1):
        texts = {start: decode(last[start:end]) for start in range(min(spare, end), -1, -1)}
        complete = [start for start, text in texts.items() if not text.endswith(INCOMPLETE)]
        if complete:  # best one that does not start within a character, either
            clean = (start for start in complete if not texts[start].startswith(INCOMPLETE))
            return list(last[next(clean, complete[0]) : end]), list(last[end:])
    return [], list(last)
