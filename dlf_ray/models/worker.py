"""One model of the family at work: plans in, logits out, until told to stop.

A plain class: an actor over Ray, an object beside the coordinator in a local engine.
"""

from __future__ import annotations

import importlib.util
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from dlf_ray.config import EngineConfig, ModelSpec, is_gguf
from dlf_ray.errors import is_out_of_memory, sticks
from dlf_ray.messages import Description, Failed
from dlf_ray.plans import Logits, Plan

# The runner and the loading come with transformers, seconds of every process that imports it; a
# worker with a model of its own kind needs neither, so they are imported where they are used.

log = logging.getLogger("dlf_ray")


class Link(Protocol):
    """The worker's end of the fabric."""

    def plans(self) -> Iterator[Plan]:
        """The coordinator's plans, until it says stop."""

    def reply(self, logits: Logits) -> None: ...

    def fail(self, failed: Failed) -> None: ...


class Backend(Protocol):
    """What computes plans: `runner.Runner` over transformers, `vllm_runner.VllmRunner`."""

    ranks: int
    """The processes that it computes in, this one or others."""

    def describe(self) -> Description:
        """What the family needs to know of the model before the first step."""

    def forward(self, plan: Plan) -> torch.Tensor:
        """[plan.rows, vocab], rows in the plan's order. Raises `ValueError` for a plan that cannot
        be; nothing has changed then."""

    def forget(self) -> None:
        """Gives the memory of the cache back; every sequence has to start at 0 again."""

    def serve(self, worker: ModelWorker, connect: Callable[[], Link]) -> None:
        """The loop of `worker`, in the first of several processes."""


def backend_of(spec: ModelSpec, engine: EngineConfig) -> str:
    """What computes a model in this process: what its file says, else vLLM where there is one and
    the model has a GPU."""
    wanted = spec.backend or engine.backend
    if wanted != "auto":
        return wanted
    other = is_gguf(spec.model) or getattr(spec, "adapter", None)  # neither of which vLLM takes
    there = spec.num_gpus and importlib.util.find_spec("vllm")
    backend = "vllm" if there and not other else "transformers"
    log.info("%s is computed by %s", spec.model, backend)
    return backend


class ModelWorker:
    """A runner with its loading and its loop."""

    runner: Backend
    ranks = 1
    """The processes that the runner computes in."""

    broken = False
    """Whether an error has left the process in a state in which no later step can succeed."""

    def __init__(self, spec: ModelSpec, engine: EngineConfig, adapters: Sequence[str] = ()) -> None:
        """`adapters`: folders or hub ids of those that are computed over the same weights."""
        self.spec = spec
        self.engine = engine
        self.adapters = tuple(adapters)

    def load(self) -> Description:
        """Loads the model. Raises what the runner raises: wrong paths, broken files, no memory."""
        torch.set_num_threads(max(1, int(self.spec.num_cpus or 1)))
        kind: Any
        if backend_of(self.spec, self.engine) == "vllm":
            from dlf_ray.models.vllm_runner import VllmRunner as kind
        else:
            from dlf_ray.models.runner import Runner as kind
        self.runner = kind(
            self.spec,
            max_num_seqs=self.engine.max_num_seqs,
            max_model_len=self.engine.max_model_len,
            max_num_batched_tokens=self.engine.max_num_batched_tokens,
            adapters=self.adapters,
        )
        self.ranks = self.runner.ranks
        return self.runner.describe()

    def tokenizer(self) -> Any:
        """The tokenizer beside the model, for whoever cannot read the worker's disk."""
        from dlf_ray.models.loading import load_tokenizer

        return load_tokenizer(self.spec)

    def compute(self, plan: Plan) -> Logits:
        """One step: the forward pass, and which of its rows are finite."""
        start, began = time.time(), time.perf_counter()
        values = self.runner.forward(plan)
        # Here, in parallel with the other models, and on the device that holds the logits. The
        # largest magnitude is NaN or infinite if any is, and ten times faster than asking each.
        finite = values.abs().amax(-1).isfinite().cpu().numpy()
        return Logits(plan.step, values, finite, time.perf_counter() - began, start)

    def serve(self, connect: Callable[[], Link]) -> None:
        """The same as `run`, with a link that is opened in the process that computes: the first one
        of a model that is spread over several."""
        if self.ranks > 1:
            self.runner.serve(type(self)(self.spec, self.engine), connect)
        else:
            self.run(connect())

    def run(self, link: Link) -> None:
        """Answers plans until the coordinator says stop.

        An exception of a step goes to the coordinator, which fails the requests in it; the model
        serves on, since the next sequence in a slot starts from nothing. Not so after an error that
        sticks: it is raised instead, for the process to end. The requests are not to blame, and go
        on once the model is back.
        """
        for plan in link.plans():
            answer = self.answer(plan)
            if self.broken:
                assert isinstance(answer, Failed)
                raise RuntimeError(f"no later step can succeed after {answer.error}")
            if isinstance(answer, Failed):
                link.fail(answer)
            else:
                link.reply(answer)

    def answer(self, plan: Plan) -> Logits | Failed:
        """The step, or why there is none; without the memory for it, nothing computed is kept."""
        try:
            return self.compute(plan)
        except Exception as error:
            traceback.print_exc()
            out_of_memory = is_out_of_memory(error)
            self.broken = sticks(error)
            failed = Failed(plan.step, f"{type(error).__name__}: {error}", out_of_memory)
        # Not before here: the exception's frames hold tensors of the pass.
        if out_of_memory:
            self.runner.forget()
        return failed
