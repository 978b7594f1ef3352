"""`dlf chat`: a conversation with a family, line by line.

Lines come from Python's own `input`, with `readline` where there is a terminal: it edits and
recalls lines, reads pipes as well, and needs no library of its own.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from dlf_ray.cli.common import (
    Alone,
    ChatTemplate,
    Experts,
    FamilyFile,
    Local,
    MaxTokens,
    RuleName,
    Seed,
    SelectName,
    ShowWeights,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    complain,
    console,
    engine_of,
    errors,
    fusion_of,
    names_of,
    sampling_of,
)
from dlf_ray.cli.shown import colours_of, legend, say, show
from dlf_ray.config import Family
from dlf_ray.engine.frontend import BaseEngine
from dlf_ray.engine.options import FusionOptions, resolve
from dlf_ray.engine.output import EngineError, Output
from dlf_ray.params import SamplingParams
from dlf_ray.rules import RULES

HELP = """\
/experts [a,b|all|none]  which experts take part, or which do now
/rule [NAME]             how weights are found
/system [TEXT]           what the models are told first; nothing without a text
/reset                   forget the conversation
/help                    this
/quit                    end, as ctrl-D; ctrl-C ends an answer only"""


def chat(
    family: FamilyFile,
    system: System = None,
    chat_template: ChatTemplate = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    rule: RuleName = None,
    select: SelectName = None,
    experts: Experts = None,
    alone: Alone = None,
    show_weights: ShowWeights = False,
    local: Local = False,
) -> None:
    """Talk with a family; /help lists what can be changed on the way."""
    with errors():
        loaded = Family.from_yaml(family)
        given = sampling_of(max_tokens, temperature, top_p, top_k, seed, stop)
        options = fusion_of(rule, select, experts, alone)
        resolve(loaded, options)  # what is wrong shows before anything is loaded
        with engine_of(loaded, local) as engine:
            engine.templates(chat_template)
            sampling = engine.default_sampling(**given)
            talk = Talk(engine, sampling, options, system, chat_template, show_weights)
            talk.run()


@dataclass
class Talk:
    """One conversation, and how it is answered."""

    engine: BaseEngine
    sampling: SamplingParams
    options: FusionOptions
    system: str | None
    template: str | None
    weights: bool
    """Whether each answer is followed by who carried it."""
    history: list[dict[str, str]] = field(default_factory=list)
    """What was said, without the system's message."""

    def run(self) -> None:
        """Until the input ends, or /quit."""
        for line in _lines():
            try:
                if line == "/quit":
                    return
                self._command(line) if line.startswith("/") else self._answer(line)
            except EngineError:
                raise
            except (ValueError, RuntimeError) as error:  # the line may be tried again
                complain(str(error))

    def _answer(self, line: str) -> None:
        """The next two messages; where that fails, nothing was said."""
        said = [*self.history, {"role": "user", "content": line}]
        first = [{"role": "system", "content": self.system}] if self.system is not None else []
        made = self.engine.render([*first, *said], chat_template=self.template)
        whole: list[Output] = []
        colours = colours_of(self.engine.family)
        stream: Any = self.engine.stream(made.prompt, made.ending(self.sampling), **self.options)
        with _interruptible() as interrupted, closing(stream):
            try:
                for piece in stream:
                    show(piece, colours)
                    whole.append(piece)
                    if interrupted():
                        break
            finally:
                console.print()
        if interrupted():
            say("(stopped)", "dim")
        if self.weights:
            legend(whole, colours)
        text = "".join(piece.text for piece in whole)
        self.history = [*said, {"role": "assistant", "content": text}]

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "experts": self._experts,
            "rule": self._rule,
            "system": self._system,
            "reset": self._reset,
            "help": lambda _: say(HELP, "dim"),
        }
        if name not in commands:
            listed = ", ".join(f"/{each}" for each in (*commands, "quit"))
            raise ValueError(f"there is no /{name}; there are {listed}")
        commands[name](rest.strip())

    def _experts(self, listed: str) -> None:
        if listed:
            names = {"all": list(self.engine.family.experts), "none": []}
            self._change(experts=names.get(listed, names_of(listed)))
        found = resolve(self.engine.family, self.options)
        say(f"experts: {', '.join(found.experts) or found.alone or 'none'}", "dim")

    def _rule(self, name: str) -> None:
        if name and name not in RULES:
            raise ValueError(f"there is no rule {name!r}; there are {', '.join(RULES)}")
        if name:
            self._change(rule=name)
        say(f"rule: {resolve(self.engine.family, self.options).rule}", "dim")

    def _system(self, text: str) -> None:
        self.system = text or None
        say(f"system: {text or 'nothing'}", "dim")

    def _reset(self, _: str) -> None:
        self.history = []
        say("the conversation is forgotten", "dim")

    def _change(self, **options: Any) -> None:
        """Takes options on; a model that was alone is not any more."""
        merged: Any = {**self.options, **options}
        merged.pop("alone", None)
        resolve(self.engine.family, merged)
        self.options = merged


def _lines() -> Iterator[str]:
    """What is typed, but for empty lines."""
    typed = sys.stdin.isatty()
    if typed:
        with suppress(ImportError):  # where there is none, lines are plain
            import readline  # noqa: F401  # `input` uses it once it is there
        say("/help lists the commands; ctrl-D ends", "dim")
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:  # the line is dropped, as shells do
            console.print()
            continue
        if line:
            yield line


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Whether ctrl-C was pressed. It is asked for between two pieces, since an engine that is cut
    off in the middle of a step could not go on; pressed twice, it ends the program."""
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
