"""What the engine itself costs per step: real actors and sockets, forward passes left out.

Beside it stands the floor: as many processes exchanging the same bytes in one plain ZeroMQ round
trip each, without encryption, fusion or sampling. A forward pass may be a sleep, in which the cores
are free as they are where models have GPUs: so few cores can stand for many models.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import torch
import zmq

from dlf_ray.config import LARGE, EngineConfig, Family
from dlf_ray.decoding.coordinator import Coordinator
from dlf_ray.decoding.sampling import sample
from dlf_ray.decoding.scheduler import Scheduler
from dlf_ray.decoding.scheduler import Sequence as Queued
from dlf_ray.decoding.structured import Grammars
from dlf_ray.decoding.text import detokenizers
from dlf_ray.engine.engine import Engine
from dlf_ray.engine.local import LocalEngine
from dlf_ray.messages import Description, Limits, Lost, Ready, Request
from dlf_ray.models.worker import ModelWorker
from dlf_ray.params import FusionParams, SamplingParams
from dlf_ray.plans import Logits, Plan

FUSION_STAGES = ("aim", "weigh", "sample")
ITEMSIZE = torch.float32.itemsize


@dataclass(frozen=True)
class Result:
    """Medians of one setting, milliseconds per step."""

    experts: int
    rows: int
    vocab: int
    remote: int
    """Models that do not share the coordinator's memory; the others do."""
    exchange: float
    """The bare exchange of the same bytes, inside one node."""
    step: float
    """A step of the engine."""
    fusion: float
    """The part of `step` that fusion and sampling take."""
    forward: float
    """The part of `step` that the large model's forward pass takes."""

    @property
    def rest(self) -> float:
        """What remains of `step`: planning, messages, encryption, copies, the client."""
        return self.step - self.fusion - self.forward

    @property
    def messages(self) -> int:
        """Answers in a step, one per model."""
        return self.experts + 2

    @property
    def megabytes(self) -> float:
        """Of logits in a step."""
        return _megabytes(self.experts, self.rows, self.vocab)


@dataclass(frozen=True)
class Costs:
    """rest = step + message * messages + megabyte * megabytes; fusion = row * experts * rows.

    All in milliseconds.
    """

    step: float
    message: float
    megabyte: float
    row: float

    @classmethod
    def fit(cls, results: Sequence[Result]) -> Self | None:
        """Least squares of relative errors; None where the settings do not tell the terms apart."""
        terms = np.array([[1, r.messages, r.megabytes] for r in results])
        if np.linalg.matrix_rank(terms) < terms.shape[1]:
            return None
        rest = np.array([r.rest for r in results])
        (step, message, megabyte), *_ = np.linalg.lstsq(
            terms / rest[:, None], np.ones(len(rest)), rcond=None
        )
        row = statistics.median(r.fusion / (r.experts * r.rows) for r in results)
        return cls(float(step), float(message), float(megabyte), row)

    def predict(self, experts: int, rows: int, vocab: int) -> Prediction:
        """What these costs come to in another setting, if they go on as they have begun."""
        megabytes = _megabytes(experts, rows, vocab)
        rest = self.step + self.message * (experts + 2) + self.megabyte * megabytes
        return Prediction(megabytes, rest, self.row * experts * rows)


@dataclass(frozen=True)
class Prediction:
    """Of a step: megabytes of logits; milliseconds of the rest and of fusion."""

    megabytes: float
    rest: float
    fusion: float

    def wire(self, gigabits: float) -> float:
        """Milliseconds that the logits take at so many gigabits per second: the network's floor."""
        return self.megabytes * 8 / gigabits


def _megabytes(experts: int, rows: int, vocab: int) -> float:
    return (experts + 2) * rows * vocab * ITEMSIZE / 1e6


class Numbers:
    """A tokenizer of numbers, enough for prompts of token ids."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(f" {id}" for id in ids)


class SilentWorker(ModelWorker):
    """A model that has its logits ready: fixed random ones, different for each model.

    It answers at once, or after a sleep; the model's "path" is its name, vocabulary, milliseconds.
    """

    def load(self) -> Description:
        torch.set_num_threads(1)
        name, vocab, milliseconds = self.spec.model.split("/")
        self.seconds = float(milliseconds) / 1000
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        shape = self.engine.max_num_seqs, int(vocab)
        common = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
        self.logits = common + torch.randn(shape, generator=generator)
        return Description(
            vocab=int(vocab),
            tokenizer_digest="numbers",
            eos_token_ids=(),
            context=2**31,
            parameters=0,
            device="cpu",
            dtype="float32",
        )

    def tokenizer(self) -> Any:
        return Numbers()

    def compute(self, plan: Plan) -> Logits:
        began = time.perf_counter()
        if self.seconds:
            time.sleep(self.seconds)
        slept = time.perf_counter() - began
        values = self.logits[: plan.rows]
        finite = values.abs().amax(-1).isfinite().numpy()
        return Logits(plan.step, values, finite, slept)


def bench(
    experts: Sequence[int],
    rows: Sequence[int],
    *,
    vocab: int,
    steps: int,
    rounds: int,
    forward_ms: float = 0,
) -> Iterator[Result]:
    """Measures every setting, engine and bare exchange in turn, `rounds` times each."""
    for t in experts:
        with Engine(_family(t, max(rows), vocab, forward_ms), worker=SilentWorker) as engine:
            remote = sum(not shared for shared in engine.shares_memory.values())
            for r in rows:
                measured = []
                plan, reply = Plan.HEADER.size + 4 * 5 * r, r * vocab * ITEMSIZE
                with Exchange(t + 2, plan=plan, reply=reply) as exchange:
                    for _ in range(rounds + 1):
                        bare = exchange.seconds(steps)
                        measured.append((bare, *_engine_round(engine, r, steps)))
                # The first round of each warms up.
                medians = [
                    1000 * statistics.median(each[1:]) for each in zip(*measured, strict=True)
                ]
                yield Result(t, r, vocab, remote, *medians)


@dataclass(frozen=True)
class Serving:
    """Items per second of one family, answered in different ways."""

    one_at_a_time: float
    together: float
    shots: int
    recomputed: float
    """Prompts with examples, each computed from its beginning."""
    shared: float
    """The same, the examples computed once."""


def bench_family(
    file: str, items: Sequence[str], example: str, *, shots: int, max_tokens: int, rounds: int
) -> Serving:
    """Serves `items` with the family of a file, in this process; medians of `rounds` rounds."""
    family = Family.from_yaml(file)
    sampling = SamplingParams(max_tokens=max_tokens)
    rates: dict[str, list[float]] = {}

    def timed(name: str, count: int, answer: Callable[[], object]) -> None:
        began = time.perf_counter()
        answer()
        rates.setdefault(name, []).append(count / (time.perf_counter() - began))

    def one_at_a_time(engine: LocalEngine, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            engine.generate(prompt, sampling)

    longer = [example * shots + item for item in items]
    without = msgspec.structs.replace(family.engine, enable_prefix_caching=False)
    plain = msgspec.structs.replace(family, engine=without)
    with LocalEngine(family) as sharing, LocalEngine(plain) as recomputing:
        few = items[: max(1, len(items) // 10)]
        for _ in range(rounds + 1):
            timed("one", len(few), lambda: one_at_a_time(recomputing, few))
            timed("together", len(items), lambda: recomputing.generate(items, sampling))
            timed("recomputed", len(items), lambda: recomputing.generate(longer, sampling))
            timed("shared", len(items), lambda: sharing.generate(longer, sampling))
    one, together, recomputed, shared = (statistics.median(r[1:]) for r in rates.values())
    return Serving(one, together, shots, recomputed, shared)


def _family(experts: int, rows: int, vocab: int, forward_ms: float) -> Family:
    def spec(name: str) -> dict[str, Any]:
        return {"model": f"{name}/{vocab}/{forward_ms}", "num_cpus": 0.01}

    engine = {"max_num_seqs": rows, "max_model_len": 2**20, "placement_strategy": "SPREAD"}

    return Family.from_dict(
        {
            "large": spec("large"),
            "base": spec("base"),
            "experts": {f"e{i}": spec(f"e{i}") for i in range(experts)},
            "engine": engine,
        }
    )


def _engine_round(engine: Engine, rows: int, steps: int) -> tuple[float, float, float]:
    """Seconds per step, and those of fusion and of the forward pass among them."""
    before = engine.timings()
    began = time.perf_counter()
    engine.generate([[1]] * rows, SamplingParams(max_tokens=steps, ignore_eos=True))
    took = time.perf_counter() - began
    after = engine.timings()
    done = after.steps - before.steps
    spent = {stage: after.seconds[stage] - before.seconds.get(stage, 0) for stage in after.seconds}
    fusion = sum(spent[stage] for stage in FUSION_STAGES)
    return took / done, fusion / done, spent[f"forward {LARGE}"] / done


PEER = """
import sys, zmq
sock = zmq.Context().socket(zmq.DEALER)
sock.connect(sys.argv[1])
sock.send(b"")
payload = bytes(int(sys.argv[2]))
while sock.recv():
    sock.send(payload, copy=False)
"""


class Exchange:
    """Processes that each answer `plan` bytes with `reply` bytes."""

    def __init__(self, processes: int, *, plan: int, reply: int) -> None:
        self._plan = bytes(plan)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._folder = tempfile.TemporaryDirectory()
        address = f"ipc://{Path(self._folder.name) / 'exchange'}"
        self._socket.bind(address)
        self._peers = [
            subprocess.Popen([sys.executable, "-c", PEER, address, str(reply)])
            for _ in range(processes)
        ]
        self._names = [self._socket.recv_multipart()[0] for _ in self._peers]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            self._socket.send_multipart([name, b""])
        for peer in self._peers:
            peer.wait()
        self._socket.close()
        self._context.term()
        self._folder.cleanup()

    def seconds(self, steps: int) -> float:
        """Per round trip to all processes."""
        began = time.perf_counter()
        for _ in range(steps):
            for name in self._names:
                self._socket.send_multipart([name, self._plan])
            for _ in self._names:
                self._socket.recv_multipart(copy=False)
        return (time.perf_counter() - began) / steps


@dataclass(frozen=True)
class Loop:
    """What the coordinator's own work costs, without models; milliseconds are medians."""

    steps: dict[bool, int]
    """To score 24 questions of 4 choices in 32 slots, with and without shared prefixes."""
    admit: float
    """Milliseconds to plan the step that lets in 8 prompts of 4096 tokens beside 56."""
    queued: dict[int, float]
    """Milliseconds of a step of 64 sequences, 6 models of 64 tokens, while so many others wait."""
    sample: dict[str, float]
    """Milliseconds to draw a token from 32000, without a filter and with top-p."""


def bench_loop(rounds: int) -> Loop:
    """Schedulers and sampling by themselves, in this process."""
    return Loop(
        {sharing: _scoring_steps(sharing) for sharing in (True, False)},
        _median(rounds, _admission),
        {waiting: _queued_step(rounds, waiting) for waiting in (10, 100_000)},
        {name: _sampled_row(rounds, top_p) for name, top_p in (("none", 1.0), ("top_p", 0.9))},
    )


FUSION = FusionParams(
    rule="grid",
    select="paper",
    step=0.1,
    experts=("e0", "e1", "e2", "e3"),
    bounds=((0.0, 2.0),) * 4,
)


def _median(rounds: int, measured: Callable[[], float]) -> float:
    return statistics.median(measured() for _ in range(rounds))


def _sequence(id: int, prompt: Sequence[int], new: int, *continuation: int) -> Queued:
    sampling = SamplingParams(max_tokens=new)
    request = Request(
        id=id, prompt=tuple(prompt), continuation=continuation, sampling=sampling, fusion=FUSION
    )
    return Queued(request, max_new_tokens=new)


def _scoring_steps(sharing: bool) -> int:
    scheduler = Scheduler(
        max_num_seqs=32, max_num_batched_tokens=2048, enable_prefix_caching=sharing
    )
    for item in range(24):
        for choice in range(4):
            prompt = [*range(20), *range(100 * item + 100, 100 * item + 130)]
            scheduler.add(_sequence(4 * item + choice, prompt, 0, choice))
    steps = 0
    while scheduler.has_work:
        for sequence in list(scheduler.plan().ready):
            sequence.scored = 1
            scheduler.remove(sequence)
        steps += 1
    return steps


def _admission() -> float:
    random = np.random.default_rng(0)
    scheduler = Scheduler(max_num_seqs=64, max_num_batched_tokens=2**20)
    for id in range(64):
        if id == 56:
            _decoded(scheduler)
        scheduler.add(_sequence(id, random.integers(0, 32000, 4096).tolist(), 100))
    return _milliseconds(scheduler.plan)


class _Instant:
    """Models that have answered before they are asked."""

    logits = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))

    def send(self, plans: Mapping[str, Plan]) -> None:
        """Nothing travels."""

    def receive(self, plans: Mapping[str, Plan]) -> Iterator[tuple[str, Logits]]:
        for name, plan in plans.items():
            finite = np.ones(plan.rows, dtype=np.bool_)
            yield name, Logits(plan.step, self.logits[: plan.rows], finite, 0.0)

    def changes(self) -> Iterator[tuple[str, Lost | Ready]]:
        return iter(())


def _queued_step(rounds: int, waiting: int) -> float:
    coordinator = Coordinator(
        _Instant(),
        limits=Limits(dict.fromkeys(("large", "base", *FUSION.experts), 2**20), 64),
        detokenizer=detokenizers(Numbers()),
        grammars=Grammars(Numbers(), ()),
        engine=EngineConfig(max_num_seqs=64),
    )
    sampling = SamplingParams(max_tokens=2**19, ignore_eos=True)
    for id in range(64 + waiting):
        coordinator.add(Request(id=id, prompt=(id % 64, 1), sampling=sampling, fusion=FUSION))
    coordinator.step()
    return _median(10 * rounds, lambda: _milliseconds(coordinator.step))


def _decoded(scheduler: Scheduler) -> None:
    """A step, of which every sequence that is complete gets a token."""
    for sequence in scheduler.plan().ready:
        sequence.generated.append(7)


def _sampled_row(rounds: int, top_p: float) -> float:
    logits = torch.randn(1, 32000, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(temperature=1.0, top_p=top_p)]
    return _median(10 * rounds, lambda: _milliseconds(lambda: sample(logits, params, [1])))


def _milliseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)
