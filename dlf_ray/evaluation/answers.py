"""The answers that a report shows: where methods disagree most, token by token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dlf_ray.evaluation.page import Answer, Item, Token
from dlf_ray.evaluation.statistics import Row
from dlf_ray.evaluation.tables import Scale, _main

ANSWERS = 4
"""Items per task whose answers are shown."""


ALIKE = "several alike"


def shown_items(
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
