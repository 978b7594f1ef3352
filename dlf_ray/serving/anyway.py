"""Fields of OpenAI's and vLLM's requests that are taken, and change nothing: labels, and those of
which one value asks for what happens anyway. Any other value is refused by the field's name.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from dlf_ray.serving.wire import AnyObject, Listed, Name, Only, Wire, at_most

MAX_LABELS, MAX_LABEL = 16, 512
"""Of a request's metadata, and characters of each, as at OpenAI."""
MAX_TOOLS = 128
Label = Annotated[str, Field(max_length=MAX_LABEL)]
No = Annotated[bool, Only(False)]
Yes = Annotated[bool, Only(True)]
NO_TOOLS = "tool calling is not supported"
HINTS = {
    "chat_template": "it is set where the model is served",
    "guided_json": 'write `structured_outputs`: {"json": ...}',
    "guided_regex": 'write `structured_outputs`: {"regex": ...}',
    "guided_choice": 'write `structured_outputs`: {"choice": ...}',
    "guided_grammar": 'write `structured_outputs`: {"grammar": ...}',
    "prompt_logprobs": "ask /v1/completions with `echo` and `logprobs`",
    "reasoning_effort": "give what the chat template knows as `chat_template_kwargs`",
    "request_id": "give it in the header X-Request-Id",
}
"""What to do instead of giving a field that is not supported."""


class Anyway(Wire):
    """What completions and chat completions have in common."""

    user: Name | None = None
    """Goes to the log."""
    safety_identifier: Name | None = None
    """OpenAI's new name of `user`."""
    metadata: (
        Annotated[dict[Name, Label], at_most(MAX_LABELS), Field(max_length=MAX_LABELS)] | None
    ) = None
    prompt_cache_key: Name | None = None
    session_id: Name | None = None
    store: No = False
    service_tier: Annotated[str, Only("auto", "default")] = "auto"
    prompt_cache_retention: Annotated[str, Only("in_memory")] = "in_memory"
    priority: Annotated[int, Only(0)] = 0
    use_beam_search: No = False
    early_stopping: No = False
    length_penalty: Annotated[float, Only(1.0)] = 1.0
    watermarking: No = False
    bad_words: Annotated[list[str], Only([])] = []
    detokenize: Yes = True
    skip_special_tokens: Yes = True
    spaces_between_special_tokens: Yes = True
    include_stop_str_in_output: No = False
    return_token_ids: No = False
    return_tokens_as_token_ids: No = False
    return_token_offsets: No = False
    stream_interval: Annotated[int, Only(1)] = 1


class AnywayInText(Anyway):
    """Of completions."""

    suffix: Annotated[str, Only("")] = ""
    add_special_tokens: Yes = True


class AnywayInChat(Anyway):
    """Of chat completions."""

    tools: Annotated[Listed[AnyObject], at_most(MAX_TOOLS), Field(max_length=MAX_TOOLS)] = []
    """Taken where they are not to be called: with `tool_choice` "none", which does not show them to
    the model."""
    tool_choice: Annotated[str, Only("none", "auto", why=NO_TOOLS)] = "auto"
    parallel_tool_calls: bool = True
    functions: Annotated[list[Any], Only([], why=NO_TOOLS)] = []
    function_call: Annotated[str, Only("none", "auto", why=NO_TOOLS)] = "none"
    modalities: Annotated[list[str], Only(["text"])] = ["text"]
    verbosity: Annotated[str, Only("medium")] = "medium"
    include_reasoning: Yes = True
    documents: Annotated[list[Any], Only([])] = []
    add_generation_prompt: Yes = True
    continue_final_message: No = False
    add_special_tokens: No = False
    return_prompt_text: No = False
    echo: No = False

    @model_validator(mode="after")
    def _calls_no_tools(self) -> AnywayInChat:
        if self.tools and self.tool_choice != "none":
            raise ValueError(f'`tools`: {NO_TOOLS}; leave them out, or give `tool_choice` "none"')
        return self


class AnywayInMessage(Wire):
    """Of a message of a conversation, as other servers answer it, or a client keeps it."""

    tool_calls: Annotated[list[Any], Only([], why=NO_TOOLS)] = []
    annotations: Annotated[list[Any], Only([])] = []
