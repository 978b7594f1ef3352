"""How one request is sampled, shaped and fused: its parameters, and the limits to them.

No request, whatever its numbers, may hold up others: what is beyond a limit is refused here, by
name, wherever a request is made.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from dlf_ray.rules import Rule, Select

MAX_LOGPROBS = 20
MAX_STOPS, MAX_STOP_LENGTH = 64, 1024
"""Stop strings of a request, and characters of each: they are looked for at every token."""
MAX_STOP_TOKENS = 1024
MAX_BIASES = 1024
MAX_SHAPE, MAX_REGEX = 2**16, 2**12
"""Characters of a JSON schema or a grammar, and of a regular expression, that answers have to fit:
they are compiled before a request runs."""
MAX_NESTING = 64
"""Objects and arrays inside each other in such a schema, as in vLLM."""
TOO_DEEP = f"`structured_outputs.json` nests more than {MAX_NESTING} levels deep"
MAX_CHOICES, MAX_CHOICE_LENGTH = 1024, 1024
MAX_CANDIDATES = 256
"""Of a step's search for weights, over the bounds of all experts of a request together."""
MAX_WEIGHT = 100.0
"""The size of weights and of bounds: float32 has room for any logits times it."""
PAPERS_CANDIDATES = 21
"""Those of the paper's grid, which every expert may have however many there are."""
NOTHING: tuple[object, ...] = (None, False, ())


def check_candidates(bounds: Sequence[tuple[float, float]], step: float) -> None:
    """Raises `ValueError` where a search would try too many weights: all wait for it at each
    step."""
    count = sum((high - low) / step + 1 for low, high in bounds)
    most = max(MAX_CANDIDATES, PAPERS_CANDIDATES * len(bounds))
    if count > most + 0.5:
        raise ValueError(
            f"`bounds` and `step` make {count:.3g} candidates; at most {most} are tried: use a "
            "larger `step`, narrower `bounds` or fewer `experts`"
        )


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What shape the answer must have: exactly one of these, by vLLM's names for them."""

    json: str | dict[str, Any] | None = None
    """A JSON schema, as text or as a mapping."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    """The whole answer matches it."""
    choice: tuple[str, ...] = ()
    """The answer is one of these."""
    grammar: str | None = None
    """A context-free grammar, in Lark's or GBNF's (llama.cpp's EBNF) notation."""

    def __post_init__(self) -> None:
        given = [name for name in self.__struct_fields__ if getattr(self, name) not in NOTHING]
        if len(given) != 1:
            listed = ", ".join(self.__struct_fields__)
            raise ValueError(
                f"`structured_outputs` takes exactly one of {listed}, not {given or 'none'}"
            )
        schema = self.json if isinstance(self.json, str) else _json_text(self.json)
        texts = {"json": schema, "grammar": self.grammar or "", "regex": self.regex or ""}
        for name, text in texts.items():
            most = MAX_REGEX if name == "regex" else MAX_SHAPE
            if len(text) > most:
                raise ValueError(
                    f"`structured_outputs.{name}` has {len(text)} characters; at most {most} are "
                    "taken"
                )
        if _nesting(schema) > MAX_NESTING:
            raise ValueError(TOO_DEEP)
        if len(self.choice) > MAX_CHOICES:
            raise ValueError(
                f"`structured_outputs.choice` has {len(self.choice)} entries; at most "
                f"{MAX_CHOICES} are taken"
            )
        if not all(0 < len(each) <= MAX_CHOICE_LENGTH for each in self.choice):
            raise ValueError(
                f"each of `structured_outputs.choice` must have 1 to {MAX_CHOICE_LENGTH} characters"
            )


def _json_text(schema: dict[str, Any] | None) -> str:
    """A schema as text. Raises `ValueError` where it cannot be sent."""
    if schema is None:
        return ""
    try:
        msgspec.msgpack.encode(schema)  # which has room for fewer numbers than JSON
        return msgspec.json.encode(schema).decode()
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"`structured_outputs.json` is no JSON schema: {error}") from None


def _nesting(text: str) -> int:
    """How many objects and arrays are inside each other in a JSON text."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    steps = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", bare))
    return max(itertools.accumulate(steps), default=0)


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How tokens are drawn from the fused distribution; the names are vLLM's.

    The default is greedy, as in the paper.
    """

    max_tokens: int = 16
    """0 generates nothing: only a prompt or a continuation is scored."""
    min_tokens: int = 0
    """Before so many tokens, nothing ends the text."""
    temperature: float = 0.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    """Keep tokens at least so probable as this times the most probable one."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of generated tokens."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of generated tokens, once for each time they were generated."""
    repetition_penalty: float = 1.0
    """Logits of tokens of the prompt or the answer are divided by it, or multiplied if negative."""
    logit_bias: dict[int, float] = {}
    """Added to the logits of single tokens."""
    seed: int | None = None
    """The same seed draws the same tokens, whatever else is in the batch."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Give the log-probability of each generated token and of so many most probable ones, under
    the fused distribution before temperature and penalties."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first."""
    structured_outputs: StructuredOutputs | None = None
    """The answer has this shape: tokens that lead out of it have no probability."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise ValueError(f"`stop` is a list of strings; write stop=[{self.stop!r}]")
        if any(not text for text in self.stop):
            raise ValueError("`stop` holds an empty string, which would end every text at once")
        if self.max_tokens < 0:
            raise ValueError(f"`max_tokens` must be 0 or more, not {self.max_tokens}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"`min_tokens` must be within 0 and `max_tokens`, not {self.min_tokens}"
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"`top_k` must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"`min_p` must be within 0 and 1, not {self.min_p}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"`{name}` must be within -2 and 2, not {getattr(self, name)}")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(
                f"`repetition_penalty` must be within 0.01 and 100, not {self.repetition_penalty}"
            )
        if not all(-100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise ValueError("`logit_bias` must be within -100 and 100 for each token")
        for name, most in (
            ("stop", MAX_STOPS),
            ("stop_token_ids", MAX_STOP_TOKENS),
            ("logit_bias", MAX_BIASES),
        ):
            if len(getattr(self, name)) > most:
                raise ValueError(
                    f"`{name}` has {len(getattr(self, name))} entries; at most {most} are taken"
                )
        if any(len(text) > MAX_STOP_LENGTH for text in self.stop):
            raise ValueError(f"`stop` holds a string longer than {MAX_STOP_LENGTH} characters")
        for name in ("logprobs", "prompt_logprobs"):
            if not 0 <= (getattr(self, name) or 0) <= MAX_LOGPROBS:
                raise ValueError(
                    f"`{name}` must be within 0 and {MAX_LOGPROBS}, not {getattr(self, name)}"
                )
        if self.ignore_eos and self.structured_outputs is not None:
            raise ValueError(
                "`ignore_eos` goes against `structured_outputs`, whose shape includes its end"
            )
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"`seed` must be in [0, 2**64), not {self.seed}")


class FusionParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How one request is fused: the family's settings with the request's own on top.

    Complete and hashable, so that a step fuses all rows of equal parameters at once.
    """

    rule: Rule
    select: Select
    step: float
    experts: tuple[str, ...]
    """The experts that take part, in the order of the family; none leaves the large model alone."""
    bounds: tuple[tuple[float, float], ...]
    """[low, high] of the weight of each of `experts`."""
    weights: tuple[float, ...] = ()
    """For a rule that is given weights: that of each of `experts`."""
    alone: str | None = None
    """One model of the family answers by itself, unfused: what comparisons need."""

    @property
    def models(self) -> tuple[str, ...]:
        """The models that must compute for this fusion, first to last."""
        if self.alone:
            return (self.alone,)
        return ("large", "base", *self.experts) if self.experts else ("large",)

    def without(self, lost: Collection[str]) -> FusionParams:
        """The same fusion over the other experts."""
        kept = [at for at, name in enumerate(self.experts) if name not in lost]
        return msgspec.structs.replace(
            self,
            experts=tuple(self.experts[at] for at in kept),
            bounds=tuple(self.bounds[at] for at in kept),
            weights=tuple(self.weights[at] for at in kept) if self.weights else (),
        )
