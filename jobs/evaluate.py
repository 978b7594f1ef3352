"""Runs an experiment on the cluster, and goes on where an earlier run of it was stopped.

    ray job submit --working-dir . -- python jobs/evaluate.py jobs/demo.yaml

A family file called `demo` is trained first, where that has not been done yet. Every item that is
answered is kept in the experiment's output folder, which all nodes must see if there are several.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection

import msgspec
import ray

from dlf_ray import Engine, Family
from dlf_ray.engine.placement import settled
from dlf_ray.evaluation.evaluate import run
from dlf_ray.evaluation.experiment import Experiment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", help="a YAML file, such as jobs/demo.yaml")
    parser.add_argument("--num-replicas", type=int, default=1, help="copies of the family")
    parser.add_argument("--output", help="a folder for the results, instead of the experiment's")
    options = parser.parse_args()
    if options.num_replicas < 1:
        parser.error("--num-replicas must be at least 1")
    experiment = Experiment.from_yaml(options.experiment).with_family()
    if options.output:
        experiment = msgspec.structs.replace(experiment, output=options.output)
    ray.init()
    replica = ray.remote(num_cpus=0, max_retries=0)(answer_share)
    count = options.num_replicas
    ray.get([replica.remote(experiment, number, count) for number in range(count)])
    print(f"results in {experiment.output}: dlf report {experiment.output}")


def answer_share(experiment: Experiment, number: int, count: int) -> None:
    """One replica: a family of its own, and every `count`-th item."""
    prefix = f"[{number + 1}/{count}] " if count > 1 else ""

    def engine(family: Family, *, models: Collection[str]) -> Engine:
        return Engine(settled(family, copies=count), models=models)

    run(
        experiment,
        engine,
        shard=(number, count),
        log=lambda line: print(prefix + line, flush=True),
    )


if __name__ == "__main__":
    main()
