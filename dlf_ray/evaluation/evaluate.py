"""Methods side by side on the same items: tasks in, rows of results out, resumable at any item.

An experiment names a family, tasks and methods. Every item is answered by every method, by
generation or by the likelihood of its choices under the fused distribution, and each answer becomes
one row of `results`; what a folder holds already is not computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from dlf_ray.config import BASE, LARGE, Family, ModelSpec, Select, converted, read_yaml
from dlf_ray.engine.frontend import BaseEngine, EngineError, FusionOptions, Output, Prompts, resolve
from dlf_ray.evaluation.results import UPPER_BOUND, Results
from dlf_ray.evaluation.tasks import Choice, Item, Response, Scores, Task, get_task, own_task
from dlf_ray.messages import FusionParams, SamplingParams

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
    """Answers all items, greedily or by likelihood; yields each as soon as it is there.

    An item that fails, or is left out for its length, has `output.error` and no scores.
    """
    models = resolve(engine.family, options).models
    prompts = _Prompts(engine, models, shots_for, on_overflow)
    if task.kind == "generate":
        sampling = SamplingParams(max_tokens=max_tokens or task.max_tokens, stop=task.stop)
        solved = _generated(engine, items, options, prompts, sampling)
    else:
        solved = _judged(engine, items, options, prompts)
    before = time.perf_counter()
    for item, response, output, tokens in solved:
        now = time.perf_counter()
        scores = {} if output.error else task.score(item, response)
        cut = item.id in prompts.cut
        yield Answer(item, response, scores, output, now - before, tokens, cut)
        before = now


class _Prompts:
    """Token ids of an item's prompt for the models that answer, cut to the context of each."""

    def __init__(
        self, engine: BaseEngine, models: Sequence[str], shots_for: str, on_overflow: str
    ) -> None:
        self.engine = engine
        self.models = models
        self.shots_for = shots_for
        self.skip = on_overflow == "skip"
        self.cut: set[str] = set()
        """Items whose prompt did not fit."""
        self.left_out: list[tuple[Item, Response, Output, int]] = []
        """Items that were skipped for that, and not yet reported."""

    def of(self, item: Item, continuation: str, room: int) -> tuple[Prompts, list[int]]:
        """Each model's prompt, or the one of all, and the continuation's tokens.

        Raises `ValueError` to skip the item.
        """
        lengths = self.engine.limits.lengths
        texts = {
            name: item.full_prompt if name == LARGE or self.shots_for == "all" else item.prompt
            for name in self.models
        }
        pairs = {text: self._encode(text, continuation) for text in set(texts.values())}
        rest = pairs[texts[self.models[0]]][1]
        prompts = {}
        for name in self.models:
            ids, limit = pairs[texts[name]][0], lengths[name]
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
        first = prompts[self.models[0]]
        return first if all(ids == first for ids in prompts.values()) else prompts, rest

    def skipped(self, item: Item, error: ValueError) -> None:
        self.left_out.append((item, Response(), Output(error=str(error)), 0))

    def _encode(self, text: str, continuation: str) -> tuple[list[int], list[int]]:
        if continuation:
            return self.engine.tokenize_pair(text, continuation)
        return self.engine.tokenize(text), []


_Solved = Iterator[tuple[Item, Response, Output, int]]


def _generated(
    engine: BaseEngine,
    items: Sequence[Item],
    options: FusionOptions,
    prompts: _Prompts,
    sampling: SamplingParams,
) -> _Solved:
    asked: list[Item] = []

    def texts() -> Iterator[Prompts]:
        for item in items:
            try:
                text, _ = prompts.of(item, "", sampling.max_tokens)
            except ValueError as error:
                prompts.skipped(item, error)
                continue
            asked.append(item)
            yield text

    for number, output in engine.generate_as_completed(texts(), sampling, **options):
        response = Response(output.text, output.finish_reason)
        yield asked[number], response, output, len(output.token_ids)
    yield from prompts.left_out


def _judged(
    engine: BaseEngine, items: Sequence[Item], options: FusionOptions, prompts: _Prompts
) -> _Solved:
    owners: list[tuple[int, int]] = []  # item and choice of each continuation

    def pairs() -> Iterator[tuple[Prompts, list[int]]]:
        for at, item in enumerate(items):
            try:
                found = [prompts.of(item, choice, 0) for choice in item.choices]
            except ValueError as error:
                prompts.skipped(item, error)
                continue
            owners.extend((at, choice) for choice in range(len(found)))
            yield from found

    found: dict[int, dict[int, Output]] = {}
    for number, output in engine.score_as_completed(pairs(), **options):
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
    yield from prompts.left_out


class Start(Protocol):
    """What makes an engine: `Engine`, `LocalEngine`."""

    def __call__(self, family: Family, *, models: Collection[str]) -> BaseEngine: ...


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


def run(
    experiment: Experiment,
    start: Start,
    *,
    log: Callable[[str], None] = print,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, int]:
    """Runs what is not done yet of an experiment; `start` makes an engine of a family.

    `shard` (i, n) takes every n-th item, for replicas that write into one folder.
    Returns how many malformed records of each task were left out.
    Raises `ValueError` for mistakes in the experiment, or where the folder holds rows that it would
    have made in another way, before anything is computed, and `RuntimeError` at the end if items
    failed; they are tried again in the next run.
    """
    family = Family.from_yaml(experiment.family)
    jobs, malformed = _jobs(experiment, family, log)
    provenance = _provenance(experiment, family)
    failures: dict[tuple[str, str, str], str] = {}
    with Results(experiment.output, _settings(experiment, jobs)) as results:
        _check_items(results, jobs)
        mine = [job.of(job.items[shard[0] :: shard[1]]) for job in jobs]
        for model in dict.fromkeys(job.model for job in mine):
            _answer_all(
                [job for job in mine if job.model == model],
                experiment,
                start,
                results,
                provenance,
                failures,
                log,
            )
    if failures:
        raise RuntimeError(
            f"{len(failures)} items failed; run again to try them again. "
            f"First: {next(iter(failures.values()))}"
        )
    return malformed


def _jobs(
    experiment: Experiment, family: Family, log: Callable[[str], None]
) -> tuple[list[Job], dict[str, int]]:
    """Every task by every method, and how many records of each task are malformed."""
    jobs: list[Job] = []
    malformed: dict[str, int] = {}
    for spec in experiment.tasks:
        data = spec.data and spec.data.format(family=Path(experiment.family).parent)
        task = spec.make(data)
        if task.name in malformed:
            raise ValueError(
                f"two tasks are called {task.name!r}: give one another `name`, or rename its file"
            )
        loaded = task.load(data, shots=spec.shots, limit=spec.limit)
        for where, reason in loaded.skipped:
            log(f"{task.name}: left out {where}: {reason}")
        malformed[task.name] = len(loaded.skipped)
        own = [Job(spec, task, loaded.items, method, family) for method in experiment.methods]
        if experiment.upper_bound:
            model = experiment.upper_bound.format(task=task.name)
            alone = _alone(family, model, Path(experiment.family))
            own.append(Job(spec, task, loaded.items, UPPER_BOUND, alone, model))
        for job in own:
            _ = job.fusion  # wrong methods show before anything starts
        jobs += own
    if not jobs or not experiment.methods:
        raise ValueError("an experiment needs at least one task and one method")
    return jobs, malformed


def _answer_all(
    jobs: Sequence[Job],
    experiment: Experiment,
    start: Start,
    results: Results,
    provenance: Mapping[str, str | None],
    failures: dict[tuple[str, str, str], str],
    log: Callable[[str], None],
) -> None:
    """What is left of jobs of one family, by one engine with the models that they need, or by
    another one where that dies. `failures` are kept by the key of the item."""
    deaths = 0
    while todo := [
        job.of(left)
        for job in jobs
        if (left := [item for item in job.items if job.key(item) not in results.done])
    ]:
        before = len(results.done)
        needed = {name for job in todo for name in job.fusion.models}
        with start(todo[0].family, models=needed) as engine:
            try:
                for job in todo:
                    for answer in _answered(engine, job, experiment, log):
                        key, error = job.key(answer.item), answer.output.error
                        if error and not error.startswith("skipped"):
                            failures[key] = f"{', '.join(key)}: {error}"
                        else:
                            failures.pop(key, None)
                            results.add({**provenance, **row_of(job, answer)})
                    results.flush()
                return
            except EngineError as error:
                deaths = deaths + 1 if len(results.done) == before else 1
                if deaths > RESTARTS:
                    raise
                log(f"warning: {error}; going on with another engine")


def _answered(
    engine: BaseEngine, job: Job, experiment: Experiment, log: Callable[[str], None]
) -> Iterator[Answer]:
    found = answers(
        engine,
        job.task,
        job.items,
        job.options,
        max_tokens=job.spec.max_tokens,
        shots_for=experiment.shots_for,
        on_overflow=experiment.on_overflow,
    )
    return _logged(found, f"{job.task.name}, {job.method}", len(job.items), log)


def row_of(job: Job, answer: Answer) -> dict[str, Any]:
    """What `results` keeps of an answer."""
    output, item, fusion = answer.output, answer.item, job.fusion
    models = {name: job.family.models[name].model for name in fusion.models}
    choices = answer.response.choices
    logprobs = [choice.logprob for choice in choices]
    return {
        "task": job.task.name,
        "task_version": job.task.version,
        "method": job.method,
        "item": item.id,
        "group": item.group or None,
        "shots": job.spec.shots,
        "prompt_hash": hash_of(item),
        "text": output.text,
        "pieces": output.pieces,
        "token_ids": output.token_ids,
        "scores": list(answer.scores.items()),
        "finish_reason": output.finish_reason,
        "error": output.error,
        "expert_names": list(fusion.experts),
        "weights": [[w[n] for n in fusion.experts] for w in output.weights],
        "experts": output.experts,
        "kl": [list(pair) for pair in output.kl],
        "logprobs": logprobs,
        "is_greedy": [choice.greedy for choice in choices],
        "choice": logprobs.index(max(logprobs)) if choices else None,
        "seconds": answer.seconds,
        "tokens": answer.tokens,
        "models": json.dumps({UPPER_BOUND: models[LARGE]} if job.model else models),
        "rule": "alone" if fusion.alone else f"{fusion.rule}, {fusion.select}",
        "seed": 0,
    }


def hash_of(item: Item) -> str:
    """Of all that an item asks, and what counts as right."""
    parts = (item.full_prompt, item.choices, item.answers, item.correct)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _check_items(results: Results, jobs: Sequence[Job]) -> None:
    """Raises `ValueError` where an item that was answered is another one now."""
    for job in jobs:
        for item in job.items:
            there = results.done.get(job.key(item))
            if there and there != hash_of(item):
                raise ValueError(
                    f"{results.folder} holds a run with other data; take another folder: item "
                    f"{item.id!r} of task {job.task.name!r} has another prompt, other choices or "
                    "other answers there"
                )


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
            log(
                f"{what}: {count}/{total} items, {count / took:.1f} items/s, "
                f"{tokens / took:.0f} tokens/s, {left:.0f} s left"
            )
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


def _settings(experiment: Experiment, jobs: Sequence[Job]) -> dict[str, Any]:
    """What determines the rows, and nothing else: a folder takes no rows of other settings.

    Not in it: which items, since each row knows what it was asked; and what only says where and how
    fast they are answered.
    """
    # Models as the file writes them, so that a folder may move with its file.
    written = Family.from_dict(read_yaml(Path(experiment.family)))
    models: dict[str, Any] = {}
    tasks: dict[str, Any] = {}
    for job in jobs:
        task, spec = job.task, job.spec
        known = tasks.setdefault(
            task.name,
            {
                "task": spec.task,
                "data": Path(spec.data).name if spec.data else None,
                "version": task.version,
                "prompt_template": spec.prompt_template,
                "metric": spec.metric,
                "shots": spec.shots,
                "shots_for": experiment.shots_for if spec.shots else None,
                "max_tokens": task.max_tokens and (spec.max_tokens or task.max_tokens),
                "stop": list(task.stop),
                "on_overflow": experiment.on_overflow,
                "methods": {},
            },
        )
        known["methods"][job.method] = _how(job)
        if not job.model:
            models |= {name: _identity(written.models[name]) for name in job.fusion.models}
    large = written.large
    return {
        "models": models,
        "tokenizer": os.path.normpath(large.tokenizer or large.model),
        "max_model_len": written.engine.max_model_len,
        "tasks": tasks,
    }


def _identity(spec: ModelSpec) -> dict[str, str | None]:
    return {"model": os.path.normpath(spec.model), "dtype": spec.dtype}


def _how(job: Job) -> dict[str, Any]:
    """How a method answers, beside the models that it does it with."""
    fusion = job.fusion
    if job.model:
        return {**_identity(job.family.large), "model": os.path.normpath(job.model)}
    if fusion.alone or not fusion.experts:
        return {"alone": fusion.alone or LARGE}
    how: dict[str, Any] = {"rule": fusion.rule, "experts": list(fusion.experts)}
    if fusion.rule == "static":
        return {**how, "weights": list(fusion.weights)}
    how["bounds"] = [list(pair) for pair in fusion.bounds]
    if len(fusion.experts) > 1:
        how["select"] = fusion.select
    return {**how, "step": fusion.step} if fusion.rule == "grid" else how


def _provenance(experiment: Experiment, family: Family) -> dict[str, str | None]:
    """Where all rows of a run come from."""
    return {
        "commit": _commit(),
        "family_digest": family.digest,
        "dlf_version": _version(),
        "shots_for": experiment.shots_for,
    }


def _version() -> str | None:
    try:
        return distribution("dlf_ray").version
    except PackageNotFoundError:
        return None


def _commit(root: Path = Path(__file__).parent.parent.parent) -> str | None:
    """The commit of the code that runs: of its checkout, or the one that pip installed it from.

    A repository that happens to lie around the environment is not it.
    """
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] == "dlf_ray":
            return _head(root)
    except (OSError, ValueError, LookupError):  # no checkout, or another project's
        pass
    try:  # PEP 610
        text = distribution("dlf_ray").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    commit = json.loads(text or "{}").get("vcs_info", {}).get("commit_id")
    return str(commit) if commit else None


def _head(root: Path) -> str | None:
    """The commit of a repository with this root, if it is one and git is there to say so."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--show-toplevel", "HEAD"],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    top, _, commit = done.stdout.strip().partition("\n")
    return commit or None if done.returncode == 0 and Path(top).samefile(root) else None
