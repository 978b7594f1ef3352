"""What shape an answer must have: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dlf_ray.params import MAX_CHOICE_LENGTH, MAX_CHOICES, MAX_REGEX, MAX_SHAPE, StructuredOutputs
from dlf_ray.serving.anyway import No
from dlf_ray.serving.wire import AnyObject, Name, Text, Wire, at_most

Schema = Annotated[Text, Field(max_length=MAX_SHAPE)]
Choice = Annotated[Text, Field(min_length=1, max_length=MAX_CHOICE_LENGTH)]


class JsonSchema(Wire):
    name: Name
    description: Schema | None = None
    strict: bool | None = None
    """It always is."""
    schema_: Annotated[AnyObject, Field(alias="schema")]


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("`json_schema` belongs to type json_schema, and to no other")
        return self

    @property
    def shape(self) -> StructuredOutputs | None:
        """As the engine takes it. Raises `ValueError` with the field's name."""
        if self.json_schema:
            try:
                return StructuredOutputs(json=self.json_schema.schema_)
            except ValueError as error:
                ours = "response_format.json_schema.schema"
                raise ValueError(str(error).replace("structured_outputs.json", ours)) from None
        return StructuredOutputs(json_object=True) if self.type == "json_object" else None


class Structured(Wire):
    """Exactly one of the first five."""

    json_: Annotated[Schema | AnyObject | None, Field(alias="json")] = None
    json_object: bool = False
    regex: Annotated[Text, Field(max_length=MAX_REGEX)] | None = None
    choice: Annotated[list[Choice], at_most(MAX_CHOICES), Field(max_length=MAX_CHOICES)] = []
    grammar: Schema | None = None
    disable_any_whitespace: No = False
    disable_additional_properties: No = False

    @property
    def shape(self) -> StructuredOutputs:
        """See `ResponseFormat.shape`."""
        return StructuredOutputs(
            json=self.json_,
            json_object=self.json_object,
            regex=self.regex,
            choice=tuple(self.choice),
            grammar=self.grammar,
        )
