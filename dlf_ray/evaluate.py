"""Methods side by side on the same items: tasks in, rows of results out, resumable at any item.

An experiment names a family, tasks and methods. Every item is answered by every method, by
generation or by the likelihood of its choices under the fused distribution, and each answer becomes
one row of `results`; what a folder holds already is not computed again.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import msgspec

from dlf_ray.config import BASE, LARGE, Family, Select, converted, read_yaml
from dlf_ray.frontend import BaseEngine, EngineError, FusionOptions, Output, resolve
from dlf_ray.messages import SamplingParams
from dlf_ray.results import UPPER_BOUND, Results
from dlf_ray.tasks import Choice, Item, Response, Scores, Task, get_task, own_task

SELECTS: tuple[Select, ...] = ("paper", "strongest", "blend")
METHODS = (
    "large, base, expert:NAME, static, static:WEIGHT, dynamic, "
    + ", ".join(f"dynamic:{select}" for select in SELECTS)
    + ", each of the last with @NAME+NAME for some of the experts only"
)
LOG_EVERY_S = 10.0
RESTARTS = 3
"""Engines that may die one after the other without an answer in between."""


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

    def make(self, data: str | None) -> Task:
        """The task on `data`. Raises `ValueError` where neither or both kinds are named."""
        if self.task is None:
            if data is None:
                raise ValueError("a task needs the name of a benchmark (`task`), or own `data`")
            made = own_task(data, self.prompt_template, self.metric)
        elif self.prompt_template is not None or self.metric != "exact_match":
            raise ValueError(f"`prompt_template` and `metric` are for own data, not {self.task!r}")
        else:
            made = get_task(self.task)
        return replace(made, name=self.name or made.name)


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


@dataclass(frozen=True)
class Answer:
    """One item, answered by one method."""

    item: Item
    response: Response
    scores: Scores
    output: Output
    """What was generated; empty for a likelihood."""
    seconds: float
    """Since the answer before it: its share of the time on the clock."""
    tokens: int
    cut: bool = False
    """Whether a prompt did not fit the context and lost its beginning."""


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
    if kind == "static":
        try:
            weight = float(detail or 1.0)
        except ValueError:
            raise ValueError(f"{method!r}: the weight {detail!r} is not a number") from None
        return {"rule": "static", "experts": some, "weights": dict.fromkeys(some, weight)}
    if kind == "dynamic" and (not detail or detail in SELECTS):
        rule = "grid" if family.fusion.rule == "static" else family.fusion.rule
        options: FusionOptions = {"rule": rule, "experts": some}
        for select in SELECTS:
            if detail == select:
                options["select"] = select
        return options
    raise ValueError(
        f"unknown method {method!r}; there are {METHODS}, with NAME one of {list(family.experts)}"
    )


def answers(
    engine: BaseEngine,
    task: Task,
    items: Sequence[Item],
    options: FusionOptions,
    *,
    max_tokens: int | None = None,
    shots_for: Literal["large", "all"] = "all",
    on_overflow: Literal["truncate", "skip"] = "truncate",
) -> Iterator[Answer]:
    """Answers all items together, greedily or by likelihood; yields each as soon as it is there.

    An item that fails, or is left out for its length, has `output.error` and no scores.
    """
    solve = _generated if task.kind == "generate" else _judged
    longest = max_tokens or task.max_tokens
    prompts = _Prompts(engine, shots_for, on_overflow)
    before = time.perf_counter()
    for item, response, output, tokens in solve(
        engine, items, options, prompts, longest, task.stop
    ):
        now = time.perf_counter()
        scores = {} if output.error else task.score(item, response)
        cut = item.id in prompts.cut
        yield Answer(item, response, scores, output, now - before, tokens, cut)
        before = now


class _Prompts:
    """Token ids of every model's prompt for an item, cut to its context."""

    def __init__(self, engine: BaseEngine, shots_for: str, on_overflow: str) -> None:
        self.engine = engine
        self.shots_for = shots_for
        self.skip = on_overflow == "skip"
        self.cut: set[str] = set()
        """Items whose prompt did not fit."""

    def of(
        self, item: Item, continuation: str, room: int
    ) -> tuple[dict[str, list[int]], list[int]]:
        """Each model's prompt, and the continuation's tokens. Raises `ValueError` to skip."""
        prompts, rest = {}, []
        lengths = self.engine.limits.lengths
        texts = {
            name: item.full_prompt if name == LARGE or self.shots_for == "all" else item.prompt
            for name in lengths
        }
        pairs = {text: self._encode(text, continuation) for text in set(texts.values())}
        rest = pairs[texts[LARGE]][1]
        for name, limit in lengths.items():
            ids = pairs[texts[name]][0]
            # The last token of a continuation is not computed; an answer needs some room.
            space = limit + 1 - len(rest) if rest else limit - min(room, limit // 2)
            if len(ids) > space:
                if self.skip or space < 1:
                    raise ValueError(
                        f"skipped: {len(ids) + len(rest)} tokens, of which model {name!r} takes "
                        f"{space + len(rest)}"
                    )
                ids = ids[-space:]
                self.cut.add(item.id)
            prompts[name] = ids
        return prompts, rest

    def _encode(self, text: str, continuation: str) -> tuple[list[int], list[int]]:
        if continuation:
            return self.engine.tokenize_pair(text, continuation)
        return list(self.engine.tokenizer.encode(text)), []


_Solved = Iterator[tuple[Item, Response, Output, int]]


def _generated(
    engine: BaseEngine,
    items: Sequence[Item],
    options: FusionOptions,
    prompts: _Prompts,
    max_tokens: int,
    stop: tuple[str, ...],
) -> _Solved:
    fitting, texts = [], []
    for item in items:
        try:
            texts.append(prompts.of(item, "", max_tokens)[0])
            fitting.append(item)
        except ValueError as error:
            yield item, Response(), Output(error=str(error)), 0
    sampling = SamplingParams(max_tokens=max_tokens, stop=stop)
    for number, output in engine.generate_as_completed(texts, sampling, **options):
        response = Response(output.text, output.finish_reason)
        yield fitting[number], response, output, len(output.token_ids)


def _judged(
    engine: BaseEngine,
    items: Sequence[Item],
    options: FusionOptions,
    prompts: _Prompts,
    _: int,
    __: tuple[str, ...],
) -> _Solved:
    owners: list[tuple[int, int]] = []  # item and choice of each continuation
    texts, rests = [], []
    for at, item in enumerate(items):
        try:
            pairs = [prompts.of(item, choice, 0) for choice in item.choices]
        except ValueError as error:
            yield item, Response(), Output(error=str(error)), 0
            continue
        for choice, (text, rest) in enumerate(pairs):
            owners.append((at, choice))
            texts.append(text)
            rests.append(rest)
    found: dict[int, dict[int, Output]] = {}
    for number, output in engine.score_as_completed(texts, rests, **options):
        at, choice = owners[number]
        outputs = found.setdefault(at, {})
        outputs[choice] = output
        if len(outputs) == len(items[at].choices):
            ordered = [found[at][c] for c in range(len(outputs))]
            errors = [each.error for each in ordered if each.error]
            judged = tuple(Choice(sum(o.logprobs), all(o.greedy), len(o.logprobs)) for o in ordered)
            response = Response(choices=judged)
            tokens = sum(choice.tokens for choice in judged)
            yield items[at], response, Output(error=errors[0] if errors else None), tokens
            del found[at]


def run(
    experiment: Experiment,
    start: Callable[[Family], BaseEngine],
    *,
    log: Callable[[str], None] = print,
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Runs what is not done yet of an experiment; `start` makes an engine of a family.

    `shard` (i, n) takes every n-th item, for replicas that write into one folder.
    Raises `ValueError` for mistakes in the experiment before anything is computed, and
    `RuntimeError` at the end if items failed; they are tried again in the next run.
    """
    family = Family.from_yaml(experiment.family)
    jobs: list[tuple[TaskSpec, Task, list[Item]]] = []
    malformed: dict[str, int] = {}
    for spec in experiment.tasks:
        data = spec.data and spec.data.format(family=Path(experiment.family).parent)
        task = spec.make(data)
        if any(task.name == other.name for _, other, _ in jobs):
            raise ValueError(f"two tasks are called {task.name!r}: give one another `name`")
        loaded = task.load(data, shots=spec.shots, limit=spec.limit)
        for where, reason in loaded.skipped:
            log(f"{task.name}: left out {where}: {reason}")
        jobs.append((spec, task, loaded.items))
        malformed[task.name] = len(loaded.skipped)
        for method in experiment.methods:
            resolve(family, method_options(method.format(task=task.name), family))
    if not jobs or not experiment.methods:
        raise ValueError("an experiment needs at least one task and one method")
    failures: list[str] = []
    provenance = _provenance(experiment, family)
    with Results(experiment.output, _config(experiment, family, jobs, malformed)) as results:
        plans: dict[str, list[tuple[TaskSpec, Task, list[Item], str]]] = {}
        for spec, task, items in jobs:
            mine = items[shard[0] :: shard[1]]
            for method in experiment.methods:
                plans.setdefault("", []).append((spec, task, mine, method))
            if experiment.upper_bound:
                model = experiment.upper_bound.format(task=task.name)
                plans.setdefault(model, []).append((spec, task, mine, UPPER_BOUND))
        for model, parts in plans.items():
            chosen = _alone(family, model, Path(experiment.family)) if model else family
            deaths = 0
            while todo := [
                (spec, task, left, method)
                for spec, task, items, method in parts
                if (left := [i for i in items if (task.name, method, i.id) not in results.done])
            ]:
                before = len(results.done)
                with start(chosen) as engine:
                    try:
                        for part in todo:
                            failed = _run_part(engine, experiment, results, *part, provenance, log)
                            failures += failed
                        break
                    except EngineError as error:
                        deaths = deaths + 1 if len(results.done) == before else 1
                        if deaths > RESTARTS:
                            raise
                        log(f"warning: {error}; going on with another engine")
    if failures:
        raise RuntimeError(
            f"{len(failures)} items failed; run again to try them again. First: {failures[0]}"
        )


def _run_part(
    engine: BaseEngine,
    experiment: Experiment,
    results: Results,
    spec: TaskSpec,
    task: Task,
    items: list[Item],
    method: str,
    provenance: dict[str, str | None],
    log: Callable[[str], None],
) -> list[str]:
    """One task by one method; what failed."""
    options: FusionOptions = (
        {"alone": LARGE}
        if method == UPPER_BOUND
        else method_options(method.format(task=task.name), engine.family)
    )
    fusion = resolve(engine.family, options)
    constant = {
        "task": task.name,
        "task_version": task.version,
        "method": method,
        "shots": spec.shots,
        "shots_for": experiment.shots_for,
        "expert_names": list(fusion.experts),
        "rule": "alone" if fusion.alone else f"{fusion.rule}, {fusion.select}",
        "seed": 0,
        **provenance,
    }
    failures = []
    for answer in _logged(
        answers(
            engine,
            task,
            items,
            options,
            max_tokens=spec.max_tokens,
            shots_for=experiment.shots_for,
            on_overflow=experiment.on_overflow,
        ),
        f"{task.name}, {method}",
        len(items),
        log,
    ):
        output, item = answer.output, answer.item
        if output.error and not output.error.startswith("skipped"):
            failures.append(f"{task.name}, {method}, {item.id}: {output.error}")
            continue
        choices = answer.response.choices
        logprobs = [choice.logprob for choice in choices]
        results.add(
            {
                **constant,
                "item": item.id,
                "group": item.group or None,
                "prompt_hash": hashlib.sha256(
                    "\0".join((item.full_prompt, *item.choices)).encode()
                ).hexdigest()[:16],
                "text": output.text,
                "pieces": output.pieces,
                "token_ids": output.token_ids,
                "scores": list(answer.scores.items()),
                "finish_reason": output.finish_reason,
                "error": output.error,
                "weights": [[w[n] for n in fusion.experts] for w in output.weights],
                "experts": output.experts,
                "kl": [list(pair) for pair in output.kl],
                "logprobs": logprobs,
                "is_greedy": [choice.greedy for choice in choices],
                "choice": logprobs.index(max(logprobs)) if choices else None,
                "seconds": answer.seconds,
                "tokens": answer.tokens,
            }
        )
    results.flush()
    return failures


def _logged(
    found: Iterable[Answer], what: str, total: int, log: Callable[[str], None]
) -> Iterator[Answer]:
    """Passes answers on and says now and then how far they are."""
    began = last = time.perf_counter()
    tokens = cut = 0
    for count, answer in enumerate(found, 1):
        yield answer
        tokens += answer.tokens
        cut += answer.cut
        now = time.perf_counter()
        if count == total or now - last >= LOG_EVERY_S:
            last, took = now, now - began
            left = took / count * (total - count)
            log(f"{what}: {count}/{total} items, {tokens / took:.0f} tokens/s, {left:.0f} s left")
    if cut:
        log(f"{what}: warning: {cut} prompts longer than the context were cut from the left")


def _alone(family: Family, model: str, file: Path) -> Family:
    """A family in which one model stands for the large one, with nothing to steer it."""
    local = file.parent / model
    # Where the large one runs, this one does: they are of a size.
    spec = msgspec.structs.replace(
        family.large,
        model=str(local.resolve()) if local.exists() else model,
        tokenizer=None,
        trust_remote_code=False,
    )
    return Family(large=spec, base=family.base, experts={}, engine=family.engine)


def _config(
    experiment: Experiment,
    family: Family,
    jobs: Sequence[tuple[TaskSpec, Task, list[Item]]],
    malformed: Mapping[str, int],
) -> dict[str, Any]:
    """Everything that determines the rows."""
    return {
        "family": family.digest,
        "models": {name: spec.model for name, spec in family.models.items()},
        "tasks": {
            task.name: {
                **msgspec.to_builtins(spec),
                "version": task.version,
                "malformed": malformed[task.name],
                "items": hashlib.sha256(
                    "\0".join(f"{i.id}\0{i.full_prompt}" for i in items).encode()
                ).hexdigest()[:16],
            }
            for spec, task, items in jobs
        },
        "methods": list(experiment.methods),
        "shots_for": experiment.shots_for,
        "upper_bound": experiment.upper_bound,
        "on_overflow": experiment.on_overflow,
    }


def _provenance(experiment: Experiment, family: Family) -> dict[str, str | None]:
    """Where the rows of a run come from."""
    models = {name: spec.model for name, spec in family.models.items()}
    if experiment.upper_bound:
        models[UPPER_BOUND] = experiment.upper_bound
    return {
        "commit": _commit(),
        "family_digest": family.digest,
        "models": json.dumps(models),
        "dlf_version": version("dlf_ray"),
    }


def _commit() -> str | None:
    """The commit of the code that runs, if it runs from a checkout."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None
