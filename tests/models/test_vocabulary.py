"""Whether two tokenizers go together, and what a model is given of tokens that it does not know."""

import numpy as np
import pytest
import tiny
from runners import make_plan

from dlf_ray.models.vocabulary import (
    SAMPLE,
    differences,
    digest,
    known,
    refusal,
    split,
    stand_in,
    unlike,
)

ABC = {"x": 0, "y": 1, "z": 2}
NAMES = ("large", "math")


def test_equal_vocabularies_in_any_order():
    other = dict(reversed(ABC.items()))
    assert digest(ABC) == digest(other)
    assert differences(ABC, other, NAMES) == (1.0, "")
    assert unlike(ABC, other) == ()
    assert refusal(ABC, other, ((), ()), NAMES) is None


@pytest.mark.parametrize(
    ("other", "apart", "part", "words"),
    [
        ({"x": 0, "z": 1, "y": 2}, (1, 2), 1 / 3, "id 1 is 'y' in large and 'z' in math"),
        ({"x": 0, "y": 1}, (2,), 2 / 3, "id 2 is 'z' in large and nothing in math"),
        ({**ABC, "w": 3}, (), 3 / 4, "id 3 is nothing in large and 'w' in math"),
        ({**ABC, "w": 9}, (), 3 / 4, "id 9 is nothing in large and 'w' in math"),
    ],
    ids=["moved", "fewer", "more", "far"],
)
def test_differences(other, apart, part, words):
    assert unlike(ABC, other) == apart
    agree, told = differences(ABC, other, NAMES)
    assert agree == pytest.approx(part)
    assert words in told
    assert words in str(refusal(ABC, other, ((), ()), NAMES))


def test_one_in_a_hundred_may_differ():
    large = {f"t{id}": id for id in range(400)}
    other = {**large}
    for id in (7, 8, 9, 399):
        del other[f"t{id}"]
        other[f"new{id}"] = id
    assert refusal(large, other, ((), ()), NAMES) is None
    told = differences(large, other, NAMES)[1]
    assert "4 of 400 ids differ" in told
    assert told.endswith("; and 1 more")
    del other["t0"]
    assert "5 of 400 ids differ" in str(refusal(large, other, ((), ()), NAMES))


def test_texts_split_alike_but_for_their_start(tmp_path):
    fast = tiny.tokenizer(tmp_path)
    assert split(fast) == split(fast)
    assert len(split(fast)) > 100
    assert len(SAMPLE) < 800
    vocab = fast.get_vocab()
    other = (*split(fast)[:50], 7, *split(fast)[51:])
    told = str(refusal(vocab, vocab, (split(fast), other), NAMES))
    assert "split the same text in different ways" in told
    assert repr(fast.convert_ids_to_tokens(7)) in told
    assert refusal(vocab, vocab, (split(fast), ()), NAMES) is None


def test_unknown_tokens_are_stood_in_for(tmp_path):
    plan = make_plan((0, 0, [5, 300, 7, 299], 1))
    assert known(plan, 301, 0) is plan
    got = known(plan, 299, 4)
    assert got.tokens.tolist() == [5, 4, 7, 4]
    assert got.tokens.dtype == np.int32
    assert plan.tokens.tolist() == [5, 300, 7, 299]
    fast = tiny.tokenizer(tmp_path)
    assert stand_in(fast) == fast.eos_token_id
    fast.pad_token = "e"
    assert stand_in(fast) == fast.convert_tokens_to_ids("e")
