"""One Hugging Face causal LM and its slot cache: plans in, logits out.

The model itself stays theirs: it is given positions per row, a 4-D mask per kind of layer, and a
`Cache` whose `update` writes where the plan says.
"""

from __future__ import annotations

import inspect
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dlf_ray.config import ModelSpec
from dlf_ray.messages import Description
from dlf_ray.models.adapters import Adapters, find_adapter, unmixed
from dlf_ray.models.cache import Indices, Rows, SlotCache
from dlf_ray.models.loading import (
    chat_templates,
    context_of,
    end_tokens,
    load_model,
    load_tokenizer,
    sampling_of,
    windows_of,
)
from dlf_ray.models.memory import free_bytes
from dlf_ray.models.vocabulary import digest, known, split, stand_in
from dlf_ray.plans import ALL, Plan

FREE_PADDING = 64
"""Tokens of padding that cost less than another forward pass, which reads all weights again."""
IDLE = 4
"""So many rows at least are computed for each idle one between them."""
SPARE = 0.05
"""Of a device's free memory: lost between blocks of different sizes."""


class Runner:
    """A loaded model that computes plans; it remembers the keys and values of every slot.

    `vocab` is the number of logits returned per row: at first the length of the model's tokenizer,
    or what the model has if that is less.

    Raises `ValueError`, saying what to do, where the model cannot be loaded or its architecture
    cannot be run with a slot cache.
    """

    ranks = 1

    def __init__(
        self,
        spec: ModelSpec,
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        adapters: Sequence[str] = (),
    ) -> None:
        """`adapters`: folders or hub ids of LoRA adapters over the model. Of the M models that this
        makes, model i (0 without an adapter) has the slots i, i + M, i + 2 M, ..., and each has
        `max_num_seqs` of them and `max_num_batched_tokens` in a step."""
        found = [find_adapter(each, spec.model) for each in adapters]
        self._name, self._names = spec.source, (spec.source, *adapters)
        self._tokenizer = load_tokenizer(spec)
        self._instead = stand_in(self._tokenizer)
        self._model = load_model(spec)
        self._adapters = Adapters(self._model, found, spec.model)
        # Properties there, which walk over the parameters each time.
        self._device, self._dtype = self._model.device, self._model.dtype
        config = self._model.config.get_text_config(decoder=True)
        self._context = context_of(config)
        self._length = min(max_model_len, self._context)
        self._windows = windows_of(config, self._name, self._length)
        self._embedded = int(self._model.get_input_embeddings().weight.shape[0])
        names = inspect.signature(self._model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"  # which is the older
        self._cache = SlotCache()
        self._computed = np.zeros(max_num_seqs * len(self._names), dtype=np.int64)
        self._wanted: torch.Tensor | None = None
        self.vocab = ALL  # until the model has said how many logits it has
        logits = self._compare_with_plain_forward()
        self.vocab = min(len(self._tokenizer), logits)
        self._memory = self._measure(spec, max_num_batched_tokens * len(self._names), logits)

    def describe(self) -> Description:
        """What the family needs to know of this model before the first step."""
        said = (self._model.config.get_text_config(decoder=True), self._model.generation_config)
        eos = [getattr(each, "eos_token_id", None) for each in said]
        return Description(
            vocab=self.vocab,
            tokenizer_digest=digest(self._tokenizer.get_vocab()),
            split=split(self._tokenizer),
            eos_token_ids=end_tokens(*eos, self._tokenizer.eos_token_id),
            context=self._context,
            parameters=sum(p.numel() for p in self._model.parameters()),
            device=str(self._device),
            dtype=str(self._dtype).removeprefix("torch."),
            cache_bytes_per_position=self._memory[0],
            free_bytes=self._memory[1],
            node=platform.node(),
            backend="transformers",
            sampling=sampling_of(self._model.generation_config.to_diff_dict()),
            chat_templates=chat_templates(self._tokenizer, self._names[1:]),
        )

    @torch.inference_mode()
    def forward(self, plan: Plan) -> torch.Tensor:
        """Computes one step: [plan.rows, vocab], rows in the plan's order, in the model's dtype.

        Raises `ValueError` for a plan that the model or the state of its slots does not allow;
        nothing has changed then.
        """
        plan = known(plan, self.vocab, self._instead)
        self._check(plan)
        firsts = np.cumsum(plan.lengths) - plan.lengths
        chunks = np.stack([plan.slots, plan.starts, plan.lengths, plan.wants, firsts]).astype(int)
        slots, starts, lengths, wants, _ = chunks
        ends, copied = starts + lengths, _sources(plan)
        held = np.minimum(self._computed, plan.keep_length)
        held[plan.keep :] = 0
        held[slots] = ends
        # Should a step fail half way, what it may have overwritten counts as not computed.
        self._computed = held.copy()
        self._computed[slots] = np.where(copied == slots, starts, 0)
        copies = (copied != slots) & (starts > 0)
        self._cache.prepare(
            (int(np.flatnonzero(held).max(initial=-1)) + 1, int(held.max(initial=0))),
            slots,
            ends,
            (copied[copies], slots[copies], starts[copies]),
        )
        self._computed[slots] = starts
        groups = _groups(lengths)
        logits = [self._pass(chunks[:, group], plan.tokens) for group in groups]
        self._computed = held
        if len(groups) == 1:  # a group keeps the plan's order
            return logits[0]
        out = torch.empty(plan.rows, self.vocab, dtype=self._dtype, device=self._device)
        row_of = np.repeat(np.arange(len(slots)), wants)
        for group, part in zip(groups, logits, strict=True):
            rows = np.flatnonzero(np.isin(row_of, group))
            out[torch.from_numpy(rows).to(out.device)] = part.to(out.device)
        return out

    def forget(self) -> None:
        """Gives the memory of the cache back; every sequence has to start at 0 again."""
        self._cache = SlotCache()
        self._computed[:] = 0
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _check(self, plan: Plan) -> None:
        """Raises `ValueError` for a plan that would read or write what it must not."""
        slots, starts, lengths, tokens = plan.slots, plan.starts, plan.lengths, plan.tokens
        if (lengths < 1).any() or lengths.sum() != len(tokens):
            raise ValueError("the chunks of a plan have a token or more each, and no token is left")
        if (plan.wants < 0).any() or (plan.wants > lengths).any():
            raise ValueError("a plan cannot score more positions of a chunk than the chunk has")
        if plan.keep < 0 or plan.keep_length < 0:
            raise ValueError("a plan keeps a number of slots and positions, 0 or more of each")
        if not len(slots):
            return
        if slots.min() < 0 or slots.max() >= len(self._computed):
            raise ValueError(f"slots {slots} are not all within 0..{len(self._computed) - 1}")
        if np.bincount(slots).max() > 1:
            raise ValueError(f"slots {slots} name a slot twice")
        if len(plan.sources) not in (0, len(slots)) or (plan.sources >= len(self._computed)).any():
            raise ValueError(f"sources {plan.sources} are not a slot or -1 for each of {slots}")
        copied, models = _sources(plan), len(self._names)
        whose = plan.models if models > 1 or len(plan.models) else slots % models
        if not np.array_equal(whose, slots % models) or (copied % models != slots % models).any():
            raise ValueError(
                f"slots {slots} and sources {plan.sources} are not all those of models "
                f"{plan.models}: of {models} models, model i has the slots i, i + {models}, ..."
            )
        if starts.min() < 0 or (starts > self._computed[copied]).any():
            raise ValueError(
                f"starts {starts} go beyond what slots {copied} have computed, "
                f"{self._computed[copied]}: start at 0 to compute a sequence anew"
            )
        if (starts + lengths).max() > self._length:
            raise ValueError(f"a sequence exceeds the {self._length} positions of {self._name}")
        if tokens.min() < 0 or tokens.max() >= self._embedded:
            raise ValueError(
                f"token ids {tokens.min()}..{tokens.max()} are not all among the "
                f"{self._embedded} of {self._name}: is this its tokenizer?"
            )

    def _pass(self, chunks: Indices, tokens: npt.NDArray[np.int32]) -> torch.Tensor:
        """One pass of the model over chunks padded to the longest of them: [rows, vocab]."""
        chunks = _with_idle(chunks)
        slots, starts, lengths, wants, firsts = chunks
        offsets = np.arange(lengths.max())
        real = offsets < lengths[:, None]
        # Padding repeats position 0 of its sequence: it sees that one, so its softmax is no 0 / 0.
        positions = np.where(real, starts[:, None] + offsets, 0)
        arrays = (
            np.where(real, tokens[np.where(real, firsts[:, None] + offsets, 0)], 0),
            positions,
            slots,
            np.repeat(slots, lengths),
            positions[real],
            np.flatnonzero(real),
            np.flatnonzero(real & (offsets >= (lengths - wants)[:, None])),
        )
        packed = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
        packed = packed.to(self._device)  # one transfer for all
        at = packed.split_with_sizes([array.size for array in arrays])
        ids, where = at[0].view(real.shape), at[1].view(real.shape)
        # Attention reads no further than the longest row, and to a multiple that kernels like.
        end = -(-int((starts + lengths).max()) // 8) * 8
        ascending = (np.diff(slots) == 1).all()
        self._cache.point(
            Rows(
                rows=slice(int(slots[0]), int(slots[-1]) + 1) if ascending else at[2],
                end=end,
                slots=at[3],
                positions=at[4],
                real=None if real.all() else at[5],
            )
        )
        self._wanted = at[6]
        self._adapters.point(np.where(lengths > 0, slots % len(self._names), 0).tolist())
        try:
            logits: torch.Tensor = self._model(
                input_ids=ids,
                position_ids=where,
                attention_mask=self._masks(where, end),
                use_cache=True,
                **{self._cache_name: self._cache},
            ).logits
        finally:
            self._wanted = None
        return logits[0, :, : self.vocab].contiguous()

    def _masks(self, positions: torch.Tensor, end: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """What row b sees of its slot from [b, t]: 0 or the lowest float, [B, 1, T, end].

        One per kind of layer where kinds differ. Floats, because eager attention adds the mask, and
        the kernels behind SDPA would turn a boolean one into floats again in every layer.
        """
        dtype = self._dtype
        keys = torch.arange(end, device=positions.device)
        queries = positions[:, None, :, None]
        masks = {}
        for window in set(self._windows.values()):
            unseen = keys > queries
            if window is not None:
                unseen |= keys <= queries - window
            masks[window] = torch.zeros(unseen.shape, dtype=dtype, device=unseen.device)
            masks[window].masked_fill_(unseen, torch.finfo(dtype).min)
        if len(masks) == 1:
            return masks.popitem()[1]
        return {kind: masks[window] for kind, window in self._windows.items()}

    def _select(self, _: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        """Lets only wanted rows into the output embeddings: [B, T, H] to [1, rows, H].

        A hook there works for every architecture and leaves what the model does to its logits
        afterwards (soft caps, scales) to the model.
        """
        if self._wanted is None:
            return None
        return (args[0].flatten(0, 1)[self._wanted.to(args[0].device)][None],)

    def _measure(self, spec: ModelSpec, tokens: int, logits: int) -> tuple[int, int | None]:
        """Bytes of the cache per position, and how many the cache may have in all."""
        taken, tensors = self._cache.bytes_per_position(), self._cache.tensors
        self.forget()
        if not taken:
            return 0, None
        config = self._model.config.get_text_config(decoder=True)
        weights = (*self._model.parameters(), *self._model.buffers())
        used = sum(weight.nbytes for weight in weights)
        working = self._working_bytes(config, tokens, logits)
        # Layers that are spread over devices take their shares of every position: the scarcest
        # device decides.
        free = min(
            ((1 - SPARE) * free_bytes(device, limit=spec.memory, used=used) - working)
            * taken.total()
            / share
            for device, share in taken.items()
        )
        # At most so many tensors are there once more at a time: one that grows, or the keys and
        # values of a layer, gathered and repeated for all heads.
        heads = getattr(config, "num_attention_heads", 1)
        groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
        again = 2 * (1 + groups) if groups > 1 else 2
        return taken.total(), max(0, int(free * tensors / (tensors + again)))

    def _working_bytes(self, config: Any, tokens: int, logits: int) -> int:
        """What a step takes beside weights and cache, at most and roughly.

        `tokens` are those of a step, `logits` the numbers of a row of them.
        """
        size = self._dtype.itemsize
        rows = len(self._computed)
        # Of a layer: the residual stream, normalised in float32, queries, keys, values, their
        # rotations, the answer, then gate, up and their product.
        hidden = config.hidden_size
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        numbers = 16 * hidden + 4 * inner
        if len(self._names) > 1:  # an adapter's rows of a layer's input, and of what it adds
            numbers += hidden + 3 * inner
        # The mask is made of booleans, and of floats for each kind of layer.
        kinds = len(set(self._windows.values()))
        attention = self._length * (2 + size * kinds)
        if config._attn_implementation == "eager":  # scores, soft-capped, and a softmax in float32
            attention += self._length * config.num_attention_heads * (3 * size + 4)
        padded = FREE_PADDING + max(tokens + FREE_PADDING, tokens * 5 // 4)
        return int(padded * (size * numbers + attention) + rows * logits * 4 * size)

    @torch.inference_mode()
    def _compare_with_plain_forward(self) -> int:
        """Computes one text with the cache and without, and returns the model's number of logits.

        Architectures that derive positions or masks in ways of their own, or keep state elsewhere,
        would answer nonsense without an error; they are a `ValueError` here.
        """
        kind = type(self._model).__name__
        head = self._model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{self._name} ({kind}) has no output embeddings: not a causal LM")
        text = self._tokenizer("Two and three is five.")["input_ids"] or [0]
        tokens = np.array(text[: self._length], dtype=np.int32)
        if tokens.max() >= self._embedded:
            raise ValueError(
                f"the tokenizer of {self._name} gives ids beyond the model's {self._embedded}: "
                "set `tokenizer:` in the family file to the one it was trained with"
            )
        plain = torch.stack([self._plain(tokens, model) for model in range(len(self._names))])
        head.register_forward_pre_hook(self._select)
        # Two chunks in one slot, beside a shorter sequence in another where there are two or more;
        # each model its own of both, all in one batch.
        models = np.arange(len(self._names), dtype=np.int32)
        first = np.unique([0, min(2, len(self._computed) // len(models) - 1)]).astype(np.int32)
        slots = (first[:, None] * len(models) + models).ravel()
        middle, length = len(tokens) // 2, len(tokens)
        edges = np.array([[0, 1, length - 1], [0, middle, length]], dtype=np.int32)[-len(first) :]
        edges = np.repeat(edges, len(models), axis=0)
        for starts, ends in zip(edges.T, edges.T[1:], strict=False):
            if (ends <= starts).any():
                break  # a limit of so few positions that there is nothing to compare
            fed = np.concatenate([tokens[a:b] for a, b in zip(starts, ends, strict=True)])
            chunks = (slots, starts, ends - starts, ends - starts, fed)
            try:
                cached = self.forward(Plan(0, *chunks, models=np.tile(models, len(first))))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # anything may go wrong in code that expects another cache
                raise ValueError(
                    f"{self._name} ({kind}) does not run with a slot cache: {error!r}"
                ) from error
            expected = plain[:, starts[-1] : ends[-1]]
            rows = cached[-expected.shape[0] * expected.shape[1] :].float().view(expected.shape)
            for name, got, wanted in zip(self._names, rows, expected, strict=True):
                off = (got - wanted).norm()
                if not off <= 0.2 * (wanted - wanted.mean(-1, keepdim=True)).norm():
                    raise ValueError(
                        f"{name} ({kind}) answers otherwise with a slot cache than without: its "
                        "layers place tokens, mask or remember in a way of their own"
                    )
        return int(plain.shape[-1])

    def _plain(self, tokens: npt.NDArray[np.int32], model: int) -> torch.Tensor:
        """One of the models without a cache: [T, vocab]. Raises `ValueError` for broken weights."""
        ids = torch.from_numpy(tokens)[None].to(self._device)
        self._adapters.point([model])
        try:
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits[0].float()
        except ValueError as error:
            if len(self._names) == 1:
                raise
            # PEFT's, where a layer does not get its input row by row.
            others = ", ".join(self._names[1:])
            raise unmixed(others, f"does not run in a batch over {self._name} ({error})") from error
        if not logits.isfinite().all():
            raise ValueError(
                f"{self._names[model]} gives logits that are not finite: its weights are broken, "
                f"or overflow in {self._dtype} (set `dtype: float32` or `bfloat16`)"
            )
        return logits


def _sources(plan: Plan) -> Indices:
    """For each chunk the slot that holds what comes before it, most often its own."""
    if not len(plan.sources):
        return plan.slots.astype(int)
    return np.where(plan.sources < 0, plan.slots, plan.sources).astype(int)


def _with_idle(chunks: Indices) -> Indices:
    """Chunks (rows: slots, starts, lengths, wants, firsts), with idle ones of no token in the gaps
    between their slots where those are few: the cache of neighbours is a view, that of others a
    copy of all their keys and values in every layer."""
    slots, lengths = chunks[0], chunks[2]
    idle = slots[-1] - slots[0] + 1 - len(slots)
    few = min(len(slots) // IDLE, FREE_PADDING // int(lengths.max()))
    if not 0 < idle <= few or (np.diff(slots) < 0).any():
        return chunks
    dense = np.zeros((len(chunks), len(slots) + idle), dtype=chunks.dtype)
    dense[0] = np.arange(slots[0], slots[-1] + 1)
    dense[:, slots - slots[0]] = chunks
    return dense


def _groups(lengths: Indices) -> list[Indices]:
    """Chunks to compute in one pass each: few passes, and little padding in each of them.

    Indices into `lengths`, ascending within a group. Longest first, a chunk joins the group unless
    padding would exceed both `FREE_PADDING` tokens and a quarter of the group's own.
    """
    if len(lengths) and lengths.min() == lengths.max():
        return [np.arange(len(lengths))]
    groups: list[list[int]] = []
    width = tokens = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        padding = width * (len(groups[-1]) + 1) - tokens - length if groups else ALL
        if padding > max(FREE_PADDING, (tokens + length) // 4):
            groups.append([])
            width, tokens = length, 0
        groups[-1].append(i)
        tokens += length
    return [np.sort(group) for group in groups]
