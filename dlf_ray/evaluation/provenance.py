"""Where rows come from, and what of an experiment determines them."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from dlf_ray.config import LARGE, Family, ModelSpec, read_yaml
from dlf_ray.evaluation.experiment import Experiment, Job
from dlf_ray.rules import RULES


def settings_of(experiment: Experiment, jobs: Sequence[Job]) -> dict[str, Any]:
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
                "apply_chat_template": experiment.apply_chat_template,
                "system_instruction": experiment.system_instruction,
                "fewshot_as_multiturn": experiment.asking.multiturn if spec.shots else None,
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
    return {"model": os.path.normpath(spec.source), "dtype": spec.dtype}


def _how(job: Job) -> dict[str, Any]:
    """How a method answers, beside the models that it does it with."""
    fusion = job.fusion
    if job.model:
        return {**_identity(job.family.large), "model": os.path.normpath(job.model)}
    if fusion.alone or not fusion.experts:
        return {"alone": fusion.alone or LARGE}
    how: dict[str, Any] = {"rule": fusion.rule, "experts": list(fusion.experts)}
    if RULES[fusion.rule].given:
        return {**how, "weights": list(fusion.weights)}
    if not RULES[fusion.rule].searches:
        return how
    how["bounds"] = [list(pair) for pair in fusion.bounds]
    if len(fusion.experts) > 1:
        how["select"] = fusion.select
    return {**how, "step": fusion.step} if fusion.rule == "grid" else how


def provenance_of(experiment: Experiment, family: Family) -> dict[str, str | None]:
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
