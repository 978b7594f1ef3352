"""How items are put to the models: as plain text, or as the messages of a conversation.

The options and what they do are lm-evaluation-harness's (0.4.13, `ConfigurableTask.fewshot_context`
and `construct_requests`).
"""

from __future__ import annotations

from dataclasses import dataclass

from dlf_ray.evaluation.tasks import Item


@dataclass(frozen=True)
class Asking:
    """Of all items of a run."""

    chat: bool = False
    """By chat template."""
    system: str | None = None
    """What the models are told first."""
    multiturn: bool = False
    """In a chat, examples are turns of their own; else all are in the user's one message."""

    def text(self, item: Item, shots: bool = True) -> str:
        """The prompt as plain text, with or without its examples."""
        return self._first(item) + (item.shots if shots else "") + item.body

    def messages(self, item: Item, shots: bool = True) -> list[dict[str, str]]:
        """The same as a conversation, which the model is to go on with."""
        first = self._first(item)
        turns = [_said("system", first)] if first else []
        if not (shots and self.multiturn):
            return [*turns, _said("user", (item.shots if shots else "") + item.body)]
        for question, answer in item.examples:
            turns += [_said("user", question), _said("assistant", answer.removeprefix(" "))]
        return [*turns, _said("user", item.body)]

    def choice(self, choice: str) -> str:
        """What is judged of a choice: in a chat, an answer begins without the space."""
        return choice.removeprefix(" ") if self.chat else choice

    def _first(self, item: Item) -> str:
        """The instruction, then what the task says of itself."""
        one, two = self.system or "", item.preamble
        spaced = not one or not two or one[-1].isspace() or two[0].isspace()
        return one + two if spaced else f"{one}\n\n{two}"


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
