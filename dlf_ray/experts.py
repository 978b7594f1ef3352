"""Experts that join or leave a family while it is served.

What is wanted is a note in the cluster's key-value store, one for each family. Every replica brings
its engine in line with it, those that Serve starts later too.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import msgspec
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from dlf_ray.config import ExpertSpec, converted
from dlf_ray.engine import Engine
from dlf_ray.frontend import EngineError

EVERY_S = 1.0
"""How often a replica looks at the note."""
Expert = dict[str, Any]
"""As in a family file."""
Wanted = dict[str, Expert | None]
"""By name: an expert to have, or None for one to do without."""
log = logging.getLogger("ray.serve")


def wanted(family: str) -> Wanted:
    """The note of a family, by the name of its deployment."""
    note = _internal_kv_get(_key(family))
    return msgspec.json.decode(note, type=Wanted) if note else {}


def want(family: str, name: str, expert: Expert | None) -> None:
    """Notes an expert to have, or with None to do without.

    Raises `ValueError` where it is none.
    """
    if expert is not None:
        spec = converted(expert, ExpertSpec)
        if spec.trust_remote_code:
            raise ValueError("`trust_remote_code` can be set in the family file only")
    _internal_kv_put(_key(family), msgspec.json.encode({**wanted(family), name: expert}))


def _key(family: str) -> bytes:
    return f"dlf_ray:experts:{family}".encode()


class Follower:
    """Keeps an engine in line with the note of its family, from a thread of its own."""

    def __init__(self, engine: Engine, family: str) -> None:
        self._engine = engine
        self._family = family
        self._failed: dict[str, tuple[Expert, str]] = {}
        """Experts that could not join as they were asked for, and why."""
        self._changing: str | None = None
        threading.Thread(target=self._run, name="dlf-experts", daemon=True).start()

    def states(self) -> dict[str, str]:
        """Of each expert: ready, changing, or why it could not join."""
        states = dict.fromkeys(self._engine.family.experts, "ready")
        states |= {name: f"failed: {why}" for name, (_, why) in self._failed.items()}
        return states | ({self._changing: "changing"} if self._changing else {})

    def _run(self) -> None:
        while True:
            time.sleep(EVERY_S)
            try:
                note = wanted(self._family)
            except Exception:  # the store is away for a while, as when Ray's head restarts
                log.exception("cannot read which experts are wanted")
                continue
            for name, expert in note.items():
                there = name in self._engine.family.experts
                if expert is None:
                    self._failed.pop(name, None)
                    if there:
                        self._change(name, None)
                elif not there and self._failed.get(name, ({}, ""))[0] != expert:
                    self._change(name, expert)

    def _change(self, name: str, expert: Expert | None) -> None:
        self._changing = name
        try:
            if expert is None:
                self._engine.remove_expert(name)
            else:
                self._engine.add_expert(name, expert)
            log.info("expert %r has %s", name, "joined" if expert else "left")
        except (ValueError, EngineError) as error:
            log.warning("expert %r: %s", name, error)
            if expert is not None:
                self._failed[name] = (expert, str(error))
        finally:
            self._changing = None
