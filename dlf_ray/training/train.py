"""Training of one causal language model, in plain torch.

A model, batches of token ids with a mask of what is to be learned, a learning rate that warms up,
stays and decays: what the demo needs for its whole family, and what one expert needs. Nothing here
knows a task, a file format or a progress bar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

Sample = tuple[Sequence[int], Sequence[int]]
"""The token ids of a prompt, and those of the answer that is to be learned (its eos included)."""


class Batch(NamedTuple):
    """Rows of equal length."""

    tokens: Tensor
    """Token ids, `[rows, length]`."""
    learned: Tensor
    """Which of them the model learns to predict, bool `[rows, length]`; the first never is."""


def text_batches(stream: Tensor, rows: int, length: int) -> Iterator[Batch]:
    """Cuts a stream of token ids `[n]` into full batches in which everything is learned."""
    for tokens in stream[: len(stream) // (rows * length) * rows * length].view(-1, rows, length):
        yield Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))


def answer_batches(samples: Sequence[Sample], rows: int, seed: int) -> Iterator[Batch]:
    """Batches of samples, of which only the answers are learned; without end, shuffled anew each
    time round."""
    shuffle = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        while len(order) < rows:
            order += torch.randperm(len(samples), generator=shuffle).tolist()
        picked, order = [samples[i] for i in order[:rows]], order[rows:]
        length = max(len(prompt) + len(answer) for prompt, answer in picked)
        tokens = torch.zeros(rows, length, dtype=torch.long)
        learned = torch.zeros(rows, length, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(picked):
            # What follows the end changes nothing before it, so any id can fill the row.
            end = len(prompt) + len(answer)
            tokens[row, :end] = torch.tensor([*prompt, *answer])
            learned[row, len(prompt) : end] = True
        yield Batch(tokens, learned)


def train(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float,
    matrix_lr: float | None = None,
    warmup: float = 0.05,
    decay: float = 0.5,
    on_step: Callable[[float], None] = lambda loss: None,
) -> None:
    """Trains `model` in place for `steps` batches and leaves it in eval mode.

    AdamW at `lr` moves all parameters, or, with `matrix_lr`, all but the matrices inside the
    layers, which Muon (Jordan et al. 2024) then moves at that rate: from scratch it needs a
    fraction of the steps. Both rates rise over the first `warmup` of the steps and fall to zero
    over the last `decay`. `on_step` gets the loss (nats per learned token) of every step.
    """
    optimizers = _optimizers(model, lr, matrix_lr)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / (warmup * steps + 1), (steps - step) / (decay * steps + 1))

    schedules = [torch.optim.lr_scheduler.LambdaLR(one, factor) for one in optimizers]
    model.train()
    for _, batch in zip(range(steps), batches, strict=False):
        loss = answer_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        model.zero_grad()
        on_step(loss.item())
    model.eval()  # type: ignore[no-untyped-call]


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy in nats, averaged over the learned tokens of the batch (a scalar)."""
    logits = model(input_ids=batch.tokens, use_cache=False).logits[:, :-1]
    learned = batch.learned[:, 1:]
    return functional.cross_entropy(logits[learned].float(), batch.tokens[:, 1:][learned])


def _optimizers(
    model: PreTrainedModel, lr: float, matrix_lr: float | None
) -> list[torch.optim.Optimizer]:
    if matrix_lr is None:
        return [torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)]
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[no-untyped-call]
    outer = {id(p) for end in ends for p in end.parameters()}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in outer]
    rest = [p for p in model.parameters() if p.ndim != 2 or id(p) in outer]
    return [torch.optim.Muon(matrices, matrix_lr), torch.optim.AdamW(rest, lr, weight_decay=0.0)]
