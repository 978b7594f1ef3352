"""A request under way, as the coordinator keeps it: a sequence with its client and its text."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from dlf_ray.decoding.losses import Deaths
from dlf_ray.decoding.sampling import Penalties
from dlf_ray.decoding.scheduler import Sequence
from dlf_ray.decoding.structured import Shape
from dlf_ray.decoding.text import TextStream
from dlf_ray.metrics import Span
from dlf_ray.params import FusionParams


@dataclass(eq=False)
class Stream(Sequence):
    """A sequence, with its client and its text so far."""

    client: str = ""
    seed: int = 0
    text: TextStream | None = None
    """From its first slot on."""
    deaths: dict[str, Deaths] = field(default_factory=dict)
    """Losses of a model while it computed this."""
    penalties: Penalties | None = None
    """From its first slot on, if anything changes its logits."""
    ends: frozenset[int] = frozenset()
    """The tokens that end its text, of the models that it asks for."""
    shape: Shape | None = None
    """What its answer has to look like."""
    arrived: float = field(default_factory=time.time)
    started: bool = False
    """Whether it has had a slot yet."""
    emitted: float | None = None
    """When its newest token left."""
    spans: list[Span] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int]:
        return self.client, self.request.id

    @property
    def fusion(self) -> FusionParams:
        """The request's, without the experts that are lost to it for now."""
        fusion = self.request.fusion
        if all(name in self.computed for name in fusion.experts):
            return fusion
        return fusion.without([name for name in fusion.experts if name not in self.computed])

    def rest(self, count: int) -> tuple[int, ...]:
        """What is still to be scored of the continuation, at most `count` tokens."""
        return self.request.continuation[self.scored : self.scored + count]

    def asked(self, given: bool) -> int | None:
        """How many top log-probabilities a token of the continuation, or a generated one, comes
        with; None where not even its own was asked for."""
        sampling = self.request.sampling
        return (sampling.prompt_logprobs or 0) if given else sampling.logprobs
