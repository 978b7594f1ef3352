"""What the loss of a model means for the requests under way, and how it is got over."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dlf_ray.messages import LossReason, Lost, Recovery

IN_A_ROW = 2
"""Losses of a model with no logits of it in between, after which what runs is suspected."""
DEATHS = 4
"""A model that was lost so often at the same tokens of a sequence, at last of it alone, is lost
because of them; fewer may be bad luck."""

log = logging.getLogger("dlf_ray")
Verdict = Literal["wait", "fewer", "fail"]


@dataclass(frozen=True)
class Suspects:
    """What a model was computing when it was lost."""

    count: int
    highest_slot: int
    """Memory that ran out in a high slot may be enough for the lowest."""
    deaths: int
    """How often it was lost at the same tokens of one of them, the most of all."""


@dataclass(frozen=True)
class Deaths:
    """Losses of a model that may all be due to the same tokens of a sequence."""

    start: int
    stop: int
    """The positions that the model was computing in every one of them."""
    count: int = 1

    def again(self, start: int, stop: int) -> Deaths:
        """One more, at these positions."""
        start_, stop_ = max(start, self.start), min(stop, self.stop)
        return Deaths(start_, stop_, self.count + 1) if start_ < stop_ else Deaths(start, stop)


class Losses:
    """The losses of models that are not over, and those that are."""

    def __init__(self, recovered: Callable[[Recovery], None]) -> None:
        """`recovered` hears of each loss that is over."""
        self.recoveries: list[Recovery] = []
        self._recovered = recovered
        self._open: dict[str, tuple[LossReason, float]] = {}
        """Why and when each model was lost that is not computing again yet."""
        self._in_a_row: Counter[str] = Counter()
        """How often each model was lost since its logits were last used."""

    def lost(self, model: str, loss: Lost, suspects: Suspects) -> Verdict:
        """What becomes of the sequences that were being computed when the model was lost; where
        there are none, nobody is to blame.

        They wait until it is back; or fewer of them are to run then, since together they are more
        than its memory holds, or one of them may be what kills it; or the only one left fails.
        """
        if model not in self._open:
            log.warning("model %r is lost: %s", model, loss.reason)
            self._open[model] = loss.reason, time.perf_counter()
        if not suspects.count:
            return "wait"
        self._in_a_row[model] += 1
        memory = loss.reason == "out of memory"
        if not memory and self._in_a_row[model] < IN_A_ROW:
            return "wait"
        if suspects.count > 1:
            return "fewer"
        # Memory has been cleared, so that even the only one may find enough in the lowest slot.
        if memory:
            again = self._in_a_row[model] < IN_A_ROW or suspects.highest_slot > 0
        else:
            again = suspects.deaths < DEATHS
        return "fewer" if again else "fail"

    def computed(self, model: str) -> None:
        """Logits of the model were used: it is well."""
        self._in_a_row[model] = 0
        self.over(model)

    def over(self, model: str) -> None:
        if loss := self._open.pop(model, None):
            reason, began = loss
            recovery = Recovery(model, reason, time.perf_counter() - began)
            self.recoveries.append(recovery)
            log.info("model %r recovered in %.1f s (%s)", model, recovery.seconds, reason)
            self._recovered(recovery)

    def forget(self, model: str) -> None:
        """The model has been taken out of the family."""
        self._open.pop(model, None)
        self._in_a_row.pop(model, None)
