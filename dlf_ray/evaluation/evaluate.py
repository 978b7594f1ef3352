"""Methods side by side on the same items: tasks in, rows of results out, resumable at any item.

An experiment names a family, tasks and methods. Every item is answered by every method, by
generation or by the likelihood of its choices under the fused distribution, and each answer becomes
one row of `results`; what a folder holds already is not computed again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import msgspec

from dlf_ray.config import LARGE, Family
from dlf_ray.engine.frontend import BaseEngine
from dlf_ray.engine.output import EngineError
from dlf_ray.evaluation.answering import Answer, answers
from dlf_ray.evaluation.dialogue import Asking
from dlf_ray.evaluation.experiment import Experiment, Job
from dlf_ray.evaluation.provenance import provenance_of, settings_of
from dlf_ray.evaluation.results import UPPER_BOUND, Results
from dlf_ray.evaluation.tasks import Item

LOG_EVERY_S = 10.0
RESTARTS = 3
"""Engines that may die one after the other without an answer in between."""


class Start(Protocol):
    """What makes an engine: `Engine`, `LocalEngine`."""

    def __call__(self, family: Family, *, models: Collection[str]) -> BaseEngine: ...


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
    provenance = provenance_of(experiment, family)
    failures: dict[tuple[str, str, str], str] = {}
    with Results(experiment.output, settings_of(experiment, jobs)) as results:
        _check_items(results, jobs, experiment.asking)
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
        if experiment.apply_chat_template:  # prompts are other ones then
            task = replace(task, version=f"{task.version}, chat")
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
                            results.add({**provenance, **row_of(job, answer, experiment.asking)})
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
        asking=experiment.asking,
    )
    return _logged(found, f"{job.task.name}, {job.method}", len(job.items), log)


def row_of(job: Job, answer: Answer, asking: Asking) -> dict[str, Any]:
    """What `results` keeps of an answer."""
    output, item, fusion = answer.output, answer.item, job.fusion
    models = {name: job.family.models[name].source for name in fusion.models}
    choices = answer.response.choices
    logprobs = [choice.logprob for choice in choices]
    return {
        "task": job.task.name,
        "task_version": job.task.version,
        "method": job.method,
        "item": item.id,
        "group": item.group or None,
        "shots": job.spec.shots,
        "prompt_hash": hash_of(item, asking),
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


def hash_of(item: Item, asking: Asking) -> str:
    """Of all that an item asks, and what counts as right."""
    asked = asking.messages(item) if asking.chat else asking.text(item)
    parts = (asked, item.choices, item.answers, item.correct)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _check_items(results: Results, jobs: Sequence[Job], asking: Asking) -> None:
    """Raises `ValueError` where an item that was answered is another one now."""
    for job in jobs:
        for item in job.items:
            there = results.done.get(job.key(item))
            if there and there != hash_of(item, asking):
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
