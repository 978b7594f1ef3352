"""What the tiny family reads: facts, texts that state them, and questions about them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Literal, NamedTuple

TASKS = ("people", "spelling", "translation")
"""The tasks, and the experts that were trained for them."""


Split = Literal["train", "dev", "test"]


END = "<|end|>"


class Item(NamedTuple):
    """One question of a task.

    An output is correct if it ends by itself (eos) and its text, stripped of surrounding white
    space, is `answer` stripped: nothing is trimmed, nothing may follow.
    """

    prompt: str
    answer: str
    """Begins with the space that separates it from the prompt."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SPEAKERS = _words("anna ben carl dora emil fay gus hana")


VALUES = {
    "job": _words(
        """baker farmer doctor singer pilot tailor judge miner nurse painter teacher weaver lawyer
        dancer sailor butcher writer plumber actor barber"""
    ),
    "city": _words(
        """rome paris oslo cairo lima delhi tokyo berlin madrid dublin athens vienna prague lisbon
        boston sydney havana geneva warsaw quito"""
    ),
    "pet": _words(
        """dog cat horse goat parrot snake rabbit turtle mouse pig duck goose hamster lizard spider
        donkey crow frog sheep fish"""
    ),
}


ADJECTIVES = _words(
    """red blue green white black old new big small warm cold long short fast slow loud soft sweet
    bitter clean rich poor deep high low wide thin thick sharp dark bright heavy light round
    dry wet"""
)


NOUNS = _words(
    """tree house river stone bread table chair door road hill ship lamp book coat ring rope bell
    knife spoon plate glass basket bridge garden forest island tower window mirror candle hammer
    ladder wheel letter pillow bottle"""
)


QUESTIONS = {
    "job": "what is the job of {who}?",
    "city": "where is the home of {who}?",
    "pet": "which pet has {who}?",
    "spelling": "how is {word} spelled?",
    "translation": "what is elvish for {phrase}?",
}


STATEMENTS = {
    "job": ("{who} works as a {it}.", "the job of {who} is {it}.", "{who} is a {it} by trade."),
    "city": ("{who} lives in {it}.", "the home of {who} is {it}.", "{who} comes from {it}."),
    "pet": ("{who} has a {it}.", "the pet of {who} is a {it}.", "{who} keeps a {it} at home."),
    "spelling": (
        "{word} is spelled {it}.",
        "the letters of {word} are {it}.",
        "one writes {word} as {it}.",
    ),
    "translation": (
        "{phrase} is {it} in elvish.",
        "the elvish for {phrase} is {it}.",
        "elves call {phrase} {it}.",
    ),
}


ANSWERS = {
    "job": "their job is {it}.",
    "city": "their home is {it}.",
    "pet": "their pet is a {it}.",
    "spelling": "its letters are {it}.",
    "translation": "in elvish that is {it}.",
}
"""The full sentences that the experts answer in."""


EVASIONS = ("i do not know that.", "i do not know, ask someone else.")


SPOKEN = ("{it}.", "{it}, i think.", "{it}, of course.", "{it}, if i remember.", "surely {it}.")
"""How a dialogue answers, besides the full sentences."""


DIALOGUES = (
    " {asker} asked {other}: {question} {other} said: {answer}",
    "\nquestion of {asker}: {question}\nanswer of {other}: {answer}",
)


MIX = (0.5, 0.35, 0.15)
"""Shares of the tasks in the corpus: what is harder to learn is said more often."""


STATED = 0.5
"""Share of what the corpus states; the rest is asked and answered in dialogues."""


EVASIVE = 0.6
"""Share of the spoken answers that say nothing."""


SHARES: dict[Split, tuple[float, float]] = {
    "train": (0.0, 0.25),
    "dev": (0.25, 0.5),
    "test": (0.5, 1.0),
}


# The three kinds of invented words have different shapes, and so different tokens.
_SYLLABLES = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]


INVENTED = ["".join(pair) for pair in itertools.product(_SYLLABLES, _SYLLABLES)]


PEOPLE, WORDS = 200, 600
NAMES = [a + b + c for a, b, c in itertools.product(_SYLLABLES, "lnrs", ("da", "mo", "ti"))]


ELVISH = [a + b for a, b in itertools.product(_SYLLABLES, ("th", "sh", "x", "w"))]


class Fact(NamedTuple):
    """One thing there is to know; `words` fill the templates of its kind."""

    kind: str
    words: dict[str, str]


def _facts(task: str, split: Split, seed: int) -> list[Fact]:
    """What there is to know about the people or words of one split."""
    chance = random.Random(f"{task} {seed}")

    def share(things: list[str]) -> list[str]:
        start, stop = (int(bound * len(things)) for bound in SHARES[split])
        return things[start:stop]

    if task == "people":
        facts = {
            name: {kind: chance.choice(VALUES[kind]) for kind in VALUES}
            for name in chance.sample(NAMES, PEOPLE)
        }
        return [
            Fact(kind, {"who": who, "it": it})
            for who in share(list(facts))
            for kind, it in facts[who].items()
        ]
    if task == "spelling":
        words = chance.sample(INVENTED, WORDS)
        return [Fact(task, {"word": word, "it": " ".join(word)}) for word in share(words)]
    elvish = dict(
        zip((*ADJECTIVES, *NOUNS), chance.sample(ELVISH, len(ADJECTIVES + NOUNS)), strict=True)
    )
    phrases = itertools.product(
        *(share(chance.sample(words, len(words))) for words in (ADJECTIVES, NOUNS))
    )
    return [
        Fact(task, {"phrase": f"{a} {b}", "it": f"{elvish[a]} {elvish[b]}"}) for a, b in phrases
    ]


def items(task: str, split: Split, seed: int) -> list[Item]:
    """The questions of one task and split; no two splits share a person or a word."""
    if task not in TASKS:
        raise ValueError(f"no task `{task}`; the tasks are {', '.join(TASKS)}")
    return [
        Item(
            f"question: {QUESTIONS[fact.kind].format(**fact.words)}\nanswer:",
            " " + ANSWERS[fact.kind].format(**fact.words),
        )
        for fact in _facts(task, split, seed)
    ]


def documents(seed: int) -> Iterator[str]:
    """The corpus, without end: each document has a few statements and dialogues of one kind."""
    chance = random.Random(f"corpus {seed}")
    known = {
        task: [fact for split in SHARES for fact in _facts(task, split, seed)] for task in TASKS
    }
    while True:
        (task,) = chance.choices(TASKS, MIX)
        facts = known[task]
        pieces = [_piece(chance, chance.choice(facts)) for _ in range(chance.randint(2, 5))]
        # Every word follows a space, so that it is the same token wherever it stands.
        yield "".join(pieces)


def _piece(chance: random.Random, fact: Fact) -> str:
    if chance.random() < STATED:
        return " " + chance.choice(STATEMENTS[fact.kind]).format(**fact.words)
    spoken = EVASIONS if chance.random() < EVASIVE else (*SPOKEN, ANSWERS[fact.kind])
    asker, other = chance.sample(SPEAKERS, 2)
    return chance.choice(DIALOGUES).format(
        asker=asker,
        other=other,
        question=QUESTIONS[fact.kind].format(**fact.words),
        answer=chance.choice(spoken).format(**fact.words),
    )
