"""From a fused distribution to a token.

Randomness is a pure function of (seed, position, token id): a request draws the same tokens
whatever else is in its batch, and again after a crash, since no generator state has to survive.
Each token has noise of its own, and the one that wins is not moved by what else there is: logits
that differ in their last digits, as they do between batches, change a draw only where two tokens
are as near to each other as that, at any temperature.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dlf_ray.params import SamplingParams

CANDIDATES = 1024
"""The most probable tokens, which nearly always hold all that filters leave."""
CACHED = 2**16
"""Logits that a CPU works on together, so that what is made of them stays in its cache."""
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
"""The constants of SplitMix64, in int64."""


def noise_key(seed: int, position: int) -> int:
    """What the noise of a position of a sequence starts from, within int64 (Philox, a counter-based
    generator)."""
    return int(np.random.Philox(key=seed, counter=position).random_raw()) - 2**63


def noise(keys: Tensor, ids: Tensor) -> Tensor:
    """Exponentially distributed noise of each token, float64 [R, N] from int64 keys [R, 1] and
    token ids [N] or [R, N]: that of token i is made from output i of SplitMix64 (Steele, Lea and
    Flood 2014) with the key as its seed, in integers that are the same on every device."""
    state = (ids + 1) * GOLDEN + keys
    shifted = torch.empty_like(state)

    def mix(bits: int) -> None:  # state ^ (state >> bits), as if int64 had no sign
        torch.bitwise_right_shift(state, bits, out=shifted)
        state.bitwise_xor_(shifted.bitwise_and_(2 ** (64 - bits) - 1))

    mix(30)
    state.mul_(MIX[0])
    mix(27)
    state.mul_(MIX[1])
    mix(31)
    parts = state.bitwise_right_shift_(12).bitwise_and_(2**52 - 1)
    # the middles of 2^52 equal parts of (0, 1)
    return parts.double().add_(0.5).mul_(2.0**-52).log_().neg_()


class _Values:
    """A value for each of some tokens, on the device of the logits, kept up to date in place."""

    def __init__(self, values: Mapping[int, float]) -> None:
        self._values = dict(values)
        self._places = {token: place for place, token in enumerate(self._values)}
        self._changed: set[int] = set()
        self._tokens = torch.empty(0, dtype=torch.long)
        self._numbers = torch.empty(0)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, token: int) -> bool:
        return token in self._values

    def __setitem__(self, token: int, value: float) -> None:
        self._values[token] = value
        self._places.setdefault(token, len(self._places))
        self._changed.add(token)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The tokens and their values."""
        size = len(self._values)
        if self._tokens.device != device or len(self._tokens) < size:
            spare = [0] * size  # room to grow, so that few tokens need new tensors
            tokens, numbers = [*self._values, *spare], [*self._values.values(), *spare]
            self._tokens = torch.tensor(tokens, dtype=torch.long, device=device)
            self._numbers = torch.tensor(numbers, dtype=torch.float32, device=device)
        else:
            for token in self._changed:
                self._tokens[self._places[token]] = token
                self._numbers[self._places[token]] = self._values[token]
        self._changed.clear()
        return self._tokens[:size], self._numbers[:size]


class Penalties:
    """What changes one sequence's logits before they are sampled, as vLLM applies it.

    First the biases, and before `min_tokens` the tokens that would end the answer are barred; then
    the repetition penalty (Keskar et al. 2019) for tokens of prompt or answer, and the presence and
    frequency penalties (OpenAI's) for those of the answer. A token costs the same however long the
    prompt is, but for one look at the distinct tokens seen.
    """

    def __init__(
        self, params: SamplingParams, prompt: Collection[int], end_tokens: Collection[int]
    ) -> None:
        self._params = params
        self._barred = params.min_tokens
        ends = {*(() if params.ignore_eos else end_tokens), *params.stop_token_ids}
        self._ends = _Values(dict.fromkeys(ends, -torch.inf))
        self._biases = _Values(params.logit_bias)
        repeated = params.repetition_penalty != 1
        self._factors = _Values(
            dict.fromkeys(prompt, params.repetition_penalty) if repeated else {}
        )
        self._counts: Counter[int] = Counter()
        self._costs = _Values({})

    @classmethod
    def of(
        cls, params: SamplingParams, prompt: Sequence[int], end_tokens: Collection[int], vocab: int
    ) -> Penalties | None:
        """Those of a request, or None where nothing ever changes its logits.

        Tokens outside the `vocab` have no logits and are passed over.
        """
        penalised = params.presence_penalty or params.frequency_penalty
        repeated = params.repetition_penalty != 1
        if not (penalised or repeated or params.logit_bias or params.min_tokens):
            return None
        return cls(params, prompt, [token for token in end_tokens if 0 <= token < vocab])

    @property
    def idle(self) -> bool:
        """Whether the next token's logits stay as they are."""
        barred = self._barred > 0 and self._ends
        return not (barred or self._biases or self._factors or self._costs)

    def push(self, token: int) -> None:
        """One more token of the answer."""
        params = self._params
        self._barred -= 1
        if params.repetition_penalty != 1 and token not in self._factors:
            self._factors[token] = params.repetition_penalty
        if params.presence_penalty or params.frequency_penalty:
            self._counts[token] += 1
            cost = params.presence_penalty + params.frequency_penalty * self._counts[token]
            self._costs[token] = cost

    def apply(self, row: Tensor) -> None:
        """Changes the logits [V] of the next token in place."""
        if self._biases:
            tokens, biases = self._biases.on(row.device)
            row[tokens] += biases
        if self._barred > 0 and self._ends:
            tokens, minus = self._ends.on(row.device)
            row[tokens] = minus
        if self._factors:
            tokens, factors = self._factors.on(row.device)
            held = row[tokens]
            row[tokens] = torch.where(held > 0, held / factors, held * factors)
        if self._costs:
            tokens, costs = self._costs.on(row.device)
            row[tokens] -= costs


def penalised(logits: Tensor, penalties: Sequence[Penalties | None]) -> Tensor:
    """Logits [R, V] with each row's penalties; a new tensor where anything changes."""
    changed = logits
    for row, own in enumerate(penalties):
        if own is not None and not own.idle:
            if changed is logits:
                changed = logits.clone()
            own.apply(changed[row])
    return changed


def _batched(rows: list[int], size: int) -> Iterator[list[int]]:
    """The rows, at most `size` at a time."""
    return (rows[at : at + size] for at in range(0, len(rows), size))


def top_logprobs(logprobs: Tensor, counts: Sequence[int]) -> list[list[tuple[int, float]]]:
    """For each row of log-probabilities [R, V], its `counts[row]` highest with their tokens."""
    if not (most := max(counts, default=0)):
        return [[] for _ in counts]
    values, ids = logprobs.topk(min(most, logprobs.shape[-1]), dim=-1)
    return [
        list(zip(row_ids[:count], row_values[:count], strict=True))
        for row_ids, row_values, count in zip(ids.tolist(), values.tolist(), counts, strict=True)
    ]


def sample(logits: Tensor, params: Sequence[SamplingParams], keys: Sequence[int]) -> list[int]:
    """A token per row of float32 `logits` [R, V], by the row's own parameters and `noise_key`.

    Temperature first, then min-p, top-k, and top-p over what is left, as vLLM does. Of what is left
    the token with the highest probability / noise is drawn: the Gumbel-max trick, as exponentials.
    """
    tokens: list[int] = logits.argmax(-1).tolist()
    vocab = logits.shape[-1]
    plain: list[int] = []
    filtered: list[int] = []
    for row, own in enumerate(params):
        if own.temperature > 0:
            filters = 0 < own.top_k < vocab or own.top_p < 1 or own.min_p > 0
            (filtered if filters else plain).append(row)

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    def drawn(rows: list[int], weights: Tensor, ids: Tensor) -> Tensor:
        own = torch.tensor([keys[row] for row in rows], device=logits.device)[:, None]
        return (weights / noise(own, ids)).argmax(-1)

    def take(rows: list[int], chosen: Tensor) -> None:
        for row, token in zip(rows, chosen.tolist(), strict=True):
            tokens[row] = token

    every = torch.arange(vocab, device=logits.device)
    size = len(plain) if logits.is_cuda else CACHED // vocab
    for rows in _batched(plain, max(1, size)):
        weights = _weights(logits[rows], column([params[row].temperature for row in rows]))
        take(rows, drawn(rows, weights, every))
    # the few most probable tokens, then all of them for the rows where these were not enough
    for size in sorted({min(CANDIDATES, vocab), vocab}):
        if not filtered:
            break
        settings = [params[row] for row in filtered]
        weights, ids, enough = _filtered(
            logits[filtered],
            size,
            temperature=column([each.temperature for each in settings]),
            top_k=column([each.top_k or vocab for each in settings]),
            top_p=column([each.top_p for each in settings]),
            min_p=column([each.min_p for each in settings]),
        )
        chosen = ids.gather(-1, drawn(filtered, weights, ids)[:, None])[:, 0]
        done = enough.tolist()
        take([row for row, yes in zip(filtered, done, strict=True) if yes], chosen[enough])
        filtered = [row for row, yes in zip(filtered, done, strict=True) if not yes]
    return tokens


def _weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """exp(logits / temperature) of [R, V] and [R, 1], relative to the highest, in float64."""
    scaled = logits.double()
    scaled -= scaled.amax(-1, keepdim=True)  # the highest stays finite, however cold
    return scaled.div_(temperature).exp_()


def _filtered(
    logits: Tensor,  # [R, V], float32
    size: int,
    *,
    temperature: Tensor,  # [R, 1], as the others
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of the `size` most probable tokens, 0 for what is cut, their ids, both [R, size],
    and whether nothing else can be left [R]. At least one token of each row stays."""
    vocab = logits.shape[-1]
    ids = _highest(logits, size)
    weights = _weights(logits.gather(-1, ids), temperature)
    rank = torch.arange(size, device=logits.device)
    low = weights < min_p  # relative to the most probable one, as weights are
    cut = low | (rank >= top_k)
    complete = cut[:, -1:] | (top_k <= size) if size < vocab else torch.ones_like(top_k).bool()
    weights = weights.masked_fill_(cut, 0.0)
    # the mass that top-p is a share of: from outside, too, where min-p and top-k leave any there
    mass = weights.sum(-1, keepdim=True)
    if size < vocab and not complete.all():
        every = _weights(logits, temperature)
        mass = torch.where(complete, mass, every.masked_fill_(every < min_p, 0.0).sum(-1)[:, None])
    before = weights.cumsum(-1) - weights  # the mass of everything more probable
    beyond = (before >= top_p * mass) & (rank > 0) & (top_p < 1)
    enough = complete | ((top_k >= vocab) & beyond[:, -1:])
    return weights.masked_fill_(beyond, 0.0), ids, enough[:, 0]


def _highest(logits: Tensor, size: int) -> Tensor:
    """The ids [R, size] of the highest logits, in descending order and equal ones by their ids."""
    # integers in the order of the floats, made distinct by the id: there is one answer, and it is
    # found faster than that for floats
    bits = (logits.float() + 0.0).view(torch.int32)  # -0.0 is 0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    last = logits.shape[-1] - 1
    keys = ordered | torch.arange(last, -1, -1, device=logits.device)
    if size < logits.shape[-1]:
        highest = keys.topk(size).values
    else:
        highest = keys.sort(dim=-1, descending=True).values
    return last - (highest & 0xFFFFFFFF)
