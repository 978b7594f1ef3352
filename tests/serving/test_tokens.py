"""What single tokens read, of every kind of tokenizer."""

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlf_ray.serving.tokens import BYTES, Reading, token_bytes

TEXT = "The moon é \U0001f600 日本, a train\nleaves."


def byte_fallback():
    """As Llama's first ones: words begin with a mark, and unknown characters are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", *"aehmonT,.", "oo", "\u2581m", "\u2581moo", "\u2581moon", "\u2581T"]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    merges = [("o", "o"), ("\u2581", "m"), ("\u2581m", "oo"), ("\u2581moo", "n"), ("\u2581", "T")]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    prepended = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    made.normalizer = normalizers.Sequence(prepended)
    spaces = decoders.Replace("\u2581", " ")
    made.decoder = decoders.Sequence(
        [spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def byte_level(tmp_path):
    return tiny.tokenizer(tmp_path)


@pytest.fixture(params=["bytes", "fallback"])
def tokenizer(request, tmp_path):
    return byte_fallback() if request.param == "fallback" else byte_level(tmp_path)


def test_bytes_together_are_the_texts(tokenizer):
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    bytes_of = token_bytes(tokenizer)
    assert b"".join(map(bytes_of, ids)).decode().removeprefix(" ") == TEXT
    reading = Reading(bytes_of)
    texts = [reading.take(token) for token in ids]
    assert "".join(texts).removeprefix(" ") == TEXT
    assert "" in texts
    assert not any("\ufffd" in text for text in texts)


def test_every_token_of_the_vocabulary_has_its_bytes(tokenizer):
    bytes_of = token_bytes(tokenizer)
    for written, token in tokenizer.get_vocab().items():
        found = bytes_of(token)
        if written.startswith("<0x"):
            assert found == bytes([int(written[3:5], 16)])
        elif written.startswith("<"):
            assert found.decode() == written
        elif tokenizer.bos_token:
            assert found.decode() == written.replace("\u2581", " ")
        else:
            assert found == bytes(BYTES[each] for each in written)


def test_what_never_becomes_a_character_is_shown_as_one_that_is_not(tokenizer):
    ids = tokenizer.encode("\U0001f600", add_special_tokens=False)
    (end,) = tokenizer.encode(",", add_special_tokens=False)[-1:]
    reading = Reading(token_bytes(tokenizer))
    assert "".join(map(reading.take, [*ids[:-1], end])).lstrip(" ") == "\ufffd,"


def test_the_alphabet_is_the_librarys():
    assert sorted(BYTES) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTES.values()) == list(range(256))
