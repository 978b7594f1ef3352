"""Tokens to text as they come: no half characters, nothing that may yet become a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

CONTEXT = 6
"""Prompt tokens decoded along, since some tokenizers drop a leading space of the first token."""


class Detokenizer:
    """Decodes one sequence token by token.

    Decoding is not additive over tokens (a character may span several, a space may depend on the
    token before), so each new piece is the difference of decoding a short window with and without
    the newest tokens; the window starts where text was last complete. The algorithm is that of
    Hugging Face's text-generation-inference.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._tokens = list(prompt[-CONTEXT:])
        self._start = 0
        self._read = len(self._tokens)

    def push(self, token: int) -> str:
        """The text that `token` completes, possibly none."""
        self._tokens.append(token)
        text = self._pending()
        if not text or text.endswith("\ufffd"):
            return ""  # the rest of the character is still to come
        self._start, self._read = self._read, len(self._tokens)
        return text

    def flush(self) -> str:
        """What is left at the end, incomplete characters as U+FFFD."""
        return self._pending()

    def _pending(self) -> str:
        before = self._decode(self._tokens[self._start : self._read])
        return self._decode(self._tokens[self._start :])[len(before) :]


class StopStrings:
    """Finds the first of several strings in a stream, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that may be shown now, and the stop string that was met (it is cut off)."""
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            at, stop = min(found)
            return text[:at], stop
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], None

    def flush(self) -> str:
        """What was held back and is now known to be plain text."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """A sequence's text: detokenised, cut at stop strings."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stops: Sequence[str]
    ) -> None:
        self._detokenizer = Detokenizer(decode, prompt)
        self._stops = StopStrings(stops)
        self._stopped: str | None = None

    def push(self, token: int, *, may_stop: bool = True) -> tuple[str, str | None]:
        """The text that is final now, and the stop string that ended it."""
        text = self._detokenizer.push(token)
        if not may_stop:
            return text, None
        text, self._stopped = self._stops.push(text)
        return text, self._stopped

    def end(self) -> str:
        """The rest of the text; nothing after a stop string."""
        if self._stopped is not None:
            return ""
        text, stopped = self._stops.push(self._detokenizer.flush())
        return text if stopped else text + self._stops.flush()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
