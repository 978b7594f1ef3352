"""What is compared on what: an experiment, its tasks and methods, and the jobs they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec

from dlf_ray.config import BASE, LARGE, Family, converted, read_yaml
from dlf_ray.engine.options import FusionOptions, resolve
from dlf_ray.evaluation.dialogue import Asking
from dlf_ray.evaluation.tasks import Item, Task, get_task, own_task
from dlf_ray.params import FusionParams, SamplingParams
from dlf_ray.rules import RULES, SELECTS

DYNAMIC = "dynamic"
"""The method of the rules that search for weights; every other rule is a method by its name."""


METHODS = ", ".join(
    [
        "large, base, expert:NAME",
        *(f"{name}, {name}:WEIGHT" for name, rule in RULES.items() if rule.given),
        *(name for name, rule in RULES.items() if not rule.given and not rule.searches),
        DYNAMIC,
        *(f"{DYNAMIC}:{select}" for select in SELECTS),
        "each but the first three with @NAME+NAME for some of the experts only",
    ]
)


class TaskSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One task of an experiment: a benchmark by its name, or own data with a metric."""

    task: str | None = None
    """The name of a benchmark; without it, `data` is the user's own."""
    data: str | None = None
    """A local file or folder, or a Hugging Face data set; `{family}`: the family file's folder."""
    name: str | None = None
    """What the results call it; else the benchmark's name or the file's."""
    prompt_template: str | None = None
    metric: str = "exact_match"
    shots: int = 0
    limit: int | None = None
    max_tokens: int | None = None
    """The longest answer; the task's own if not given."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer; for own data."""

    def make(self, data: str | None) -> Task:
        """The task on `data`. Raises `ValueError` where neither or both kinds are named."""
        if self.task is None:
            if data is None:
                raise ValueError("a task needs the name of a benchmark (`task`), or own `data`")
            made = own_task(data, self.prompt_template, self.metric, stop=self.stop)
            if self.stop and made.kind != "generate":
                raise ValueError(f"`stop` ends what is generated; {self.metric} generates nothing")
        elif self.prompt_template is not None or self.metric != "exact_match" or self.stop:
            raise ValueError(
                f"`prompt_template`, `metric` and `stop` are for own data, not {self.task!r}"
            )
        else:
            made = get_task(self.task)
        made = replace(made, name=self.name or made.name)
        SamplingParams(max_tokens=self.max_tokens or made.max_tokens, stop=made.stop)  # or raises
        return made


class Experiment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to compare on what."""

    family: str
    """The family file."""
    tasks: tuple[TaskSpec, ...]
    methods: tuple[str, ...] = ("large", "base", "dynamic")
    """`{task}` in a name stands for the task's, where experts are called like tasks."""
    output: str
    """The folder of the results."""
    shots_for: Literal["large", "all"] = "all"
    """Whose prompt holds the examples."""
    upper_bound: str | None = None
    """The large model fully fine-tuned: a model to compare with, `{task}` for one of each task."""
    on_overflow: Literal["truncate", "skip"] = "truncate"
    """For prompts longer than the context: cut them from the left, or leave the item out."""
    apply_chat_template: bool = False
    """Put items as conversations, to each model by its own chat template. These three are
    lm-evaluation-harness's."""
    system_instruction: str | None = None
    """What the models are told first: in the system's message, or before the prompt."""
    fewshot_as_multiturn: bool | None = None
    """Examples as turns of their own, not in one message; so unless false, in a chat."""

    def __post_init__(self) -> None:
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ValueError("`fewshot_as_multiturn` needs `apply_chat_template`")

    @property
    def asking(self) -> Asking:
        """How items are put to the models."""
        multiturn = self.apply_chat_template and self.fewshot_as_multiturn is not False
        return Asking(self.apply_chat_template, self.system_instruction, multiturn)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Experiment:
        """Raises `ValueError` that lists what is valid where something is not."""
        return converted(raw, cls)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Experiment:
        """Reads an experiment file; a family file named in it is relative to it.

        Errors as in `Family.from_yaml`.
        """
        path = Path(path)
        try:
            made = cls.from_dict(read_yaml(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        family = path.parent / made.family
        output = str(Path(made.output).expanduser())
        return msgspec.structs.replace(
            made, family=str(family) if family.exists() else made.family, output=output
        )

    def with_family(self) -> Experiment:
        """The same with a family that is there: one called `demo` is trained where need be."""
        if self.family != "demo":
            return self
        from dlf_ray.training import demo  # imports transformers, so only where it is used

        return msgspec.structs.replace(self, family=str(demo.build() / "family.yaml"))


def method_options(method: str, family: Family) -> FusionOptions:
    """What a method's name stands for. Raises `ValueError`, listing the methods, for none."""
    name, _, listed = method.partition("@")
    kind, _, detail = name.partition(":")
    some = listed.split("+") if listed else list(family.experts)
    if kind == LARGE and not detail and not listed:
        return {"experts": []}
    if kind == BASE and not detail and not listed:
        return {"alone": BASE}
    if kind == "expert" and detail in family.experts and not listed:
        return {"alone": detail}
    if unknown := set(some) - set(family.experts):
        raise ValueError(f"{method!r} names {sorted(unknown)}; there are {list(family.experts)}")
    if kind in RULES and RULES[kind].given:
        try:
            weight = float(detail or 1.0)
        except ValueError:
            raise ValueError(f"{method!r}: the weight {detail!r} is not a number") from None
        return {"rule": kind, "experts": some, "weights": dict.fromkeys(some, weight)}
    if kind in RULES and not RULES[kind].searches and not detail:
        return {"rule": kind, "experts": some}
    if kind == DYNAMIC and (not detail or detail in SELECTS):
        rule = family.fusion.rule if RULES[family.fusion.rule].searches else "grid"
        options: FusionOptions = {"rule": rule, "experts": some}
        return {**options, "select": detail} if detail else options
    raise ValueError(
        f"unknown method {method!r}; there are {METHODS}, with NAME one of {list(family.experts)}"
    )


@dataclass(frozen=True)
class Job:
    """One task, to be answered by one method."""

    spec: TaskSpec
    task: Task
    items: Sequence[Item]
    method: str
    """As the experiment writes it."""
    family: Family
    model: str | None = None
    """What stands for the large model, if the method is the upper bound."""

    @cached_property
    def options(self) -> FusionOptions:
        if self.model:
            return {"alone": LARGE}
        return method_options(self.method.format(task=self.task.name), self.family)

    @cached_property
    def fusion(self) -> FusionParams:
        return resolve(self.family, self.options)

    def of(self, items: Iterable[Item]) -> Job:
        return replace(self, items=list(items))

    def key(self, item: Item) -> tuple[str, str, str]:
        """Of the item's row."""
        return self.task.name, self.method, item.id
