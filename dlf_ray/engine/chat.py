"""Conversations as prompts: chat templates, and what ends a turn by them.

The models of a family may have been taught different templates: each reads the conversation in its
own form. All are tokenized as the large model does it, but for those whose vocabulary differs a
little, whose templates may be made of just these tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from dlf_ray.config import LARGE
from dlf_ray.messages import Limits
from dlf_ray.params import SamplingParams

Message: TypeAlias = "Mapping[str, Any]"
"""`role` and `content`, and whatever else a template asks for."""
Conversation: TypeAlias = "Sequence[Message]"
Templates: TypeAlias = "str | Mapping[str, str]"
"""A Jinja text or a file of one for all models; or one for each model that is named."""
SENTINEL = "aperiodic sentinel"
"""What an assistant is made to say, for what the template writes after it."""
VARIABLES = ("tools", "documents")
"""Arguments of transformers' rendering that are there to reach the template."""


@dataclass(frozen=True)
class Rendered:
    """One conversation, ready for `generate`, `stream`, `agenerate` and `astream`."""

    prompt: list[int] | dict[str, list[int]]
    """Of all models, or of each where their templates differ."""
    ids: list[int]
    """The large model's, or the first one's where that is not loaded."""
    text: str
    """What `ids` read."""
    ends: tuple[int, ...]
    """Tokens that end a turn by the templates."""

    def ending(self, sampling: SamplingParams) -> SamplingParams:
        """The same parameters; the end of the turn ends the answer too."""
        if sampling.ignore_eos or not self.ends:
            return sampling
        ends = (*sampling.stop_token_ids, *self.ends)
        return msgspec.structs.replace(sampling, stop_token_ids=ends)


def template_text(given: str) -> str:
    """A Jinja text as it is, or that of a file. Raises `ValueError` where it is neither."""
    if "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the chat template {given!r} is no Jinja text and no file: {error}"
        ) from None


def assigned(
    names: Iterable[str], own: Mapping[str, str], given: Templates | None, tokenizer: Any
) -> dict[str, str]:
    """The chat template of each model: what is `given` for all or for it, else its own, else the
    large model's. Raises `ValueError` where that has none."""
    if isinstance(given, str):
        return dict.fromkeys(names, template_text(given))
    own = {**own, **{name: template_text(each) for name, each in (given or {}).items()}}
    found = {name: own.get(name) or own.get(LARGE) or _template_of(tokenizer) for name in names}
    if not all(found.values()):
        raise ValueError(
            "the large model has no chat template: give one as `chat_template`, a Jinja text or a "
            "file of one, or put a chat_template.jinja into the model's folder"
        )
    return {name: template for name, template in found.items() if template}


def render(
    tokenizer: Any,
    tokenizers: Mapping[str, Any],
    templates: Mapping[str, str],
    limits: Limits,
    messages: Conversation,
    kwargs: Mapping[str, Any] | None = None,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> Rendered:
    """A conversation as each model's prompt; `templates` as from `assigned`, `tokenizers` those of
    models that have one of their own, beside the large one's.

    Raises `ValueError` where it does not fit a template, or that not its model.
    """
    flags = {
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
    }
    made: dict[tuple[str, str | None], tuple[str, list[int]]] = {}
    ways = {name: (each, name if name in tokenizers else None) for name, each in templates.items()}
    for name, way in ways.items():
        if way in made:
            continue
        speaks = tokenizers.get(name, tokenizer)
        try:
            text = rendered(speaks, way[0], messages, kwargs, **flags)
        except ValueError as error:
            whose = f" (model {name!r})" if len({*templates.values()}) > 1 else ""
            raise ValueError(f"{error}{whose}") from None
        made[way] = text, encoded(speaks, text)
    own = {name: made[way][1] for name, way in ways.items()}
    for name, ids in own.items():
        if not knows(limits, name, ids, of_its_own=name in tokenizers):
            raise ValueError(
                f"model {name!r} does not have all tokens of its chat template: give another one "
                "as `chat_template`"
            )
    first = LARGE if LARGE in own else next(iter(own))
    return Rendered(
        prompt=own if any(ids != own[first] for ids in own.values()) else own[first],
        ids=own[first],
        text=made[ways[first]][0],
        ends=ends_of(tokenizer, templates, limits, kwargs),
    )


def rendered(
    tokenizer: Any,
    template: str,
    messages: Conversation,
    kwargs: Mapping[str, Any] | None = None,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """A conversation as the text of a prompt. Raises `ValueError` where the template refuses it."""
    if not messages:
        raise ValueError("`messages` is empty: give at least one message")
    if kwargs:
        taken = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {*VARIABLES}
        if clash := sorted(taken & kwargs.keys()):
            raise ValueError(f"`chat_template_kwargs`: {clash[0]!r} is no variable of templates")
    plain = [_plain(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            plain,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **(kwargs or {}),
        )
    except Exception as error:  # a template refuses by whatever its author chose to raise
        raise ValueError(f"`messages` do not fit the chat template: {error}") from None
    return str(text)


def encoded(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a rendered conversation: the template writes the BOS token, if there is one."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def turn_ends(
    tokenizer: Any, template: str, kwargs: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """The special token that the template writes after what an assistant says, if it writes one."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": SENTINEL}]
    try:
        text = rendered(tokenizer, template, messages, kwargs, add_generation_prompt=False)
    except ValueError:  # one that takes no answers knows no end of them
        return ()
    _, found, after = text.rpartition(SENTINEL)
    first = encoded(tokenizer, after.lstrip())[:1] if found else []
    special = first and not tokenizer.decode(first, skip_special_tokens=True)
    return tuple(first) if special else ()


def ends_of(
    tokenizer: Any,
    templates: Mapping[str, str],
    limits: Limits,
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """What ends a turn by any of the templates, beside what ends the texts of all models."""
    found: set[int] = set()
    for template in {*templates.values()}:
        found.update(turn_ends(tokenizer, template, kwargs))
    anyway = [token for token in found if all(token in ends for ends in limits.ends.values())]
    return tuple(sorted(token for token in found.difference(anyway) if token < limits.vocab))


def knows(limits: Limits, name: str, ids: Sequence[int], *, of_its_own: bool = False) -> bool:
    """Whether a model has all of these tokens, which are the large one's or `of_its_own`."""
    if of_its_own:
        return all(0 <= token < limits.vocabs[name] for token in ids)
    return all(0 <= token < limits.vocab for token in ids) and set(ids).isdisjoint(
        limits.unlike.get(name, ())
    )


def _template_of(tokenizer: Any) -> str | None:
    try:
        return str(tokenizer.get_chat_template())
    except (AttributeError, ValueError):  # what they say without one
        return None


def _plain(message: Message) -> dict[str, Any]:
    """With its content as one text, as most templates take it, where it came in parts."""
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return dict(message)
    texts = [part["text"] for part in content if isinstance(part, Mapping) and "text" in part]
    if len(texts) < len(content):
        raise ValueError("`content` must be text, or parts of type text")
    return {**message, "content": "".join(map(str, texts))}
