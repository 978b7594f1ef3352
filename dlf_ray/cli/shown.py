"""Text as it streams, in the colours of the experts that carry it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.text import Text

from dlf_ray.cli.common import console
from dlf_ray.config import Family
from dlf_ray.engine.output import Output

COLOURS = ("green", "magenta", "cyan", "yellow", "blue", "red")
"""Of the experts, in the order of the family; text of the large model stays as it is."""


def colours_of(family: Family) -> dict[str, str]:
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(family.experts)}


def say(text: str, style: str | None = None, end: str = "\n") -> None:
    """Exactly this text: nothing in it is markup, or the name of an emoji."""
    console.print(Text(text), style=style, end=end, soft_wrap=True)


def show(piece: Output, colours: Mapping[str, str]) -> None:
    """What is new, on the same line."""
    expert = piece.experts[-1] if piece.experts else None
    say(piece.text, colours.get(expert or ""), end="")


def legend(pieces: Sequence[Output], colours: Mapping[str, str]) -> None:
    """Who carried how many tokens, and with which weight on average."""
    carried = [name for piece in pieces for name in piece.experts]
    weights = [weight for piece in pieces for weight in piece.weights]
    parts = [
        f"[{colour}]{name}[/{colour}] {carried.count(name)} tokens, mean weight "
        f"{sum(weight.get(name, 0.0) for weight in weights) / max(1, len(weights)):.2f}"
        for name, colour in colours.items()
    ]
    console.print("; ".join([*parts, f"large model alone {carried.count(None)}"]), highlight=False)
