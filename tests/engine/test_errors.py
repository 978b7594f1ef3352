"""What is done about errors of a device: memory is given back, a broken process ends."""

import types

import numpy as np
import pytest
import torch
from conftest import family_of

from dlf_ray.engine import actors
from dlf_ray.errors import is_out_of_memory, sticks
from dlf_ray.messages import Failed, Limits
from dlf_ray.models.worker import ModelWorker
from dlf_ray.plans import Plan

MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("NCCL Error 1: unhandled cuda error, Cuda failure 2 'out of memory'"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
]
STICKY = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    torch.AcceleratorError("the GPU has fallen off the bus"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("NCCL error: unhandled cuda error"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
]
NEITHER = [
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    ValueError("slots [9] are not all within 0..3"),
    IndexError("CUDA error in the name of something else"),
    KeyError("x"),
]


@pytest.mark.parametrize("error", [*MEMORY, *STICKY, *NEITHER], ids=lambda e: str(e)[:40])
def test_errors_are_told_apart(error):
    assert is_out_of_memory(error) == (error in MEMORY)
    assert sticks(error) == (error in STICKY)


class Broken(ModelWorker):
    """Fails once with an error of the test's."""

    def __init__(self, spec, engine, error):
        super().__init__(spec, engine)
        self.errors = [error]
        self.forgot = 0
        self.runner = types.SimpleNamespace(forget=self.forget)

    def forget(self):
        self.forgot += 1

    def compute(self, plan):
        if self.errors:
            raise self.errors.pop()
        return "logits"


class Tape:
    """A link with two plans that keeps what is said."""

    def __init__(self):
        self.said = []

    def plans(self):
        one = np.ones(1, dtype=np.int32)
        yield from (Plan(step, 0 * one, 0 * one, one, one, one) for step in (1, 2))

    def reply(self, logits):
        self.said.append(logits)

    def fail(self, failed):
        self.said.append(failed)


def worker_of(folder, error):
    family = family_of(folder, experts=())
    return Broken(family.large, family.engine, error), Tape()


@pytest.mark.parametrize("error", [MEMORY[1], MEMORY[2], MEMORY[-1]], ids=str)
def test_without_memory_the_worker_forgets_and_goes_on(folder, error):
    worker, link = worker_of(folder, error)
    worker.run(link)
    failed, answer = link.said
    assert (failed.step, failed.out_of_memory, answer) == (1, True, "logits")
    assert worker.forgot == 1


def test_an_error_of_a_step_is_that_steps(folder):
    worker, link = worker_of(folder, NEITHER[0])
    worker.run(link)
    said = "RuntimeError: The size of tensor a (3) must match the size of tensor b (4)"
    assert link.said == [Failed(1, said), "logits"]
    assert not worker.forgot


@pytest.mark.parametrize("error", STICKY, ids=str)
def test_an_error_that_sticks_ends_the_loop_without_an_answer(folder, error):
    worker, link = worker_of(folder, error)
    with pytest.raises(RuntimeError, match="no later step can succeed"):
        worker.run(link)
    assert link.said == []


@pytest.fixture
def fractions(monkeypatch):
    """The shares of a GPU that processes were held to, on a machine that seems to have one."""
    found = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", found.append)
    return found


@pytest.mark.parametrize(
    ("num_gpus", "held"), [(0, []), (0.3, [0.3]), (0.95, [0.95]), (1, []), (2, [])]
)
def test_a_model_is_held_to_its_share_of_a_gpu_before_it_is_loaded(
    folder, fractions, num_gpus, held
):
    class Worker(ModelWorker):
        def load(self):
            return list(fractions)

    family = family_of(folder, experts=(), num_gpus=num_gpus)
    assert actors.WorkerActor(Worker, family.base, family.engine).load() == held


def test_the_coordinator_is_held_to_its_share_too(folder, fractions, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(actors.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(actors, "Coordinator", lambda *_, **settings: settings)
    family = family_of(folder, experts=(), num_gpus=0.2)
    actor = actors.CoordinatorActor()
    limits = Limits({"large": 8, "base": 8}, 50)
    actor.open({name: (name,) for name in ("large", "base")}, limits, None, family.engine, "tiny")
    assert fractions == [0.2]
    assert actor.coordinator["device"] == "cuda"
    actor.hub.close()
    torch.set_num_threads(threads)
