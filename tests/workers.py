"""Workers for tests: a model that costs next to nothing to start, and deaths on demand.

Actors import this file, and with it neither a test nor transformers: what a restart costs then is
a process that imports Ray and torch.
"""

import dataclasses
import itertools
import os
import signal
import time
import zlib
from pathlib import Path

import numpy as np
import torch

from dlf_ray.messages import Description
from dlf_ray.models.worker import ModelWorker

VOCAB = 300
DOOM, CROWD = 298, 299
"""Tokens: at the first a process dies if it is told to, too many of the second find no memory."""


def light_model(folder: Path, vocab: int = VOCAB) -> Path:
    """A folder that `Light` takes for a model's: its name gives the weights."""
    folder.mkdir()
    (folder / "vocab").write_text(str(vocab))
    return folder


class Numbers:
    """A tokenizer of numbers, enough for prompts of token ids."""

    def __init__(self, vocab):
        self.vocab = vocab

    def get_vocab(self):
        return {str(i): i for i in range(self.vocab)}

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return "".join(f" {id}" for id in ids)


class Hashing:
    """A runner without a checkpoint: its logits are drawn with a hash of all tokens so far.

    So each depends on every token before it, and a state that is lost, stale or another sequence's
    shows in the answer, while no batch changes a digit. Experts are a little away from the base,
    as fine-tuned ones are.
    """

    def __init__(self, folder, vocab):
        self.vocab = vocab
        self.hashes = {}
        """For each slot, that of its tokens up to each of its positions."""
        self.seeds = [(3.0, zlib.crc32(b"large" if folder.name == "large" else b"base"))]
        if folder.name not in ("large", "base"):
            self.seeds.append((1.0, zlib.crc32(folder.name.encode())))

    def describe(self):
        return Description(
            vocab=self.vocab,
            tokenizer_digest=f"numbers below {self.vocab}",
            eos_token_ids=(0,),
            context=2**20,
            parameters=0,
            device="cpu",
            dtype="float32",
        )

    def forward(self, plan):
        before = self.hashes  # what is copied is as it was before this step
        kept = {slot: known for slot, known in before.items() if slot < plan.keep}
        self.hashes = {slot: known[: plan.keep_length] for slot, known in kept.items()}
        tokens = iter(plan.tokens.tolist())
        sources = plan.sources.tolist() or [-1] * len(plan.slots)
        chunks = zip(plan.slots, plan.starts, plan.lengths, plan.wants, sources, strict=True)
        rows = []
        for slot, start, length, wanted, source in chunks:
            known = before.get(int(slot) if source < 0 else source, [])
            assert start <= len(known), "a plan that goes on where nothing was computed"
            hashes = known[:start]
            for token in itertools.islice(tokens, int(length)):
                last = hashes[-1] if hashes else 0
                hashes.append(zlib.crc32(token.to_bytes(4, "little"), last))
            self.hashes[int(slot)] = hashes
            rows += map(self._logits, hashes[len(hashes) - wanted :])
        return torch.stack(rows) if rows else torch.empty(0, self.vocab)

    def _logits(self, seen):
        draw = torch.Generator()
        return sum(
            size * torch.randn(self.vocab, generator=draw.manual_seed(seen ^ seed))
            for size, seed in self.seeds
        )

    def forget(self):
        self.hashes = {}


def _vocab(folder):
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there")
    return int((folder / "vocab").read_text())


class Light(ModelWorker):
    """Serves a `Hashing`."""

    def load(self):
        torch.set_num_threads(1)
        folder = Path(self.spec.model)
        self.runner = Hashing(folder, _vocab(folder))
        return self.runner.describe()

    def tokenizer(self):
        return Numbers(_vocab(Path(self.spec.model)))


class _Mortal:
    """Its process leaves its number beside the model (.pid), and looks there for what to do.

    While there is a file .closed it does not load, while there is .held it does not go on from the
    position that stands there, and as often as .doom says it dies of a token.
    """

    def load(self):
        while self._told("closed") is not None:
            time.sleep(0.05)
        description = super().load()
        beside(self.spec, "pid").write_text(str(os.getpid()))
        return description

    def compute(self, plan):
        while (position := self._told("held")) and (plan.starts >= int(position)).any():
            time.sleep(0.01)
        if DOOM in plan.tokens and (lives := self._told("doom")):
            doom = beside(self.spec, "doom")
            doom.write_text(str(int(lives) - 1)) if int(lives) > 1 else doom.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if CROWD in plan.tokens and len(plan.slots) > 2 and "math" in self.spec.model:
            raise torch.OutOfMemoryError("no room")
        time.sleep(0.01)  # so that there is a middle of a generation
        return super().compute(plan)

    def _told(self, what):
        try:
            return beside(self.spec, what).read_text()
        except FileNotFoundError:
            return None


def beside(spec, what):
    """A file by which a test and a model's process tell each other something."""
    return Path(f"{spec.model}.{what}")


class Mortal(_Mortal, Light):
    """A light model that dies."""


class MortalModel(_Mortal, ModelWorker):
    """A real one that does."""


class Failing(ModelWorker):
    """A real one. Its process leaves its number beside the model (.pid), and fails once, in the
    midst of an answer, where a file .fault says how."""

    def load(self):
        beside(self.spec, "pid").write_text(str(os.getpid()))
        return super().load()

    def compute(self, plan):
        sign, fault = beside(self.spec, "fault"), None
        if plan.starts.max(initial=0) > 30 and sign.exists():
            fault = sign.read_text()
            sign.unlink()
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hangs":
            time.sleep(600)
        if fault == "out of memory":
            raise torch.OutOfMemoryError("no room")
        answer = super().compute(plan)
        if fault == "not finite":
            values = answer.values.clone()
            values[0] = torch.nan
            finite = np.arange(len(values)) > 0
            return dataclasses.replace(answer, values=values, finite=finite)
        return answer


class Unloadable(ModelWorker):
    def load(self):
        import a_module_that_is_not_there

        return a_module_that_is_not_there


class Breaks(Light):
    """Fails as a GPU does, where a file .break says so, until its process has ended; does not load
    again where there is a file .gone."""

    lost = False

    def load(self):
        beside(self.spec, "pid").write_text(str(os.getpid()))
        if beside(self.spec, "gone").exists():
            raise ValueError("the folder has been taken away")
        return super().load()

    def compute(self, plan):
        time.sleep(0.01)
        sign = beside(self.spec, "break")
        if sign.exists() and plan.starts.max() > 10:  # in the middle of an answer
            sign.unlink()
            self.lost = True
        if self.lost:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return super().compute(plan)


class Killed(Light):
    """As by Ray, or by the system, where the machine has not enough memory for the model."""

    def load(self):
        if "math" in self.spec.model:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load()


class Stalls(Light):
    """As a download that never ends."""

    def load(self):
        if "math" in self.spec.model:
            time.sleep(600)
        return super().load()


BREAKS_AT = 200


class Breaking(ModelWorker):
    """Takes its time, and fails where a sequence gets long."""

    def compute(self, plan):
        if "large" in self.spec.model:
            with open(f"{self.spec.model}.rows", "a") as log:
                log.write(f"{plan.rows} {len(plan.tokens)}\n")
            time.sleep(0.05)
            if plan.starts.max() >= BREAKS_AT:
                raise RuntimeError("broken at /a/secret/place")
        return super().compute(plan)


class Late(ModelWorker):
    """Takes its time to load."""

    def load(self):
        time.sleep(25)
        return super().load()


STEP_S = 0.02
"""What a token takes at least."""


class Slow(ModelWorker):
    """Slow enough to see an answer stream, and to press Stop."""

    def compute(self, plan):
        time.sleep(STEP_S)
        return super().compute(plan)
