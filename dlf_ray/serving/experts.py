"""Experts that join or leave a family while it is served.

What is wanted is a list of changes in the cluster's key-value store, one list for each family. Each
change has a number, and none is ever overwritten: the store puts a key only where there is none,
so that of two who write at once one gets the next number. Every replica brings its engine in line
with the list, those that Serve starts later too. A change is tried once, and the same again is a
new one: an expert that could not join can be asked for once more, or taken out.

Serve's own way, `user_config`, is not used: it belongs to a deployment's configuration, so that
deploying the file again would undo what was asked for since, and a replica that is being
reconfigured, which takes as long as a model takes to load, counts as one that does not serve.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from dlf_ray.config import ExpertSpec, converted
from dlf_ray.engine.engine import Engine

EVERY_S = 1.0
"""How often a replica looks for changes."""
READY, CHANGING, FAILED = "ready", "changing", "failed: "
"""States of an expert; the last is followed by the reason."""
Expert = dict[str, Any]
"""As in a family file."""
log = logging.getLogger("ray.serve")


class Change(msgspec.Struct, frozen=True):
    """One thing that was asked for."""

    name: str
    expert: Expert | None
    """What it is, as in a family file; None: there is to be none."""


@dataclass(frozen=True)
class Report:
    """What one replica has done about the changes."""

    replica: str
    seen: int = 0
    """The number of the last change that it knows of."""
    states: Mapping[str, str] = field(default_factory=dict)
    """Of each expert that is in its engine, or should be."""


def want(family: str, name: str, expert: Expert | None) -> None:
    """Notes that an expert is to join a family, or with None to leave it.

    `family` is the name of its deployment. Raises `ValueError` where the expert is none.
    """
    if expert is not None:
        spec = converted(expert, ExpertSpec)
        if spec.trust_remote_code:
            raise ValueError("`trust_remote_code` can be set in the family file only")
    note = msgspec.json.encode(Change(name, expert))
    number = 1
    while _internal_kv_put(_key(family, number), note, overwrite=False):  # there was one already
        number += 1


def changes(family: str, after: int = 0) -> list[Change]:
    """What was asked for since the change of number `after`; the first one has number 1."""
    found: list[Change] = []
    while note := _internal_kv_get(_key(family, after + len(found) + 1)):
        found.append(msgspec.json.decode(note, type=Change))
    return found


def _key(family: str, number: int) -> bytes:
    return f"dlf_ray:experts:{family}:{number}".encode()


def overall(
    noted: Sequence[Change], reports: Sequence[Report]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each expert with its `state`, that of the replica where it is worst, and with those of all
    `replicas`; one that is to leave is there as long as any replica has it."""
    last = {change.name: number for number, change in enumerate(noted, 1)}
    for name in dict.fromkeys([*(name for each in reports for name in each.states), *last]):
        number = last.get(name, 0)
        out = number > 0 and noted[number - 1].expert is None
        states = {}
        for each in reports:
            if each.seen < number:
                states[each.replica] = CHANGING
            elif not out or name in each.states:
                states[each.replica] = each.states.get(name, CHANGING)
        if states:
            yield name, {"state": max(states.values(), key=_badness), "replicas": states}


def _badness(state: str) -> int:
    return {READY: 0, CHANGING: 1}.get(state, 2)


class Follower:
    """Keeps an engine in line with what is wanted of its family."""

    def __init__(self, engine: Engine, family: str, replica: str) -> None:
        self._engine = engine
        self._family = family
        self._pending: dict[str, Expert | None] = {}
        """The last change of each name, as long as it was not tried."""
        self._joined: dict[str, Expert] = {}
        """What those are that are there by a change."""
        self._failed: dict[str, str] = {}
        self.report = Report(replica)
        self._tell(0)

    def start(self) -> None:
        """Looks for changes from now on, from a thread of its own."""
        threading.Thread(target=self._run, name="dlf-experts", daemon=True).start()

    def _tell(self, seen: int) -> None:
        """Replaces the report, which others read meanwhile, as a whole."""
        states = dict.fromkeys(self._engine.family.experts, READY)
        states |= {name: FAILED + why for name, why in self._failed.items()}
        states |= dict.fromkeys(self._pending, CHANGING)
        self.report = Report(self.report.replica, seen, states)

    def _run(self) -> None:
        while True:
            time.sleep(EVERY_S)
            try:
                news = changes(self._family, after=self.report.seen)
            except Exception:  # the store is away for a while, as when Ray's head restarts
                log.exception("cannot read which experts are wanted")
                continue
            self.follow(news)

    def follow(self, news: Sequence[Change]) -> None:
        """Takes in changes and does the last one of each name."""
        if not news:
            return
        self._pending = {change.name: change.expert for change in news}
        seen = self.report.seen + len(news)
        self._tell(seen)
        for name, expert in list(self._pending.items()):
            self._change(name, expert)
            del self._pending[name]
            self._tell(seen)

    def _change(self, name: str, expert: Expert | None) -> None:
        self._failed.pop(name, None)
        there = name in self._engine.family.experts
        try:
            if there and (expert is None or expert != self._joined.get(name)):
                self._joined.pop(name, None)
                self._engine.remove_expert(name)
                there = False
                log.info("expert %r has left", name)
            if expert is not None and not there:
                self._engine.add_expert(name, expert)
                self._joined[name] = expert
                log.info("expert %r has joined", name)
        except Exception as error:  # whatever it is, the next change may mend it
            log.warning("expert %r: %s", name, error)
            self._failed[name] = str(error)
