"""Streamed text is the text of all tokens, never half a character, never past a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlf_ray.text import StopStrings, TextStream


def decode(ids):
    """A byte-level vocabulary: several tokens make one character, as in every byte-level BPE."""
    return bytes(ids).decode("utf-8", errors="replace")


def run(text, stops=()):
    stream = TextStream(decode, list(b"prompt "), stops)
    pieces = []
    for token in text.encode():
        piece, stopped = stream.push(token)
        pieces.append(piece)
        if stopped:
            break
    return [*pieces, stream.end()]


@given(st.text(alphabet="aé漢😀 .\n", max_size=40))
def test_pieces_add_up_and_hold_whole_characters(text):
    pieces = run(text)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_never_completes_is_shown_as_such_at_the_end():
    stream = TextStream(decode, [], ())
    assert stream.push("é".encode()[0]) == ("", None)
    assert stream.end() == "\ufffd"


@given(
    st.text(alphabet="abc", max_size=30),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string(text, stops):
    # By definition: the shortest beginning of the text that holds a stop string, up to there.
    expected = text
    for end in range(len(text) + 1):
        found = [at for stop in stops if (at := text[:end].find(stop)) >= 0]
        if found:
            expected = text[: min(found)]
            break
    assert "".join(run(text, stops)) == expected


def test_nothing_that_may_become_a_stop_string_is_shown():
    stops = StopStrings(["END"])
    assert stops.push("the E") == ("the ", None)
    assert stops.push("N") == ("", None)
    assert stops.push("T") == ("ENT", None)
    assert stops.push("xEN") == ("x", None)
    assert stops.push("D and more") == ("", "END")


@pytest.mark.parametrize("length", [0, 1, 20])
def test_the_prompt_never_appears(length):
    stream = TextStream(decode, list(b"p" * length), ())
    assert stream.push(ord("a")) == ("a", None)
