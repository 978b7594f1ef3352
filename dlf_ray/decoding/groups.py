"""The rows of a step that are fused in one pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from dlf_ray.config import BASE, LARGE
from dlf_ray.decoding.fusion import Fused, aim, weigh, widened
from dlf_ray.decoding.stream import Stream
from dlf_ray.errors import is_out_of_memory
from dlf_ray.params import FusionParams
from dlf_ray.rules import RULES, Aims, Rule, Select


class Kind(NamedTuple):
    """What the rows of one pass have in common; step, bounds and weights are each row's own."""

    rule: Rule
    select: Select
    experts: tuple[str, ...]
    alone: str | None

    @classmethod
    def of(cls, fusion: FusionParams) -> Kind:
        if not fusion.experts:  # nothing to weigh
            return cls("grid", "paper", (), fusion.alone)
        # Where weights are not searched for, there is nothing to select.
        select = fusion.select if RULES[fusion.rule].searches else "paper"
        return cls(fusion.rule, select, fusion.experts, None)


@dataclass
class Group:
    """The rows of a step that are fused in one pass, [R] of them."""

    kind: Kind
    owners: list[Stream] = field(default_factory=list)
    """[R]: whose each row is."""
    logits: dict[str, torch.Tensor] = field(default_factory=dict)
    """[R, V] of each model, as they arrive."""
    shared: torch.Tensor | None = None
    """The ids that its models fuse on, where these are not all: [S]."""
    aims: Aims | None = None
    error: str | None = None
    """Why its rows cannot be fused."""

    @property
    def models(self) -> tuple[str, ...]:
        if self.kind.alone:
            return (self.kind.alone,)
        return (LARGE, BASE, *self.kind.experts) if self.kind.experts else (LARGE,)

    @property
    def sequences(self) -> dict[Stream, None]:
        return dict.fromkeys(self.owners)

    def take(self, model: str, logits: torch.Tensor) -> None:
        """One model's rows; the last small model's settle what the large one is to aim at."""
        self.logits[model] = logits
        small = self.models[1:]
        if model in small and all(name in self.logits for name in small):
            try:
                self._aim()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self.aims = None  # `fuse` tries fewer rows at once

    def _aim(self) -> None:
        self.aims = aim(
            self._among_shared(BASE),
            [self._among_shared(name) for name in self.kind.experts],
            rule=self.kind.rule,
            select=self.kind.select,
            weights=self._numbers("weights") if RULES[self.kind.rule].given else None,
        )

    def fuse(self) -> Fused:
        """Where there is no memory for all rows at once, for one half after the other."""
        logits = self.logits[self.models[0]]
        if not self.kind.experts:  # one model alone: nothing to fuse
            logits = logits.float()
            none = logits.new_zeros(len(logits))
            return Fused(logits, none[:, None][:, :0], none, logits.new_zeros(len(logits), 2))
        try:
            if self.aims is None:
                self._aim()
            assert self.aims is not None
            steps, bounds = self._numbers("step"), self._numbers("bounds")
            own = self._among_shared(LARGE)
            fused = weigh(own, self.aims, rule=self.kind.rule, step=steps, bounds=bounds)
            return fused if self.shared is None else widened(fused, logits, self.shared)
        except Exception as error:
            if len(self.owners) == 1 or not is_out_of_memory(error):
                raise
            self.aims = None
        middle = len(self.owners) // 2
        halves = [self._part(slice(middle)).fuse(), self._part(slice(middle, None)).fuse()]
        return Fused(*(torch.cat(parts) for parts in zip(*halves, strict=True)))

    def _among_shared(self, model: str) -> torch.Tensor:
        """A model's logits on the ids that are fused, [R, S]."""
        logits = self.logits[model]
        return logits if self.shared is None else logits[:, self.shared]

    def _part(self, rows: slice) -> Group:
        logits = {model: each[rows] for model, each in self.logits.items()}
        return Group(self.kind, self.owners[rows], logits, self.shared)

    def _numbers(self, name: str) -> Any:
        """A number of each row's fusion, [R, ...]; the bare one where all are equal."""
        values = [getattr(owner.fusion, name) for owner in self.owners]
        if all(value == values[0] for value in values):
            return values[0]
        return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Decided:
    """What a step decided for the rows of a group."""

    tokens: list[int]
    weights: list[list[float]]
    kl: list[list[float]]
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)
