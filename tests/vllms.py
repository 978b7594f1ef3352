"""A model under vLLM in a process of its own: vLLM keeps state that is the process's."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from typing import Any

import pytest

from dlf_ray.plans import Plan

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"
)
HEAD = {"hidden": 64, "head_dim": 32}
"""For `tiny.model`: vLLM's kernels take no smaller heads."""


def _newer_runner() -> None:
    """vLLM's second model runner, that GPUs use, on a CPU: its kernels in Triton's interpreter."""
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    import triton.backends
    from triton.backends.compiler import BaseBackend
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):
        @staticmethod
        def is_active() -> bool:
            return True

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: "cpu"

    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=BaseBackend, driver=Driver)


def _serve(pipe: Any, newer: bool, ranks: int, spec: dict[str, Any], how: dict[str, Any]) -> None:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if newer:
        _newer_runner()
    import torch

    torch.set_num_threads(1)
    from dlf_ray.config import ModelSpec
    from dlf_ray.models import vllm_runner
    from dlf_ray.models.vllm_runner import VllmRunner

    if ranks > 1:  # as for so many GPUs
        vllm_runner.ranks_of = lambda spec: ranks
    try:
        runner = VllmRunner(ModelSpec(**spec), **how)
        pipe.send((runner.describe(), runner.vocab))
    except Exception as error:
        pipe.send(error)
        return
    while True:
        name, *args = pipe.recv()
        try:
            pipe.send(getattr(runner, name)(*args))
        except Exception as error:
            pipe.send(error)


class Apart:
    """A `VllmRunner`, as far as tests ask."""

    def __init__(self, folder: Any, *, newer: bool = False, ranks: int = 1, **how: Any) -> None:
        spec = {"model": str(folder), "dtype": "float32", **how.pop("spec", {})}
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        settings = {"max_num_seqs": 5, "max_model_len": 64, "max_num_batched_tokens": 256, **how}
        self._process = context.Process(target=_serve, args=(theirs, newer, ranks, spec, settings))
        self._process.start()
        self.description, self.vocab = self._answer()

    def forward(self, plan: Plan) -> Any:
        return self._ask("forward", plan)

    def forget(self) -> None:
        self._ask("forget")

    def serve(self, worker: Any, connect: Any) -> None:
        """Does not wait for its end."""
        self._pipe.send(("serve", worker, connect))

    def close(self) -> None:
        self._process.kill()
        self._process.join()

    def _ask(self, *asked: Any) -> Any:
        self._pipe.send(asked)
        return self._answer()

    def _answer(self) -> Any:
        assert self._pipe.poll(300), "vLLM does not answer"
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer
