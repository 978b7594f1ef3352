"""What single tokens read: their bytes, and the text that each completes after those before it.

A character may be made of several tokens. As in vLLM the last of them reads as the whole of it, and
those before it as nothing, so that all of them together read as the text does.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Callable
from typing import Any

INCOMPLETE = "\ufffd"
BytesOf = Callable[[int], bytes]


def token_bytes(tokenizer: Any) -> BytesOf:
    """What says which bytes a token of a Hugging Face tokenizer stands for; each is found once."""

    def decoded(*tokens: int) -> str:
        return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    # Some tokenizers drop the space before the first word of a text, so tokens follow another one.
    first = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = decoded(*first)

    @functools.cache
    def bytes_of(token: int) -> bytes:
        text = decoded(*first, token)
        text = text[len(before) :] if text.startswith(before) else decoded(token)
        return text.encode() if INCOMPLETE not in text else _raw(tokenizer, token, text)

    return bytes_of


def _raw(tokenizer: Any, token: int, text: str) -> bytes:
    """The bytes of a token that is a part of a character, by how its vocabulary writes it."""
    written = tokenizer.convert_ids_to_tokens(token)
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", written):  # as SentencePiece does
        return bytes([int(byte[1], 16)])
    if all(each in BYTES for each in written):
        return bytes(BYTES[each] for each in written)
    return text.encode()


def _byte_level() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes: GPT-2's, and all since."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in shown)
    return {chr(byte): byte for byte in shown} | {chr(256 + n): b for n, b in enumerate(others)}


BYTES = _byte_level()


class Reading:
    """The text of one answer, as its tokens come."""

    def __init__(self, bytes_of: BytesOf) -> None:
        self.bytes_of = bytes_of
        self.length = 0
        """Characters so far."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, token: int) -> str:
        """What the next token completes."""
        text = self._decoder.decode(self.bytes_of(token))
        self.length += len(text)
        return text

    def instead(self, token: int) -> str:
        """What another one would complete in its place; ask before the next is taken."""
        state = self._decoder.getstate()
        text = self._decoder.decode(self.bytes_of(token))
        self._decoder.setstate(state)
        return text
