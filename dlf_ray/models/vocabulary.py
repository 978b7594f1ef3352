"""Whether two tokenizers mean the same: fusion adds logits of one token to those of the same token.

Vocabularies of one family may differ in a few tokens, renamed or added by a fine-tune. Models are
fused on the ids that mean the same in all of them, and the large model speaks alone on the others.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import msgspec
import numpy as np

from dlf_ray.config import Family
from dlf_ray.messages import Description
from dlf_ray.plans import Plan

AGREE = 0.99
"""The least part of two vocabularies that has to be the same."""
FIRST = 3
"""How many differences are listed."""
SAMPLE = """\
It's 12:30, and they'll have paid $1,234.56 (or 3.14159e-10) by 2024-05-17 - "won't they?"
def f(x, *args):\n\tif x != 0:\n        return {"a": [x**2, x // 3]}  # later
HTTPServer, camelCase snake_case UPPER   three spaces;\r\n\nGrüße, naïve café; Москва;
北京市是首都。ありがとうございます；한국어 문장; שלום עולם; مرحبا; नमस्ते 🙂👩‍👩‍👧
½ ≠ ∑ ﬁ … http://example.org/?q=1&r=%20
"""
"""What tokenizers of different rules split in different ways."""
CONTEXT = 4
"""Tokens at the start that are not compared: there, some tokenizers put a space."""
ALONE = "on the others, the large model speaks alone"
log = logging.getLogger("dlf_ray")


def agree(
    family: Family,
    descriptions: Mapping[str, Description],
    tokenizer: Callable[[str], Any],
) -> dict[str, tuple[int, ...]]:
    """For each model whose vocabulary is not that of the first one: the ids of that which it gives
    another meaning, or none; there are none where it only has more tokens.

    Raises `ValueError`, naming two models and the first differences, where they do not go together.
    """
    first = next(iter(descriptions))
    about = descriptions[first]
    found: dict[str, tuple[int, ...]] = {}
    for name, each in descriptions.items():
        same = each.tokenizer_digest == about.tokenizer_digest
        splits = about.split, each.split
        if same and each.vocab >= about.vocab and (splits[0] == splits[1] or not all(splits)):
            continue
        names = family.title(first), family.title(name)
        ours, theirs = (tokenizer(each).get_vocab() for each in (first, name))
        if why := refusal(ours, theirs, splits, names):
            raise ValueError(why)
        apart = {*unlike(ours, theirs), *range(each.vocab, about.vocab)}
        found[name] = tuple(sorted(id for id in apart if id < about.vocab))
        fewer = f"{names[1]} has logits for the first {each.vocab} of {about.vocab} ids; {ALONE}"
        log.warning("%s", surprise(ours, theirs, names) or fewer)
    return found


def digest(vocab: Mapping[str, int]) -> str:
    """Equal for vocabularies that give the same tokens the same ids."""
    pairs = sorted((i, token) for token, i in vocab.items())
    return hashlib.sha256(msgspec.json.encode(pairs)).hexdigest()[:16]


def split(tokenizer: Any) -> tuple[int, ...]:
    """How a tokenizer splits the sample, but for its start."""
    return tuple(tokenizer.encode(SAMPLE, add_special_tokens=False))[CONTEXT:]


def unlike(large: Mapping[str, int], other: Mapping[str, int]) -> tuple[int, ...]:
    """The ids of the large model's vocabulary that are of another token, or of none, in another
    one's."""
    theirs = {id: token for token, id in other.items()}
    return tuple(sorted(id for token, id in large.items() if theirs.get(id) != token))


def differences(
    large: Mapping[str, int], other: Mapping[str, int], names: tuple[str, str]
) -> tuple[float, str]:
    """The part of two vocabularies that is the same, and a sentence on what is not; it is empty if
    all is."""
    mine, theirs = ({id: token for token, id in each.items()} for each in (large, other))
    ids = sorted(id for id in mine.keys() | theirs.keys() if mine.get(id) != theirs.get(id))
    size = max(len(mine), len(theirs))
    if not ids:
        return 1.0, ""
    listed = [
        f"id {id} is {_named(mine, id)} in {names[0]} and {_named(theirs, id)} in {names[1]}"
        for id in ids[:FIRST]
    ]
    more = f"; and {len(ids) - FIRST} more" if len(ids) > FIRST else ""
    agree = (len(mine.keys() | theirs.keys()) - len(ids)) / size
    return agree, f"{len(ids)} of {size} ids differ: {'; '.join(listed)}{more}"


def _named(tokens: Mapping[int, str], id: int) -> str:
    return repr(tokens[id]) if id in tokens else "nothing"


def surprise(
    large: Mapping[str, int], other: Mapping[str, int], names: tuple[str, str]
) -> str | None:
    """What is worth to be told of two models that go together; None where all ids are the same."""
    told = differences(large, other, names)[1]
    return f"{told}; {ALONE}" if told else None


def refusal(
    large: Mapping[str, int],
    other: Mapping[str, int],
    splits: tuple[Sequence[int], Sequence[int]],
    names: tuple[str, str],
) -> str | None:
    """Why two models cannot be fused: a sentence, or None where their tokenizers go together.

    `splits`: how each splits the sample; empty where that is not known.
    """
    agree, told = differences(large, other, names)
    if agree < AGREE:
        return (
            f"{names[0]} ({len(large)} tokens) and {names[1]} ({len(other)} tokens) do not share a "
            f"vocabulary: {told}; use models of one family"
        )
    if all(splits) and splits[0] != splits[1]:
        one, two = (
            [_named({id: token for token, id in vocab.items()}, id) for id in ids]
            for vocab, ids in zip((large, other), splits, strict=True)
        )
        at = next(n for n, (a, b) in enumerate(zip_longest(one, two)) if a != b)
        parts = [" ".join(each[at : at + 3]) for each in (one, two)]
        return (
            f"{names[0]} and {names[1]} split the same text in different ways, into {parts[0]} and "
            f"into {parts[1]}: use models of one family, or set `tokenizer:`"
        )
    return None


def stand_in(tokenizer: Any) -> int:
    """The token that a model is given instead of those that it does not know."""
    named = ("unk_token_id", "pad_token_id", "eos_token_id")
    found = (getattr(tokenizer, name, None) for name in named)
    return next((int(id) for id in found if id is not None), 0)


def known(plan: Plan, vocab: int, instead: int) -> Plan:
    """A plan of tokens below `vocab` only: `instead` stands for others, which the large model has
    and this one does not."""
    strange = plan.tokens >= vocab
    if not strange.any():
        return plan
    tokens = np.where(strange, instead, plan.tokens).astype(plan.tokens.dtype)
    return replace(plan, tokens=tokens)
