"""One Hugging Face causal LM and its slot cache: plans in, logits out.

The cache is a table with a row of keys and values per slot. Sequences of different lengths sit side
by side, each written and read at its own positions, which is what continuous batching needs and
none of the caches of transformers offers. The model itself stays theirs: it is given positions per
row, a 4-D mask per kind of layer, and a `Cache` whose `update` writes where the plan says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache, DynamicLayer

from dlf_ray.config import ModelSpec
from dlf_ray.loading import digest, load_model, load_tokenizer
from dlf_ray.messages import Description, Plan

Indices = npt.NDArray[np.int64]

FREE_PADDING = 64
"""Tokens of padding that cost less than another forward pass, which reads all weights again."""
LENGTH_STEP = 64
"""The cache's length is a multiple of it: few sizes to grow through, rows aligned for kernels."""
NO_LIMIT = 2**31 - 1
"""The context of a model whose configuration names none."""


class Runner:
    """A loaded model that computes plans; it remembers the keys and values of every slot.

    `vocab` is the number of logits returned per row: at first the length of the model's tokenizer,
    or what the model has if that is less.

    Raises `ValueError`, saying what to do, where the model cannot be loaded or its architecture
    cannot be run with a slot cache.
    """

    def __init__(self, spec: ModelSpec, *, max_num_seqs: int, max_model_len: int) -> None:
        self._name = spec.model
        self._tokenizer = load_tokenizer(spec)
        self._model = load_model(spec)
        # Properties there, which walk over the parameters each time.
        self._device, self._dtype = self._model.device, self._model.dtype
        config = self._model.config.get_text_config(decoder=True)
        self._context = _context(config)
        self._length = min(max_model_len, self._context)
        self._windows = _windows(config, self._name, self._length)
        self._embedded = int(self._model.get_input_embeddings().weight.shape[0])
        self._cache = SlotCache(max_num_seqs, self._length)
        self._computed = np.zeros(max_num_seqs, dtype=np.int64)
        self._written = np.zeros(max_num_seqs, dtype=np.bool_)
        self._wanted: torch.Tensor | None = None
        self.vocab = NO_LIMIT  # until the model has said how many logits it has
        self.vocab = min(len(self._tokenizer), self._compare_with_plain_forward())

    def describe(self) -> Description:
        """What the family needs to know of this model before the first step."""
        eos = getattr(self._model.generation_config, "eos_token_id", None)
        if eos is None:
            eos = self._tokenizer.eos_token_id
        return Description(
            vocab=self.vocab,
            tokenizer_digest=digest(self._tokenizer.get_vocab()),
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
            context=self._context,
            parameters=sum(p.numel() for p in self._model.parameters()),
            device=str(self._device),
            dtype=str(self._dtype).removeprefix("torch."),
        )

    @torch.inference_mode()
    def forward(self, plan: Plan) -> torch.Tensor:
        """Computes one step: [plan.rows, vocab], rows in the plan's order, in the model's dtype.

        Raises `ValueError` for a plan that the model or the state of its slots does not allow;
        nothing has changed then.
        """
        self._check(plan)
        firsts = np.cumsum(plan.lengths) - plan.lengths
        chunks = np.stack([plan.slots, plan.starts, plan.lengths, plan.wants, firsts]).astype(int)
        slots, starts, lengths, wants, _ = chunks
        copied = _sources(plan)
        # A masked position weighs zero, which is not enough where it holds a NaN: what a former
        # sequence left in a slot must not reach the next.
        fresh = (starts == 0) | (copied != slots)
        self._cache.take_over(
            [(a, b, n) for a, b, n in zip(copied, slots, starts, strict=True) if n and a != b],
            clear=slots[fresh & self._written[slots]],
        )
        self._written[slots] = True
        # Should a pass fail half way, what it may have overwritten counts as not computed.
        self._computed[slots] = starts
        groups = _groups(lengths)
        logits = [self._pass(chunks[:, group], plan.tokens) for group in groups]
        self._computed[slots] += lengths
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
        self._cache = SlotCache(len(self._computed), self._length)
        self._computed[:] = 0
        self._written[:] = False
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _check(self, plan: Plan) -> None:
        """Raises `ValueError` for a plan that would read or write what it must not."""
        slots, starts, lengths, tokens = plan.slots, plan.starts, plan.lengths, plan.tokens
        if (lengths < 1).any() or lengths.sum() != len(tokens):
            raise ValueError("the chunks of a plan have a token or more each, and no token is left")
        if (plan.wants < 0).any() or (plan.wants > lengths).any():
            raise ValueError("a plan cannot score more positions of a chunk than the chunk has")
        if not len(slots):
            return
        if slots.min() < 0 or slots.max() >= len(self._computed):
            raise ValueError(f"slots {slots} are not all within 0..{len(self._computed) - 1}")
        if np.bincount(slots).max() > 1:
            raise ValueError(f"slots {slots} name a slot twice")
        if len(plan.sources) not in (0, len(slots)) or (plan.sources >= len(self._computed)).any():
            raise ValueError(f"sources {plan.sources} are not a slot or -1 for each of {slots}")
        copied = _sources(plan)
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
            _Rows(
                rows=slice(int(slots[0]), int(slots[-1]) + 1) if ascending else at[2],
                slots=at[3],
                positions=at[4],
                real=None if real.all() else at[5],
                size=(int(slots.max()) + 1, end),
            )
        )
        self._wanted = at[6]
        try:
            logits: torch.Tensor = self._model(
                input_ids=ids,
                position_ids=where,
                attention_mask=self._masks(where, end),
                past_key_values=self._cache,
                use_cache=True,
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
        ids = torch.from_numpy(tokens)[None].to(self._device)
        plain = self._model(input_ids=ids, use_cache=False).logits[0].float()
        if not plain.isfinite().all():
            raise ValueError(
                f"{self._name} gives logits that are not finite: its weights are broken, or "
                f"overflow in {self._dtype} (set `dtype: float32` or `bfloat16`)"
            )
        head.register_forward_pre_hook(self._select)
        # Two chunks in the last slot, beside a shorter sequence in the first where there are two.
        slots = np.unique([0, len(self._computed) - 1]).astype(np.int32)
        middle, length = len(tokens) // 2, len(tokens)
        edges = np.array([[0, 1, length - 1], [0, middle, length]], dtype=np.int32)[-len(slots) :]
        for starts, ends in zip(edges.T, edges.T[1:], strict=False):
            if (ends <= starts).any():
                break  # a limit of so few positions that there is nothing to compare
            fed = np.concatenate([tokens[a:b] for a, b in zip(starts, ends, strict=True)])
            try:
                cached = self.forward(Plan(0, slots, starts, ends - starts, ends - starts, fed))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # anything may go wrong in code that expects another cache
                raise ValueError(
                    f"{self._name} ({kind}) does not run with a slot cache: {error!r}"
                ) from error
            expected = plain[starts[-1] : ends[-1]]
            off = (cached[-len(expected) :].float() - expected).norm()
            if not off <= 0.2 * (expected - expected.mean(-1, keepdim=True)).norm():
                raise ValueError(
                    f"{self._name} ({kind}) answers otherwise with a slot cache than without: its "
                    "layers place tokens, mask or remember in a way of their own"
                )
        return int(plain.shape[-1])


@dataclass(frozen=True)
class _Rows:
    """Where one pass reads and writes in the cache; the same for all layers of a device."""

    rows: slice | torch.Tensor
    """The slot of each row of the batch, [B]; a slice, and so a view, if they are neighbours."""
    slots: torch.Tensor
    positions: torch.Tensor
    """[N] each: where the keys and values of each token go."""
    real: torch.Tensor | None
    """[N]: the tokens among the B * T that are not padding; None if all are."""
    size: tuple[int, int]
    """Slots and positions that the cache must have."""

    def to(self, device: torch.device) -> _Rows:
        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor) else value

        return _Rows(
            move(self.rows), move(self.slots), move(self.positions), move(self.real), self.size
        )


class SlotCache(Cache):
    """Keys and values of every slot and layer, each [slots, heads, length, dim] on its device.

    Grown when a pass needs more, by half at least, up to [max_slots, max_length]: what an engine
    may need at most is far more than it mostly does. Unused places hold finite numbers.
    """

    def __init__(self, max_slots: int, max_length: int) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)  # never made: update is our own
        self._limits = (max_slots, max_length)
        self._storage: dict[tuple[int, bool], torch.Tensor] = {}
        self._rows: dict[torch.device, _Rows] = {}

    def point(self, rows: _Rows) -> None:
        """Says where the next pass reads and writes."""
        self._rows = {rows.slots.device: rows}

    def take_over(self, copies: list[tuple[int, int, int]], *, clear: Indices) -> None:
        """Forgets what some slots hold; then copies the first n positions of slot a to slot b, for
        each (a, b, n), from what a held before."""
        slots = max((b for _, b, _ in copies), default=-1) + 1
        for key, held in self._storage.items() if copies or len(clear) else ():
            taken = [held[a, :, :n].clone() for a, _, n in copies]
            inside = torch.from_numpy(clear[clear < len(held)])
            held.index_fill_(0, inside.to(held.device), 0)
            if slots > len(held):
                held = self._storage[key] = self._grown(held, held, (slots, held.shape[2]))
            for (_, b, n), what in zip(copies, taken, strict=True):
                held[b, :, :n] = what

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values of a pass, [B, heads, T, dim]; returns all that its rows may see,
        [B, heads, end, dim]."""
        device = key_states.device
        if (rows := self._rows.get(device)) is None:
            rows = self._rows[device] = next(iter(self._rows.values())).to(device)
        keys, values = (
            self._write(rows, (layer_idx, is_value), new)
            for is_value, new in ((False, key_states), (True, value_states))
        )
        return keys, values

    def _write(self, rows: _Rows, key: tuple[int, bool], new: torch.Tensor) -> torch.Tensor:
        held = self._storage.get(key)
        if held is None or held.shape[0] < rows.size[0] or held.shape[2] < rows.size[1]:
            held = self._storage[key] = self._grown(held, new, rows.size)
        new = new.transpose(1, 2).flatten(0, 1)
        held[rows.slots, :, rows.positions] = new if rows.real is None else new[rows.real]
        return held[rows.rows, :, : rows.size[1]]

    def _grown(
        self, held: torch.Tensor | None, new: torch.Tensor, needed: tuple[int, int]
    ) -> torch.Tensor:
        old = (0, 0) if held is None else (held.shape[0], held.shape[2])
        slots, length = (
            have if need <= have else max(need, min(have * 3 // 2, limit))
            for have, need, limit in zip(old, needed, self._limits, strict=True)
        )
        length = -(-length // LENGTH_STEP) * LENGTH_STEP
        grown = new.new_zeros(slots, new.shape[1], length, new.shape[3])
        if held is not None:
            grown[: old[0], :, : old[1]] = held
        return grown


def _sources(plan: Plan) -> Indices:
    """For each chunk the slot that holds what comes before it, most often its own."""
    if not len(plan.sources):
        return plan.slots.astype(int)
    return np.where(plan.sources < 0, plan.slots, plan.sources).astype(int)


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
        padding = width * (len(groups[-1]) + 1) - tokens - length if groups else NO_LIMIT
        if padding > max(FREE_PADDING, (tokens + length) // 4):
            groups.append([])
            width, tokens = length, 0
        groups[-1].append(i)
        tokens += length
    return [np.sort(group) for group in groups]


def _context(config: Any) -> int:
    """Positions that the model was made for."""
    context = getattr(config, "max_position_embeddings", None) or NO_LIMIT
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond its original length it turns all positions of a batch at once, other sequences'
        # and cached ones too.
        context = rope.get("original_max_position_embeddings") or context
    return int(context)


def _windows(config: Any, name: str, length: int) -> dict[str, int | None]:
    """How many positions each kind of layer sees, itself included; None for all of `length`."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # then a window, if there is one, is every layer's
        kinds = ["full_attention" if window is None else "sliding_attention"]
    if others := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise ValueError(
            f"{name} has layers of type {', '.join(others)}, which a slot cache cannot hold: use a "
            "model whose layers are all full_attention or sliding_attention"
        )
    seen = window if window is not None and window < length else None
    return {kind: seen if kind == "sliding_attention" else None for kind in sorted(set(kinds))}
