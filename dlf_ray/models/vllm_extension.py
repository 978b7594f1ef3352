"""What is mixed into vLLM's worker, on every rank: a plan in, rows of logits out.

vLLM is used below its scheduler and its sampler. A plan becomes vLLM's own `SchedulerOutput`, its
worker's `execute_model` runs that, and `compute_logits` is given the hidden states of the wanted
rows. Loading, kernels, parallelism, quantisation, adapters and CUDA graphs stay vLLM's; which
tokens are computed when, and in which blocks, is ours. It runs on both of vLLM's model runners: the
one that GPUs use ("V2") and the one of plain CPUs ("V1").

What is private to vLLM here is `execute_model_state`, which `sample_tokens` would take up, and the
places where a runner reads the tokens of a sequence that goes on (`_dlf_feed`), since it expects
them from its own sampler. Where a release moves these, `_dlf_feed` may return False: then all of a
sequence's tokens are sent at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch

from dlf_ray.models.blocks import Blocks
from dlf_ray.models.vocabulary import known
from dlf_ray.models.worker import Link, ModelWorker
from dlf_ray.plans import Plan

Adapters = Sequence[tuple[str, str]]
"""Name and folder of each."""


class PlanExtension:
    """Every name begins with `dlf_`: vLLM takes none that its worker has already."""

    model_runner: Any
    execute_model: Callable[[Any], Any]

    def dlf_setup(
        self, slots: int, vocab: int, instead: int, adapters: Adapters = ()
    ) -> dict[str, Any]:
        """Before the first plan: how many slots there are, rows of how many logits are asked for,
        and the token that stands for those beyond. Returns what there is of blocks, and which model
        runner it is."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        runner = self.model_runner
        groups = runner.kv_cache_config.kv_cache_groups
        self.dlf_vocab, self.dlf_instead = vocab, instead
        self.dlf_sizes = [group.kv_cache_spec.block_size for group in groups]
        self.dlf_count = int(runner.kv_cache_config.num_blocks)
        # What each slot holds, to be sent again where the runner has to forget it.
        self.dlf_tokens = np.zeros((slots, runner.max_model_len), dtype=np.int32)
        # The sampler is never called, but no request is without its parameters.
        self.dlf_sampling = SamplingParams(temperature=0, max_tokens=1)
        self.dlf_loras = [
            LoRARequest(name, at + 1, folder) for at, (name, folder) in enumerate(adapters)
        ]
        for lora in self.dlf_loras:
            runner.add_lora(lora)
        self.dlf_forget()
        return {
            "runner": type(runner).__module__,
            "blocks": self.dlf_count,
            "sizes": self.dlf_sizes,
            "device": str(runner.device),
            "parameters": sum(weight.numel() for weight in runner.model.parameters()),
        }

    def dlf_forget(self) -> None:
        """Nothing is computed any more."""
        slots = len(self.dlf_tokens)
        self.dlf_blocks = Blocks(slots, self.dlf_sizes, self.dlf_count)
        self.dlf_computed = np.zeros(slots, dtype=np.int64)
        self.dlf_model = np.full(slots, -1)
        """Whose each slot is, as the runner knows it."""
        self.dlf_known: set[int] = set()
        """Slots of the last step, whose state the runner still has."""

    @torch.inference_mode()
    def dlf_forward(self, plan: Plan) -> torch.Tensor:
        """[plan.rows, vocab], rows in the plan's order; nothing on pipeline ranks but the last.

        Raises `ValueError` for a plan that the state of the slots does not allow; nothing has
        changed then. After any other error, what the plan's slots held is forgotten.
        """
        runner = self.model_runner
        if not len(plan.slots):
            return torch.empty(0, self.dlf_vocab)
        plan = known(plan, self.dlf_vocab, self.dlf_instead)
        sources = self._dlf_sources(plan)
        try:
            output, names = self._dlf_schedule(plan, sources)
            self.execute_model(output)
            self.dlf_blocks.settle()
            self.dlf_computed[plan.slots] = plan.starts + plan.lengths
            return self._dlf_logits(plan, names)
        except Exception:
            self.dlf_blocks.settle()
            for slot in plan.slots.tolist():  # what it has begun with may be others' too
                self.dlf_blocks.drop(slot)
            self.dlf_computed[plan.slots] = 0
            self.dlf_known = set()
            runner.execute_model_state = None
            raise

    def dlf_serve(self, worker: ModelWorker, connect: Callable[[], Link]) -> None:
        """The loop of a worker of several ranks, one call for its life: the first rank talks to the
        coordinator, and hands plans to the others the way vLLM hands out its own objects."""
        from vllm.distributed.parallel_state import get_world_group

        group = get_world_group()
        if group.rank_in_group == 0:
            try:
                worker.runner = cast(Any, _FirstRank(self, group))
                worker.run(connect())
            finally:
                group.broadcast_object(None, src=0)
            return
        while (plan := group.broadcast_object(None, src=0)) is not None:
            try:
                self.dlf_forward(plan) if isinstance(plan, Plan) else self.dlf_forget()
            except Exception as error:  # the first rank has the same, and answers
                if not isinstance(error, ValueError | MemoryError):
                    raise

    def _dlf_sources(self, plan: Plan) -> list[int]:
        """The slot that each chunk's beginning is taken from, its own where none is named."""
        slots, starts = plan.slots, plan.starts
        count, length = self.dlf_tokens.shape
        if len(set(slots.tolist())) < len(slots) or slots.min() < 0 or slots.max() >= count:
            raise ValueError(f"slots {slots} are not all different and below {count}")
        given = plan.sources if len(plan.sources) else np.full(len(slots), -1)
        sources = np.where(given < 0, slots, given)
        if (starts > self.dlf_computed[sources]).any():
            raise ValueError(
                f"starts {starts} go beyond what slots {sources} have computed, "
                f"{self.dlf_computed[sources]}: start at 0 to compute a sequence anew"
            )
        if (starts + plan.lengths).max() > length:
            raise ValueError(f"a sequence exceeds the {length} positions there are")
        return [int(each) for each in sources]

    def _dlf_schedule(self, plan: Plan, sources: list[int]) -> tuple[Any, list[str]]:
        """vLLM's request for a step, and the name of each chunk in it."""
        from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
        from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput

        slots, starts, lengths = plan.slots.tolist(), plan.starts.tolist(), plan.lengths.tolist()
        models = plan.models.tolist() or [0] * len(slots)
        blocks, computed = self.dlf_blocks, self.dlf_computed
        # Read first: as they are before this step.
        begun = {
            slot: self.dlf_tokens[source, :start].copy()
            for source, slot, start in zip(sources, slots, starts, strict=True)
            if source != slot
        }
        moved = {
            slot: (source, start)
            for source, slot, start in zip(sources, slots, starts, strict=True)
            if source != slot or start != computed[slot]
        }
        blocks.begin(
            [source for source, _ in moved.values()],
            list(moved),
            [start for _, start in moved.values()],
        )
        for slot in set(plan.drops.tolist()) - set(slots):  # the chunks may need their blocks
            blocks.drop(slot)
            computed[slot] = 0
        new: list[Any] = []
        known: list[tuple[str, int, tuple[list[int], ...]]] = []
        ends = np.cumsum(plan.lengths)
        for slot, start, length, model, last in zip(
            slots, starts, lengths, models, ends.tolist(), strict=True
        ):
            end = start + length
            if slot in begun:
                self.dlf_tokens[slot, :start] = begun[slot]
            self.dlf_tokens[slot, start:end] = plan.tokens[last - length : last]
            copies = len(blocks.copies)
            added = blocks.extend(slot, start, end)
            goes_on = (
                slot in self.dlf_known
                and slot not in moved
                and copies == len(blocks.copies)
                and model == self.dlf_model[slot]
            )
            if goes_on and self._dlf_feed(slot, start, end):
                known.append((_name(slot), start, added))
            else:  # a name that is known means: forget what you knew of it
                new.append(self._dlf_new(slot, start, end, model))
                self.dlf_model[slot] = model
        self.dlf_known = set(slots)
        names = [_name(slot) for slot in slots]
        output = SchedulerOutput(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=CachedRequestData(
                req_ids=[name for name, _, _ in known],
                resumed_req_ids=set(),
                new_token_ids=[],
                all_token_ids={},
                new_block_ids=[added if any(added) else None for _, _, added in known],
                num_computed_tokens=[start for _, start, _ in known],
                num_output_tokens=[0] * len(known),
            ),
            num_scheduled_tokens=dict(zip(names, lengths, strict=True)),
            total_num_scheduled_tokens=sum(lengths),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            finished_req_ids=set(),
            num_common_prefix_blocks=[0] * len(self.dlf_sizes),
            free_encoder_mm_hashes=[],
            kv_cache_block_copies=[KVCacheBlockCopy(*pair) for pair in blocks.copies] or None,
        )
        return output, names

    def _dlf_new(self, slot: int, start: int, end: int, model: int) -> Any:
        from vllm.v1.core.sched.output import NewRequestData

        name, tokens = _name(slot), self.dlf_tokens[slot, :end].tolist()
        lora = self.dlf_loras[model - 1] if model else None
        requests = getattr(self.model_runner, "requests", {})
        if name in requests:  # else it keeps the adapter that it began with
            requests[name].lora_request = lora
        return NewRequestData(
            req_id=name,
            prompt_token_ids=tokens,
            mm_features=[],
            sampling_params=self.dlf_sampling,
            pooling_params=None,
            # Copies: the runner appends to its own.
            block_ids=tuple(list(table) for table in self.dlf_blocks.tables[slot]),
            num_computed_tokens=start,
            lora_request=lora,
            prefill_token_ids=tokens,
        )

    def _dlf_feed(self, slot: int, start: int, end: int) -> bool:
        """Puts the tokens of a chunk where the runner reads them. False where it cannot: then all
        that precede them have to be sent with them."""
        runner, name, tokens = self.model_runner, _name(slot), self.dlf_tokens[slot, start:end]
        if (batch := getattr(runner, "input_batch", None)) is not None:  # V1
            if (row := batch.req_id_to_index.get(name)) is None:
                return False
            batch.token_ids_cpu[row, start:end] = tokens
            batch.num_tokens_no_spec[row] = end  # as far as rows are copied when the batch moves
            # A decoding row to those kernels that ask is one whose prompt is computed.
            batch.num_prompt_tokens[row] = start if end - start == 1 else end
            return True
        states = runner.req_states  # V2
        if (row := states.req_id_to_index.get(name)) is None:
            return False
        states.all_token_ids.stage_write(row, start, tokens.tolist())
        states.num_computed_tokens.stage_write_elem(row, start)
        # All that is fed counts as prompt, so that it is read from there; a single token of that
        # still runs as a decoding row, with its CUDA graphs.
        states.prefill_len.np[row] = end
        states.apply_staged_writes()
        return True

    def _dlf_logits(self, plan: Plan, names: list[str]) -> torch.Tensor:
        """The rows that the plan wants of what `execute_model` has computed."""
        runner = self.model_runner
        state, runner.execute_model_state = runner.execute_model_state, None
        if state is None or not plan.rows:
            return torch.empty(0, self.dlf_vocab)
        # The runner has an order of its own: decoding sequences first.
        newer = hasattr(state, "input_batch")
        order = state.input_batch.req_ids if newer else runner.input_batch.req_ids
        at = {name: place for place, name in enumerate(order)}
        places = np.array([at[name] for name in names])
        lengths = np.empty(len(names), dtype=np.int64)
        lengths[places] = plan.lengths
        if not newer and plan.wants.max() == 1:  # the last row of each sequence is there already
            rows = torch.from_numpy(places[plan.wants == 1]).to(state.logits.device)
            logits = state.logits[rows]
        else:
            if self.dlf_loras:
                self._dlf_set_models(plan)
            rows = torch.from_numpy(_last(np.cumsum(lengths)[places], plan.wants))
            hidden = state.hidden_states
            logits = runner.model.compute_logits(hidden[rows.to(hidden.device)])
        wanted: torch.Tensor = logits[:, : self.dlf_vocab].contiguous()
        return wanted

    def _dlf_set_models(self, plan: Plan) -> None:
        """Says whose each wanted row is: output embeddings that adapters wrap ask for that."""
        models = plan.models if len(plan.models) else np.zeros(len(plan.slots), np.int32)
        self.model_runner._set_active_loras(
            tuple(np.repeat(models, plan.wants).tolist()),
            tuple(np.repeat(models, plan.lengths).tolist()),
            {self.dlf_loras[model - 1] for model in set(models.tolist()) if model},
        )


class _FirstRank:
    """All ranks, as the loop of a worker sees a runner."""

    def __init__(self, extension: PlanExtension, group: Any) -> None:
        self._extension = extension
        self._group = group

    def forward(self, plan: Plan) -> torch.Tensor:
        self._group.broadcast_object(plan, src=0)
        return self._extension.dlf_forward(plan)

    def forget(self) -> None:
        self._group.broadcast_object("forget", src=0)
        self._extension.dlf_forget()


def _name(slot: int) -> str:
    """What vLLM calls the request in a slot."""
    return f"slot{slot}"


def _last(ends: Any, wants: Any) -> Any:
    """The last wants[i] numbers below ends[i], for each i: [sum(wants)]."""
    firsts = np.repeat(ends - wants, wants)
    return firsts + np.arange(int(wants.sum())) - np.repeat(np.cumsum(wants) - wants, wants)
