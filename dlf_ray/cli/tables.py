"""The table that evaluations print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from dlf_ray.cli.common import console
from dlf_ray.evaluation.results import UPPER_BOUND, read
from dlf_ray.evaluation.statistics import Row, summary


def log(line: str) -> None:
    console.print(line, style="dim", markup=False, highlight=False)


def scores(folder: str, methods: Sequence[str], malformed: Mapping[str, int]) -> Table:
    """All that a folder holds: a row per method, those that were asked for first, with the mean and
    95% interval of every task's first metric, and an average."""
    rows = {(row.task, row.method): row for row in summary(read(folder))}
    tasks = list(dict.fromkeys(task for task, _ in rows))
    metrics = {task: next(iter(row.scores)) for (task, _), row in rows.items() if row.scores}
    counts = {task: max(r.items for r in rows.values() if r.task == task) for task in tasks}
    table = Table(title="percent, 95% intervals", box=box.SIMPLE)
    table.add_column("method", no_wrap=True)
    for task in tasks:
        first = next(row for row in rows.values() if row.task == task)
        title = f"{task}\n{metrics.get(task, '')}\n{counts[task]} items, {first.shots}-shot"
        if left_out := malformed.get(task):
            title += f"\n{left_out} malformed left out"
        table.add_column(title, no_wrap=True)
    upper = _average([rows[task, UPPER_BOUND] for task in tasks if (task, UPPER_BOUND) in rows])
    # Beside several tasks there is no room for every expert's weight; `dlf report` has them.
    experts = list(dict.fromkeys(n for row in rows.values() for n in row.weights))
    experts = experts if len(tasks) == 1 else []
    for title in ("average", *(["gap closed"] if upper else []), "items/s", "tokens/s"):
        table.add_column(title)
    for expert in experts:
        table.add_column(f"{expert}\nmean weight")
    others = sorted({method for _, method in rows} - {*methods, UPPER_BOUND})
    for method in (*methods, *others, UPPER_BOUND):
        found = [rows.get((task, method)) for task in tasks]
        there = [row for row in found if row]
        if not there:
            continue
        cells = [_cell(row, counts[row.task]) if row else "-" for row in found]
        average, seconds = _average(there), sum(row.seconds for row in there)
        if len(there) < len(tasks):
            average = None  # it would be one of other tasks
        cells.append("-" if average is None else f"{average:.1f}")
        if upper:  # of the averages, as in the paper
            cells.append("-" if average is None else f"{100 * average / upper:.1f}")
        items, tokens = sum(row.items for row in there), sum(row.tokens for row in there)
        cells += [f"{items / seconds:.1f}", f"{tokens / seconds:.0f}"] if seconds else ["-", "-"]
        weights = there[0].weights
        cells += [f"{weights[name]:.2f}" if name in weights else "" for name in experts]
        table.add_row(method, *cells)
    return table


def _cell(row: Row, usual: int) -> str:
    """A score with its interval, and the number of items where it is another than usual."""
    few = f", {row.items} items" if row.items != usual else ""
    score = next(iter(row.scores.values()), None)
    if score is None:
        return f"-{few}"
    return f"{100 * score.mean:.1f} ({100 * score.low:.0f}-{100 * score.high:.0f}){few}"


def _average(rows: Sequence[Row]) -> float | None:
    """Of the tasks' headline scores, in percent."""
    scores = [100 * next(iter(row.scores.values())).mean for row in rows if row.scores]
    return sum(scores) / len(scores) if scores else None
