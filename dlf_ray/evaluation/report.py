"""A run's results for people: a Markdown page of tables, and one HTML page with pictures.

The HTML page is one file that asks nothing of anybody: no server, no network, no script; its
pictures are SVG inside the page. What models have written is escaped by the template engine, which
escapes everything unless told otherwise, and a browser is told to load and run nothing besides.
Only sums and a handful of answers go into the page, so that its size does not grow with the run.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa

from dlf_ray.evaluation.plots import (
    BAR_HEIGHT,
    BOTTOM,
    HEIGHT,
    LEFT,
    REACHED,
    RIGHT,
    TOP,
    WIDTH,
    Panel,
    panels,
)
from dlf_ray.evaluation.results import (
    PROVENANCE,
    UPPER_BOUND,
    Appearing,
    Estimate,
    Row,
    by_method,
    read,
    read_config,
    summary,
)

COLOURS = 8
"""That the page tells apart; further experts begin again, dashed."""
ANSWERS = 4
"""Items per task whose answers are shown."""
TOKENS = 300
"""At most, of one answer."""
ALL_TOKENS = 60_000
"""About what is shown of all answers together."""
ALIKE = "several alike"


def write_report(folder: str | Path) -> tuple[Path, Path]:
    """Writes `report.md` and `report.html` into the folder of a run; their paths.

    Raises `ValueError` where the folder holds no results.
    """
    folder = Path(folder)
    page = _page(folder.resolve().name, read(folder), read_config(folder))
    markdown, html = folder / "report.md", folder / "report.html"
    for path, text in ((markdown, _markdown(page)), (html, _html(page))):
        with Appearing(path) as file:
            file.write(text.encode())
    return markdown, html


# ---------------------------------------------------------------- what a page shows


@dataclass(frozen=True)
class Whisker:
    """A mean and its interval, from 0 at the left end of the picture to 100 at the right."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    text: str
    small: str = ""
    notes: str = ""
    """What sets this cell apart from the others of its column."""
    whisker: Whisker | None = None


@dataclass(frozen=True)
class Table:
    head: list[Cell]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Token:
    text: str
    expert: str | None
    hover: str


@dataclass(frozen=True)
class Answer:
    """What one method said to one item."""

    method: str
    score: str
    good: bool | None
    """Whether a metric of 0 or 1 was 1."""
    notes: list[str]
    tokens: list[Token]
    cut: str


@dataclass(frozen=True)
class Item:
    name: str
    about: str
    answers: list[Answer]


@dataclass(frozen=True)
class Task:
    name: str
    about: str
    details: Table
    groups: Table | None
    panels: list[Panel]
    constant: list[str]
    """Methods whose weights never change, in words."""
    items: list[Item]


@dataclass(frozen=True)
class Page:
    title: str
    facts: list[tuple[str, str]]
    mixed: list[str]
    """What should be the same in all rows and is not."""
    config: str
    scores: Table
    closes_gap: bool
    experts: list[str]
    tasks: list[Task]


def _page(title: str, table: pa.Table, config: dict[str, Any]) -> Page:
    rows = summary(table)
    scale = Scale(table)
    tasks: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: _rank(row.method)):
        tasks.setdefault(row.task, []).append(row)
    tasks = dict(sorted(tasks.items()))
    experts = _experts(table)
    limit = max(40, min(TOKENS, ALL_TOKENS // (ANSWERS * len(rows))))
    pages = []
    for name, parts in itertools.groupby(by_method(table), key=lambda each: each[0]):
        own = sorted(((m, part) for _, m, part in parts), key=lambda each: _rank(each[0]))
        pages.append(_task(name, tasks[name], own, experts, scale, limit))
    facts, mixed = _provenance(table)
    scores = _scores(tasks, scale)
    return Page(
        title=title,
        facts=facts,
        mixed=mixed,
        config=json.dumps(config, indent=2, ensure_ascii=False),
        scores=scores,
        closes_gap=any(cell.text == "gap closed" for cell in scores.head),
        experts=experts,
        tasks=pages,
    )


def _rank(method: str) -> tuple[int, str]:
    """The order in which methods are shown: single models, fusion, the bound."""
    order = ["large", "base", "expert", "static"]
    kind = method.split(":")[0]
    if method == UPPER_BOUND:
        return len(order) + 1, method
    return order.index(kind) if kind in order else len(order), method


def _experts(table: pa.Table) -> list[str]:
    """All experts, in the order of the family as far as rows tell."""
    names: dict[str, None] = {}
    for each in _distinct_lists(table["expert_names"]):
        names.update(dict.fromkeys(each))
    return list(names)


def _distinct_lists(column: pa.ChunkedArray) -> list[tuple[str, ...]]:
    found = {tuple(each or ()) for each in column.to_pylist()}
    return sorted(found, key=lambda names: (-len(names), names))


def _distinct(column: pa.ChunkedArray) -> list[str]:
    return sorted(str(each) for each in column.unique().to_pylist() if each is not None)


def _provenance(table: pa.Table) -> tuple[list[tuple[str, str]], list[str]]:
    facts, mixed = [], []
    for name in PROVENANCE:
        values = _distinct(table[name])
        if name == "models":
            values, several = _models(values)
            mixed += several
        # Each method may have a rule of its own.
        elif len(values) > 1 and name != "rule":
            mixed.append(name.replace("_", " "))
        if values:
            facts.append((name.replace("_", " "), "\n".join(values)))
    facts.append(("rows", f"{len(table):,}"))
    return facts, mixed


def _models(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Each model of any row, a line each, and what is called alike but is not the same; each task
    may have an upper bound of its own."""
    found: dict[str, dict[str, None]] = {}
    for text in texts:
        for name, value in json.loads(text).items():
            found.setdefault(name, {})[_plain(value)] = None
    order = [*(name for name in ("large", "base") if name in found), *found]
    lines = [f"{name}: {value}" for name in dict.fromkeys(order) for value in found[name]]
    several = [
        f"model {name}" for name, each in found.items() if len(each) > 1 and name != UPPER_BOUND
    ]
    return lines, several


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------- tables


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


def _scores(tasks: dict[str, list[Row]], scale: Scale) -> Table:
    """Methods by tasks: the main metric of each."""
    mains = {name: _main(rows) for name, rows in tasks.items()}
    head, usual = [Cell("method")], {}
    for name, rows in tasks.items():
        metric = mains[name]
        usual[name] = [_common(each) for each in zip(*(_about(row) for row in rows), strict=True)]
        unit = scale.unit(name, metric) if metric else "no score"
        head.append(Cell(name, unit, ", ".join(filter(None, usual[name]))))
    methods = sorted({row.method for rows in tasks.values() for row in rows}, key=_rank)
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


def _task(
    name: str,
    rows: list[Row],
    parts: list[tuple[str, pa.Table]],
    experts: list[str],
    scale: Scale,
    limit: int,
) -> Task:
    versions = sorted({each for _, part in parts for each in _distinct(part["task_version"])})
    drawn, constant = panels(parts, experts)
    return Task(
        name=name,
        about=f"version {', '.join(versions)}" if versions else "",
        details=_details(rows, experts, scale),
        groups=_groups(rows, scale),
        panels=drawn,
        constant=constant,
        items=_items(parts, rows, scale, limit),
    )


def _details(rows: list[Row], experts: list[str], scale: Scale) -> Table:
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


def _groups(rows: list[Row], scale: Scale) -> Table | None:
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


# ---------------------------------------------------------------- answers


def _items(
    parts: list[tuple[str, pa.Table]], rows: list[Row], scale: Scale, limit: int
) -> list[Item]:
    """A few items of one task: where the methods disagree most, then by name."""
    metric, task = _main(rows), rows[0].task
    values: dict[str, list[float]] = {}
    for _, part in parts:
        pairs = zip(part["item"].to_pylist(), part["scores"].to_pylist(), strict=True)
        for item, scores in pairs:
            own = values.setdefault(item, [])
            own += [value for name, value in scores or [] if name == metric]
    order = sorted(values, key=lambda item: (-np.var(values[item] or [0.0]).round(9), item))
    return [_item(name, parts, task, metric, scale, limit) for name in order[:ANSWERS]]


def _item(
    name: str,
    parts: list[tuple[str, pa.Table]],
    task: str,
    metric: str | None,
    scale: Scale,
    limit: int,
) -> Item:
    found: list[dict[str, Any]] = []
    for _, part in parts:
        index = part["item"].index(name).as_py()
        if index >= 0:
            found += part.slice(index, 1).to_pylist()
    about = [f"group {each}" for each in sorted({row["group"] for row in found} - {None})]
    hashes = sorted({row["prompt_hash"] for row in found} - {None})
    about += [f"prompt {' and '.join(hashes)}"] if hashes else []
    return Item(name, ", ".join(about), [_answer(row, task, metric, scale, limit) for row in found])


def _answer(row: dict[str, Any], task: str, metric: str | None, scale: Scale, limit: int) -> Answer:
    score = dict(row["scores"] or []).get(metric)
    notes = [f"ended by {row['finish_reason']}"] * bool(row["finish_reason"])
    notes += [_visible(f"failed: {row['error']}")] * (row["error"] is not None)
    if row["choice"] is not None:
        logprobs = ", ".join(f"{each:.2f}" for each in row["logprobs"] or [])
        notes.append(
            f"choice {row['choice']}" + f" of log-probabilities {logprobs}" * bool(logprobs)
        )
    carriers = _carriers(row)
    notes += [_carried(carriers)] * any(carriers)
    tokens, cut = _tokens(row, carriers, limit)
    return Answer(
        method=row["method"],
        score="" if score is None or not metric else scale.show(task, metric, score),
        good=bool(score) if score in (0.0, 1.0) and metric else None,
        notes=notes,
        tokens=tokens,
        cut=cut,
    )


def _carriers(row: dict[str, Any]) -> list[str | None]:
    """Who carried each token; where several weigh the same, nobody did alone."""
    experts, weights = list(row["experts"] or []), row["weights"] or []
    for index, own in enumerate(weights[: len(experts)]):
        loud = sorted((abs(weight or 0.0) for weight in own), reverse=True)
        if len(loud) > 1 and loud[0] == loud[1] > 0:
            experts[index] = ALIKE
    return experts


def _carried(experts: Sequence[str | None]) -> str:
    """The experts' shares of an answer, in words."""
    counts = {each: experts.count(each) for each in experts}
    ordered = sorted(counts, key=lambda each: (-counts[each], each or ""))
    return ", ".join(
        f"{name or 'large alone'} {counts[name] / len(experts):.0%}" for name in ordered
    )


def _tokens(
    row: dict[str, Any], experts: Sequence[str | None], limit: int
) -> tuple[list[Token], str]:
    pieces, text = row["pieces"] or [], row["text"] or ""
    if not pieces:
        room = 6 * limit
        more = f"… {len(text) - room:,} more characters" if len(text) > room else ""
        return [Token(_visible(text[:room]), None, "")], more
    experts = experts or [None] * len(pieces)
    weights = row["weights"] or [[]] * len(pieces)
    names = row["expert_names"] or []
    tokens = [
        Token(_visible(piece or ""), expert, _hover(names, own or []))
        for piece, expert, own in zip(pieces[:limit], experts[:limit], weights[:limit], strict=True)
    ]
    more = f"… {len(pieces) - limit:,} more tokens" if len(pieces) > limit else ""
    return tokens, more


def _hover(names: Sequence[str], weights: Sequence[float]) -> str:
    loud = [f"{name} {weight:.2f}" for name, weight in zip(names, weights, strict=False) if weight]
    return ", ".join(loud) or ("large alone" if weights else "")


def _visible(text: str) -> str:
    """Line ends as arrows, and a sign for each control character."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), text)
    return text.replace("\x7f", "\u2421").replace("\n", "↵\n")


# ---------------------------------------------------------------- pages


def _html(page: Page) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    number = {name: index for index, name in enumerate(page.experts)}

    def colour(expert: str | None) -> str:
        """The class of an expert; of one that no row lists, that of the large model alone."""
        if expert not in number:
            return ""
        again = " again" if number[expert] >= COLOURS else ""
        return f"e{number[expert] % COLOURS}{again}"

    return environment.get_template("report.html.j2").render(
        page=page,
        colour=colour,
        frame={"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        width=WIDTH,
        height=HEIGHT,
        bar_height=BAR_HEIGHT,
        reached=f"{REACHED:.0%}",
        intervals=INTERVALS,
    )


INTERVALS = (
    "In brackets: 95% confidence intervals, Wilson's where every value of a metric is 0 or 1, "
    "else from a bootstrap over the items. Failed items are in no mean."
)


def _markdown(page: Page) -> str:
    lines = [f"# {_md(page.title)}", ""]
    lines += [f"- {name}: {_md(value.replace(chr(10), '; '))}" for name, value in page.facts]
    lines += ["", "## Scores", "", *_md_table(page.scores), "", INTERVALS, ""]
    for task in page.tasks:
        lines += [f"## {_md(task.name)}", ""]
        lines += [_md(task.about), ""] if task.about else []
        lines += [*_md_table(task.details), ""]
        if task.groups:
            lines += [*_md_table(task.groups), ""]
    return "\n".join(lines)


def _md_table(table: Table) -> list[str]:
    head = [" ".join(filter(None, (_md(c.text), _md(c.small), _md(c.notes)))) for c in table.head]
    rule = ["---"] + ["---:"] * (len(head) - 1)
    body = [
        [
            " ".join(filter(None, (_md(c.text), _md(c.small), c.notes and f"({_md(c.notes)})")))
            for c in row
        ]
        for row in table.rows
    ]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *body)]


def _md(text: str) -> str:
    """Text that Markdown takes as text."""
    escaped = re.sub(r"([\\`*_\[\]|#])", r"\\\1", text)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
