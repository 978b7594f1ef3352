"""The tables of a report: methods by tasks, and everything about one task."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from dlf_ray.evaluation.page import Cell, Table, Whisker
from dlf_ray.evaluation.results import UPPER_BOUND
from dlf_ray.evaluation.statistics import Estimate, Row
from dlf_ray.rules import RULES


def rank_of(method: str) -> tuple[int, str]:
    """The order in which methods are shown: single models, fusion, the bound."""
    order = ["large", "base", "expert", *(name for name in RULES if not RULES[name].searches)]
    kind = method.split(":")[0]
    if method == UPPER_BOUND:
        return len(order) + 1, method
    return order.index(kind) if kind in order else len(order), method


class Scale:
    """How the values of each metric are shown: in percent if all lie between 0 and 1."""

    def __init__(self, table: pa.Table) -> None:
        self.range: dict[tuple[str, str], tuple[float, float]] = {}
        pairs = zip(table["task"].to_pylist(), table["scores"].to_pylist(), strict=True)
        for task, scores in pairs:
            for metric, value in scores or []:
                low, high = self.range.get((task, metric), (value, value))
                self.range[task, metric] = min(low, value), max(high, value)

    def percent(self, task: str, metric: str) -> bool:
        low, high = self.range[task, metric]
        return low >= 0 and high <= 1

    def unit(self, task: str, metric: str) -> str:
        return f"{metric}, %" if self.percent(task, metric) else metric

    def show(self, task: str, metric: str, value: float) -> str:
        return f"{100 * value:.1f}" if self.percent(task, metric) else f"{value:.3g}"

    def cell(self, task: str, metric: str, estimate: Estimate | None, notes: str = "") -> Cell:
        if estimate is None:
            return Cell("–", notes=notes)
        mean, low, high = (
            self.show(task, metric, each) for each in (estimate.mean, estimate.low, estimate.high)
        )
        return Cell(mean, f"[{low}, {high}]", notes, self._whisker(task, metric, estimate))

    def _whisker(self, task: str, metric: str, estimate: Estimate) -> Whisker:
        low, high = (0.0, 1.0) if self.percent(task, metric) else self.range[task, metric]
        x = [
            round(100 * (value - low) / (high - low or 1), 1)
            for value in (estimate.mean, estimate.low, estimate.high)
        ]
        return Whisker(*x)


def _main(rows: Iterable[Row]) -> str | None:
    """The main metric of a task: the first that its rows name."""
    return next((metric for row in rows for metric in row.scores), None)


def _common(values: Iterable[str]) -> str:
    """What most of them are."""
    values = list(values)
    return max(sorted(set(values)), key=values.count)


def _about(row: Row) -> tuple[str, str]:
    return f"{row.items:,} items", f"shots: {row.shots}" if row.shots else ""


def score_table(tasks: dict[str, list[Row]], scale: Scale) -> Table:
    """Methods by tasks: the main metric of each."""
    mains = {name: _main(rows) for name, rows in tasks.items()}
    head, usual = [Cell("method")], {}
    for name, rows in tasks.items():
        metric = mains[name]
        usual[name] = [_common(each) for each in zip(*(_about(row) for row in rows), strict=True)]
        unit = scale.unit(name, metric) if metric else "no score"
        head.append(Cell(name, unit, ", ".join(filter(None, usual[name]))))
    methods = sorted({row.method for rows in tasks.values() for row in rows}, key=rank_of)
    by_key = {(row.task, row.method): row for rows in tasks.values() for row in rows}
    averages = _averages(by_key, mains, methods, scale)
    bound = averages.get(UPPER_BOUND)
    if averages and len(mains) > 1:
        head.append(Cell("average", "%"))
    if bound:
        head.append(Cell("gap closed", "%"))
    body = []
    for method in methods:
        line = [Cell(method)]
        for name, metric in mains.items():
            row = by_key.get((name, method))
            line.append(_score(row, metric, scale, usual[name]) if row else Cell("–"))
        average = averages.get(method)
        if averages and len(mains) > 1:
            line.append(Cell("–" if average is None else f"{100 * average:.1f}"))
        if bound:
            line.append(Cell("–" if average is None else f"{100 * average / bound:.1f}"))
        body.append(line)
    return Table(head, body)


def _score(row: Row, metric: str | None, scale: Scale, usual: list[str]) -> Cell:
    notes = [each for each in _about(row) if each and each not in usual]
    notes += [f"{row.errors} failed"] * bool(row.errors)
    if not metric:
        return Cell("–", notes=", ".join(notes))
    return scale.cell(row.task, metric, row.scores.get(metric), ", ".join(notes))


def _averages(
    rows: dict[tuple[str, str], Row],
    mains: dict[str, str | None],
    methods: list[str],
    scale: Scale,
) -> dict[str, float]:
    """Over all tasks, for methods that have a score in each; if all scores are shares."""
    pairs = [(name, metric) for name, metric in mains.items() if metric]
    if len(pairs) < len(mains) or not all(scale.percent(*pair) for pair in pairs):
        return {}
    found = {}
    for method in methods:
        own = [rows.get((name, method)) for name, _ in pairs]
        means = [
            row.scores[metric].mean
            for row, (_, metric) in zip(own, pairs, strict=True)
            if row and metric in row.scores
        ]
        if len(means) == len(pairs):
            found[method] = sum(means) / len(means)
    return found


def details_table(rows: list[Row], experts: list[str], scale: Scale) -> Table:
    """Everything there is to say about each method on one task, in numbers."""
    task = rows[0].task
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.scores))
    macros = [metric for metric in metrics if any(metric in row.macro for row in rows)]
    closed = [metric for metric in metrics[:1] if any(metric in row.gap_closed for row in rows)]
    weighing = [name for name in experts if any(name in row.weights for row in rows)]
    head = [Cell("method")]
    head += [Cell(m, "%" * scale.percent(task, m), _how(rows, m)) for m in metrics]
    head += [Cell(f"{m}, macro", "%" * scale.percent(task, m), "bootstrap") for m in macros]
    head += [Cell("gap closed", metric) for metric in closed]
    head += [Cell("items"), Cell("failed"), Cell("shots"), Cell("tokens")]
    head += [Cell("items/s"), Cell("tokens/s")]
    head += [Cell(name, "mean weight") for name in weighing]
    body = []
    for row in rows:
        line = [Cell(row.method)]
        line += [scale.cell(task, metric, row.scores.get(metric)) for metric in metrics]
        line += [scale.cell(task, metric, row.macro.get(metric)) for metric in macros]
        line += [_number(row.gap_closed.get(metric), "{:.1%}") for metric in closed]
        line += [Cell(f"{row.items:,}"), Cell(f"{row.errors:,}"), Cell(row.shots or "–")]
        line += [Cell(f"{row.tokens:,}"), _number(row.items_per_second, "{:,.1f}")]
        line += [_number(row.tokens_per_second, "{:,.1f}")]
        line += [_number(row.weights.get(name), "{:.2f}") for name in weighing]
        body.append(line)
    return Table(head, body)


def _number(value: float | None, form: str) -> Cell:
    return Cell("–" if value is None else form.format(value))


def _how(rows: list[Row], metric: str) -> str:
    """How the intervals of a metric were found, the same for all methods of a task."""
    return next(row.scores[metric].interval for row in rows if metric in row.scores)


def groups_table(rows: list[Row], scale: Scale) -> Table | None:
    """Groups by methods, in the main metric."""
    metric, task = _main(rows), rows[0].task
    names = sorted({name for row in rows for name in row.groups})
    if not metric or not names:
        return None
    head = [Cell("group", scale.unit(task, metric)), *(Cell(row.method) for row in rows)]
    body = [
        [Cell("macro average"), *(scale.cell(task, metric, row.macro.get(metric)) for row in rows)]
    ]
    for name in names:
        own = [row.groups.get(name, {}).get(metric) for row in rows]
        items = max((each.items for each in own if each), default=0)
        body.append([Cell(name, f"{items} items"), *(scale.cell(task, metric, e) for e in own)])
    return Table(head, body)
