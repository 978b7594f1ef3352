"""Streamed text is the text of all tokens, never half a character, never past a stop string."""

import json
import random
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dlf_ray.decoding.text import LONGEST, StopStrings, TextStream, detokenizers


class Bytes:
    """A byte-level vocabulary without a Rust backend: several tokens make one character."""

    all_special_ids = (256,)

    def decode(self, tokens, *, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        kept = bytes(token for token in tokens if token != 256)
        return kept.decode("utf-8", errors="replace")


def byte_level():
    """The same for `tokenizers`: token 0..255 is that byte, 256 special."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    rest = (byte for byte in range(256) if byte not in letters)
    letters.update({byte: chr(256 + number) for number, byte in enumerate(rest)})
    assert sorted(letters.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>")


WORDS = ["\u2581", "a", "é", "\u2581a", "\u2581Hello", "\u2581world", ".", "漢"]


def byte_fallback():
    """As SentencePiece does it: pieces with a mark for the space, bytes (0..255) for the rest."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {word: 257 + number for number, word in enumerate(WORDS)}
    vocab["</s>"] = 256
    fast = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, fuse_unk=True))
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>")


TEXT = "Is the moon made of cheese? No, the moon is made of rock. Hello world, déjà vu 12.5%!"


def llama(normalized):
    """As Llama's: BPE over pieces with a mark for the space, bytes for what it does not have."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    mark = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    made.pre_tokenizer = mark
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"])
    made.train_from_iterator([TEXT] * 9, trainer)
    trained = json.loads(made.to_str())["model"]
    merges = [tuple(each) for each in trained["merges"]]
    vocab = with_bytes(trained["vocab"])
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    fast = Tokenizer(model)
    if normalized:  # as of old, which adds a space to the text before it is cut
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        fast.normalizer = normalizers.Sequence(steps)
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spaces, strip = decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)
    fast.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    return special(fast)


def unigram():
    """As T5's and Gemma's: likely pieces, bytes for the rest, and a decoder that drops the mark of
    the first piece."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(piece, -1.0 - n / 9) for n, piece in enumerate(sorted(set(TEXT.split())))]
    pieces += [(f"\u2581{piece}", -1.0) for piece in sorted(set(TEXT.split()))]
    pieces += [(char, -9.0) for char in sorted({"\u2581", *TEXT} - {" "})]
    pieces = list(dict(pieces).items())
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    fast = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    mark = {"prepend_scheme": "first"}
    fast.pre_tokenizer = pre_tokenizers.Metaspace(**mark)
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(**mark)])
    return special(fast)


def wordpiece():
    """As BERT's: words in pieces, of which all but the first begin with ##."""
    words = {*TEXT.replace("?", "").replace(".", "").replace(",", "").replace("!", "").split()}
    chars = sorted({*TEXT} - {" "})
    pieces = ["[UNK]", "<s>", "</s>", *sorted(words), *chars, *(f"##{char}" for char in chars)]
    vocab = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    fast = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece()
    return special(fast)


def with_bytes(vocab):
    return vocab | {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}


def special(fast):
    fast.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")


KINDS = {
    "llama": llama(normalized=False),
    "old llama": llama(normalized=True),
    "unigram": unigram(),
    "wordpiece": wordpiece(),
}
BYTES = {"plain": Bytes(), "byte level": byte_level()}
FALLBACK = byte_fallback()
PIECES = st.one_of(
    st.sampled_from(range(256, 257 + len(WORDS))).map(lambda token: [token]),
    st.sampled_from("éß漢😀").map(lambda char: list(char.encode())),
)
every = pytest.mark.parametrize("tokenizer", BYTES.values(), ids=BYTES)


def decode(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces_of(tokenizer, prompt, answer):
    detokenizer = detokenizers(tokenizer)(prompt)
    return [*map(detokenizer.push, answer), detokenizer.flush()]


@settings(deadline=None, max_examples=300)
@given(
    text=st.text(alphabet="aeé漢😀 .\n\tßHlo", max_size=30)
    | st.lists(st.sampled_from([*TEXT.split(), " ", "漢", "  ", "😀😀"])).map(" ".join),
    at=st.floats(0, 1),
    marks=st.lists(st.floats(0, 1), max_size=3),
)
@pytest.mark.parametrize("tokenizer", [*KINDS.values(), byte_level()], ids=[*KINDS, "bytes"])
def test_wherever_a_text_is_cut_no_character_is_lost(tokenizer, text, at, marks):
    """The pieces are what is decoded after the prompt, with special tokens anywhere between; where
    the prompt ends within a character, that whole character."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    for mark in marks:
        tokens.insert(round(mark * len(tokens)), tokenizer.eos_token_id)
    cut = round(at * len(tokens))
    whole = decode(tokenizer, tokens)
    befores = (decode(tokenizer, tokens[:end]) for end in range(cut, -1, -1))
    before = next(each for each in befores if not each.endswith("\ufffd"))
    assert whole.startswith(before)
    pieces = pieces_of(tokenizer, tokens[:cut], tokens[cut:])
    assert "".join(pieces) == whole[len(before) :]
    assert not any("\ufffd" in piece for piece in pieces)


def run(text, stops=(), tokenizer=BYTES["byte level"]):
    stream = TextStream(detokenizers(tokenizer)(list(b"prompt ")), stops)
    pieces = []
    for token in text.encode():
        piece, stopped = stream.push(token)
        pieces.append(piece)
        if stopped:
            break
    return [*pieces, stream.end()]


@every
@given(text=st.text(alphabet="aé漢😀 .\n", max_size=40))
def test_pieces_add_up_and_hold_whole_characters(tokenizer, text):
    pieces = run(text, tokenizer=tokenizer)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@every
@given(prompt=st.binary(max_size=9), answer=st.binary(max_size=60))
def test_bytes_that_are_no_text_are_all_shown(tokenizer, prompt, answer):
    """The pieces are the decoded answer, wherever it was cut from the prompt; never stuck."""
    whole, before = decode(tokenizer, [*prompt, *answer]), decode(tokenizer, list(prompt))
    pieces = pieces_of(tokenizer, list(prompt), list(answer))
    text = "".join(pieces)
    if whole.startswith(before):
        assert text == whole[len(before) :]
    else:  # the answer completes the prompt's last character
        assert whole.endswith(text)
        assert whole.startswith(before.rstrip("\ufffd"))
        assert len(text) >= len(whole) - len(before)
    hidden = 0
    for token, piece in zip(answer, pieces, strict=False):
        hidden = 0 if piece else hidden + 1
        assert hidden <= LONGEST + 3, token


@every
def test_what_is_broken_costs_no_more_the_longer_it_gets(tokenizer):
    draw = random.Random(0)
    answer = [draw.randrange(128, 192) for _ in range(400)]  # bytes that begin no character
    pieces = pieces_of(tokenizer, [97], answer)
    assert "".join(pieces) == "\ufffd" * 400
    assert max(map(len, pieces)) <= LONGEST


@pytest.mark.parametrize("tokenizer", [*BYTES.values(), FALLBACK], ids=[*BYTES, "fallback"])
def test_a_character_may_begin_in_the_prompt(tokenizer):
    for char in "é漢😀":
        for cut in range(1, len(char.encode())):
            first, rest = list(char.encode()[:cut]), list(char.encode()[cut:])
            pieces = pieces_of(tokenizer, [97, *first], [*rest, 46])
            assert "".join(pieces) == char + "."


@settings(deadline=None)
@given(
    prompt=st.lists(PIECES, max_size=9).map(lambda parts: [*chain(*parts)]),
    answer=st.lists(PIECES, max_size=30).map(lambda parts: [*chain(*parts)]),
)
def test_spaces_and_bytes_of_sentencepiece(prompt, answer):
    whole, before = decode(FALLBACK, [*prompt, *answer]), decode(FALLBACK, prompt)
    pieces = pieces_of(FALLBACK, prompt, answer)
    assert "".join(pieces) == whole[len(before) :]
    assert not any("\ufffd" in piece for piece in pieces)


def test_broken_bytes_of_sentencepiece_lose_nothing_after_them():
    """There a broken byte makes the whole run of bytes unreadable, also what was shown before."""
    hello = 257 + WORDS.index("\u2581Hello")
    char, world = list("é".encode()), 257 + WORDS.index("\u2581world")
    pieces = pieces_of(FALLBACK, [hello], [*char, 255, world, world, 255])
    assert "".join(pieces) == "é\ufffd world world\ufffd"


@pytest.mark.parametrize("tokenizer", [*BYTES.values(), FALLBACK], ids=[*BYTES, "fallback"])
def test_special_tokens_have_no_text_and_fill_no_window(tokenizer):
    prompt = [*list(b"ab"), *[256] * 50]
    word = [257 + WORDS.index("\u2581world")] if tokenizer is FALLBACK else list(b" world")
    pieces = pieces_of(tokenizer, prompt, [*word, *[256] * 100, *word])
    assert "".join(pieces) == " world world"


def test_a_character_that_never_completes_is_shown_as_such_at_the_end():
    stream = TextStream(detokenizers(BYTES["byte level"])([]), ())
    assert stream.push("é".encode()[0]) == ("", None)
    assert stream.end() == "\ufffd"


@given(
    st.text(alphabet="abc", max_size=30),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string(text, stops):
    # By definition: the shortest beginning of the text that holds a stop string, up to there;
    # however the text comes.
    expected = text
    for end in range(len(text) + 1):
        found = [at for stop in stops if (at := text[:end].find(stop)) >= 0]
        if found:
            expected = text[: min(found)]
            break
    assert "".join(run(text, stops)) == expected
    found = StopStrings(stops)
    at_once, stop = found.push(text)
    assert at_once + ("" if stop else found.flush()) == expected


def test_nothing_that_may_become_a_stop_string_is_shown():
    stops = StopStrings(["END"])
    assert stops.push("the E") == ("the ", None)
    assert stops.push("N") == ("", None)
    assert stops.push("T") == ("ENT", None)
    assert stops.push("xEN") == ("x", None)
    assert stops.push("D and more") == ("", "END")


@pytest.mark.parametrize("length", [0, 1, 20])
def test_the_prompt_never_appears(length):
    stream = TextStream(detokenizers(BYTES["byte level"])(list(b"p" * length)), ())
    assert stream.push(ord("a")) == ("a", None)


@given(
    st.lists(st.text(alphabet="ab", min_size=1, max_size=3), max_size=12),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 12),
)
def test_a_stop_string_counts_if_it_ends_where_the_text_may_stop(chunks, stops, first):
    """vLLM: before `min_tokens` none is looked for, after that also one that began before."""
    found, shown, stop = StopStrings(stops), "", None
    for number, chunk in enumerate(chunks):
        piece, stop = found.push(chunk, may_stop=number >= first)
        shown += piece
        if stop:
            break
    shown += "" if stop else found.flush()
    text, barred = "".join(chunks), len("".join(chunks[:first]))
    ends = (
        (end, text[:end].rfind(each))
        for end in range(barred + 1, len(text) + 1)
        for each in stops
        if text[:end].endswith(each)
    )
    end, at = min(ends, default=(0, len(text)))
    assert shown == text[:at]
    assert (stop is not None) == (end > 0)


def test_a_stop_string_may_begin_before_the_text_may_stop():
    stream = TextStream(detokenizers(BYTES["byte level"])([]), ["END"])
    assert stream.push(ord("E"), may_stop=False) == ("", None)
    assert stream.push(ord("N"), may_stop=False) == ("", None)
    assert stream.push(ord("D")) == ("", "END")


class Counted(str):
    """A string that counts how often a character of it is looked at."""

    looks = 0

    def __getitem__(self, at):
        Counted.looks += 1
        return super().__getitem__(at)


def test_many_stop_strings_cost_what_the_text_begins_of_them():
    text = "the quick brown fox jumps over the lazy dog " * 50
    looks = {}
    for count in 4, 64:
        stops = StopStrings([Counted("!" * 900 + chr(0x4E00 + n) * 100) for n in range(count)])
        Counted.looks = 0
        assert stops.push(text) == (text, None)
        looks[count] = Counted.looks
    assert looks[64] == looks[4] == 0
    # and each of those that do begin costs a look or two at most at each character
    stops = StopStrings([Counted("a" * 1000 + chr(0x4E00 + n)) for n in range(64)])
    Counted.looks = 0
    for _ in range(3000):
        stops.push("a")
    assert Counted.looks < 4 * 3000 * 64
    assert "".join(stops.push("b")[0]).endswith("ab")
