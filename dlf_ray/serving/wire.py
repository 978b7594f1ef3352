"""What fields of requests are made of: text, names and lists with limits, and exact objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from dlf_ray.params import MAX_NESTING, MAX_STOP_LENGTH, MAX_WEIGHT

MAX_PROMPTS = 2048
"""Prompts, messages, or parts of a message in one request."""
MAX_NAMES = 256
"""Models that a request says something about."""
MAX_NAME = 256
"""Characters of what is only looked up, or only logged."""
UNSUPPORTED = "unsupported"
"""The code of an error about what could only be ignored."""
Json: TypeAlias = dict[str, Any]
T = TypeVar("T")
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Name = Annotated[str, Field(max_length=MAX_NAME)]
Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]


def at_most(count: int) -> Any:
    """A limit to a list or mapping, checked before what is in it: errors of a million entries would
    keep the server busy for a minute."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > count:
            raise ValueError(f"has {len(value)} entries; at most {count} are taken")
        return value

    return BeforeValidator(check)


# The first wrong entry is as good as all of them, see `at_most`.
Listed: TypeAlias = Annotated[list[T], Field(fail_fast=True)]
Some: TypeAlias = Annotated[Listed[T], at_most(MAX_PROMPTS), Field(max_length=MAX_PROMPTS)]
ByName: TypeAlias = Annotated[dict[Name, T], at_most(MAX_NAMES), Field(max_length=MAX_NAMES)]


def _shallow(value: Json) -> Json:
    """Whatever carries an object on goes into it, and further than some depth it cannot."""
    level: list[Any] = [value]
    for _ in range(MAX_NESTING):
        inside = [each.values() if isinstance(each, dict) else each for each in level]
        level = [each for some in inside for each in some if isinstance(each, dict | list)]
    if level:
        raise ValueError(f"nests more than {MAX_NESTING} levels deep")
    return value


AnyObject: TypeAlias = Annotated[
    Json, at_most(MAX_NAMES), Field(max_length=MAX_NAMES), AfterValidator(_shallow)
]
"""One of which only others know what may be in it."""


def _whole_text(text: str) -> str:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half a surrogate pair, which is no text")
    return text


Text = Annotated[str, AfterValidator(_whole_text)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Prompt: TypeAlias = Text | Listed[int]
Prompts: TypeAlias = Text | Some[Text] | Listed[int] | Some[Listed[int]]


class Wire(BaseModel):
    """A JSON object of exactly the fields that are listed."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        given = {name: value for name, value in data.items() if value is not None}
        unknown = next((name for name in given if name not in known), None)
        # One field that there is not is enough to be told of.
        return {n: value for n, value in given.items() if n in known or n == unknown}


class Only:
    """Of a field: the values that ask for what happens anyway. Any other is refused."""

    def __init__(self, *values: Any, why: str = "this value is not supported") -> None:
        """`why` the others are not."""
        self.values = values
        self.why = why

    def check(self, value: Any) -> Any:
        # 1 is not true, and 0 not false.
        alike = (each for each in self.values if isinstance(each, bool) == isinstance(value, bool))
        if value in alike:
            return value
        shown = " or ".join(map(json.dumps, self.values))
        said = {"why": f"{self.why}; leave it out, or give {shown}"}
        raise PydanticCustomError(UNSUPPORTED, "{why}", said)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> Json:
        return {"enum": list(self.values)}
