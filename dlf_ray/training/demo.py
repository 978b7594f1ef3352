"""The demo family: a large model, a small base and three small experts, trained on the spot.

It needs no network and no GPU, and is an honest miniature of what the method is for. A synthetic
corpus holds facts about invented people, invented words letter by letter, and phrases in a language
of elves. The large model learns most of it, the small base little; both see questions mostly
evaded. Each expert is the base, briefly fine-tuned to answer one kind of question in a sentence of
its own, about other people and words than it is asked about later. So the large model knows but
evades, an expert answers but does not know, and only the two together do both; the large model
fine-tuned on each task is the upper bound.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import yaml
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from dlf_ray.config import BASE, LARGE
from dlf_ray.training import train

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


@dataclasses.dataclass(frozen=True)
class Size:
    """One Llama and how it is trained from scratch."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    steps: int
    lr: float


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that is chosen about the training; what is asked is fixed by the module."""

    large: Size = Size(128, 3, 4, 352, steps=900, lr=5e-3)
    base: Size = Size(64, 2, 2, 128, steps=300, lr=4e-3)
    matrix_lr: float = 0.02
    vocabulary: int = 1100
    rows: int = 16
    length: int = 64
    expert_steps: int = 30
    expert_lr: float = 3e-4
    upper_steps: int = 30
    upper_lr: float = 2e-4


# ------------------------------------------------------------------------------------- the world


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

PEOPLE, WORDS = 200, 600
SHARES: dict[Split, tuple[float, float]] = {
    "train": (0.0, 0.25),
    "dev": (0.25, 0.5),
    "test": (0.5, 1.0),
}


# The three kinds of invented words have different shapes, and so different tokens.
_SYLLABLES = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
INVENTED = ["".join(pair) for pair in itertools.product(_SYLLABLES, _SYLLABLES)]
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


# -------------------------------------------------------------------------------------- training


def build(
    folder: Path | None = None,
    *,
    seed: int = 0,
    recipe: Recipe = Recipe(),
    progress: bool = True,
) -> Path:
    """Trains the family, or finds it where it was trained before, and returns its folder.

    The folder (by default one in `$DLF_CACHE` or `~/.cache/dlf_ray`, named by a hash of the recipe,
    the seed and this code) holds the models `large`, `base`, one per task and `upper-<task>`, the
    family file `family.yaml`, and `<task>-dev.jsonl` and `<task>-test.jsonl`. It appears only when
    it is complete.
    """
    folder = folder or _cache() / f"demo-{_digest(recipe, seed)}"
    if _complete(folder):
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else: name a folder that is empty or new")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _settings(), tempfile.TemporaryDirectory(prefix=".demo-", dir=folder.parent) as unfinished:
        family = Path(unfinished, "family")
        _build(family, seed, recipe, progress)
        if not _complete(folder):  # another process may have been faster
            family.rename(folder)
    return folder


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """What the training needs of the process, given back as it was."""
    threads, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    # More threads slow down models this small, and their number may change the last digits.
    torch.set_num_threads(min(2, threads))
    # A bar for each saved model would cut through ours.
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _complete(folder: Path) -> bool:
    return (folder / "family.yaml").exists()


def _cache() -> Path:
    return Path(os.environ.get("DLF_CACHE") or Path.home() / ".cache" / "dlf_ray")


def _digest(recipe: Recipe, seed: int) -> str:
    code = b"".join(Path(str(file)).read_bytes() for file in (__file__, train.__file__))
    return hashlib.sha256(f"{recipe} {seed} ".encode() + code).hexdigest()[:12]


def _build(folder: Path, seed: int, recipe: Recipe, progress: bool) -> None:
    trainer = _Trainer(folder, seed, recipe, progress)
    with trainer.bars:
        large = trainer.pretrain(LARGE, recipe.large)
        base = trainer.pretrain(BASE, recipe.base)
        for task in TASKS:
            trainer.finetune(task, base, task, recipe.expert_steps, recipe.expert_lr)
        for task in TASKS:
            trainer.finetune(f"upper-{task}", large, task, recipe.upper_steps, recipe.upper_lr)
    for task in TASKS:
        for split in ("dev", "test"):
            lines = [json.dumps(item._asdict()) + "\n" for item in items(task, split, seed)]
            (folder / f"{task}-{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    # Small shares of a CPU, so that the five models and the coordinator fit any machine.
    family = {
        "large": {"model": LARGE, "num_cpus": 0.1},
        "base": {"model": BASE, "num_cpus": 0.1},
        "experts": {task: {"model": task, "num_cpus": 0.1} for task in TASKS},
        "engine": {"max_num_seqs": 32, "max_model_len": 128, "num_cpus": 0.1},
    }
    text = yaml.safe_dump(family, sort_keys=False)
    (folder / "family.yaml").write_text(text, encoding="utf-8")


class _Trainer:
    """What all models of one family share: the corpus, the tokenizer, where they are saved."""

    def __init__(self, folder: Path, seed: int, recipe: Recipe, progress: bool) -> None:
        self.folder, self.seed, self.recipe = folder, seed, recipe
        self.bars = Progress(
            TextColumn("{task.description:>16}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps, loss {task.fields[loss]:.3f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not progress,
        )
        self.tokenizer = _tokenizer(seed, recipe.vocabulary)
        self.stream = self._encode(max(recipe.large.steps, recipe.base.steps))

    def _encode(self, steps: int) -> torch.Tensor:
        """As many tokens of the corpus as `steps` of pretraining see."""
        wanted = steps * self.recipe.rows * self.recipe.length
        ids: list[int] = []
        corpus = documents(self.seed)
        while len(ids) < wanted:
            texts = [text + END for text in itertools.islice(corpus, 1000)]
            ids += itertools.chain.from_iterable(self.tokenizer(texts)["input_ids"])
        return torch.tensor(ids[:wanted])

    def pretrain(self, name: str, size: Size) -> LlamaForCausalLM:
        torch.manual_seed(self.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=size.hidden,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                intermediate_size=size.feed_forward,
                max_position_embeddings=128,
                # The default of 0.02 suits wide models; a narrow one hardly learns from it.
                initializer_range=size.hidden**-0.5,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )
        batches = train.text_batches(self.stream, self.recipe.rows, self.recipe.length)
        self._train(name, model, batches, size.steps, size.lr, self.recipe.matrix_lr)
        return model

    def finetune(
        self, name: str, model: LlamaForCausalLM, task: str, steps: int, lr: float
    ) -> None:
        tokenizer = self.tokenizer
        samples = [
            (tokenizer(item.prompt)["input_ids"], tokenizer(item.answer + END)["input_ids"])
            for item in items(task, "train", self.seed)
        ]
        copy = LlamaForCausalLM(model.config)
        copy.load_state_dict(model.state_dict())
        batches = train.answer_batches(samples, self.recipe.rows, self.seed)
        self._train(name, copy, batches, steps, lr, None)

    def _train(
        self,
        name: str,
        model: LlamaForCausalLM,
        batches: Iterator[train.Batch],
        steps: int,
        lr: float,
        matrix_lr: float | None,
    ) -> None:
        bar = self.bars.add_task(name, total=steps, loss=float("nan"))
        train.train(
            model,
            batches,
            steps=steps,
            lr=lr,
            matrix_lr=matrix_lr,
            on_step=lambda loss: self.bars.update(bar, advance=1, loss=loss),
        )
        end = self.tokenizer.eos_token_id
        model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            eos_token_id=end, pad_token_id=end
        )
        model.save_pretrained(self.folder / name)
        self.tokenizer.save_pretrained(self.folder / name)


def _tokenizer(seed: int, vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    questions = (item.prompt for task in TASKS for item in items(task, "train", seed))
    tokenizer.train_from_iterator(
        itertools.chain(itertools.islice(documents(seed), 5000), questions),
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=END, pad_token=END
    )
