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
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from dlf_ray.config import BASE, LARGE
from dlf_ray.training import corpus, train
from dlf_ray.training.corpus import END, TASKS, documents, items


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
    files = (__file__, corpus.__file__, train.__file__)
    code = b"".join(Path(str(file)).read_bytes() for file in files)
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
