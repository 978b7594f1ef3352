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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa

from dlf_ray.evaluation.answers import ANSWERS, shown_items
from dlf_ray.evaluation.page import Page, Table, Task
from dlf_ray.evaluation.plots import (
    BAR_HEIGHT,
    BOTTOM,
    HEIGHT,
    LEFT,
    REACHED,
    RIGHT,
    TOP,
    WIDTH,
    panels,
)
from dlf_ray.evaluation.results import PROVENANCE, UPPER_BOUND, Appearing, read, read_config
from dlf_ray.evaluation.statistics import Row, by_method, summary
from dlf_ray.evaluation.tables import Scale, details_table, groups_table, rank_of, score_table

COLOURS = 8
"""That the page tells apart; further experts begin again, dashed."""
TOKENS = 300
"""At most, of one answer."""
ALL_TOKENS = 60_000
"""About what is shown of all answers together."""


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


def _page(title: str, table: pa.Table, config: dict[str, Any]) -> Page:
    rows = summary(table)
    scale = Scale(table)
    tasks: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: rank_of(row.method)):
        tasks.setdefault(row.task, []).append(row)
    tasks = dict(sorted(tasks.items()))
    experts = _experts(table)
    limit = max(40, min(TOKENS, ALL_TOKENS // (ANSWERS * len(rows))))
    pages = []
    for name, parts in itertools.groupby(by_method(table), key=lambda each: each[0]):
        own = sorted(((m, part) for _, m, part in parts), key=lambda each: rank_of(each[0]))
        pages.append(_task(name, tasks[name], own, experts, scale, limit))
    facts, mixed = _provenance(table)
    scores = score_table(tasks, scale)
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
        details=details_table(rows, experts, scale),
        groups=groups_table(rows, scale),
        panels=drawn,
        constant=constant,
        items=shown_items(parts, rows, scale, limit),
    )


# ---------------------------------------------------------------- answers


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
