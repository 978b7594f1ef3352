"""The `dlf` command: one file for each subcommand, each a thin shell around the package.

`check`, `generate`, `chat`, `serve`, `expert`, `merge`, `evaluate`, `demo`, `report` and `bench`
are the commands, `common` is what they share, `shown` how text is shown as it streams, `tables` the
table that two of them print.
"""

from __future__ import annotations

import typer

from dlf_ray.cli.bench import bench
from dlf_ray.cli.chat import chat
from dlf_ray.cli.check import check
from dlf_ray.cli.demo import demo
from dlf_ray.cli.evaluate import evaluate
from dlf_ray.cli.expert import expert
from dlf_ray.cli.generate import generate
from dlf_ray.cli.merge import merge
from dlf_ray.cli.report import report
from dlf_ray.cli.serve import serve

app = typer.Typer(
    help="Dynamic Logits Fusion: steer a large language model with small fine-tuned experts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(check)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.add_typer(expert, name="expert")
for command in (merge, evaluate, demo, report, bench):
    app.command()(command)
