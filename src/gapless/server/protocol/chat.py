"""/v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Required, cast

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Field, WithJsonSchema
from typing_extensions import TypedDict

from gapless.errors import InvalidRequestError
from gapless.params import MAX_ID, MAX_LOGPROBS, SamplingParams
from gapless.server.protocol.answers import PromptLogprobsBody, UsageBody
from gapless.server.protocol.sampling import Body, SamplingFields, make_params
from gapless.server.protocol.tools import Tool, ToolChoice
from gapless.text.messages import Message

MAX_MESSAGES = 8192
MAX_TOOLS = 128
Role = Annotated[str, WithJsonSchema({"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9_-]{0,31}$"})]


class ChatMessage(TypedDict, total=False):
    """One turn. content: a text, or parts {"type": "text", "text": ...}."""

    role: Required[Role]
    content: str | list[Any] | None
    name: str | None
    tool_call_id: str | None
    tool_calls: list[Any] | None
    reasoning_content: str | None


Messages = Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class TemplateFields(Body):
    """What goes into the chat template."""

    chat_template: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None


class ChatRequest(TemplateFields, SamplingFields):
    """A chat to go on with."""

    model: str | None = None
    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=MAX_ID)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_ID)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None

    def params(self, form: dict[str, Any]) -> SamplingParams:
        """form: the answer's. Raises InvalidRequestError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true")
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return make_params({**self.sampling_arguments(form), "max_tokens": limit, "logprobs": logprobs})

    def check(self) -> None:
        """Refuse what this server can not do. Raises InvalidRequestError."""
        if self.functions or self.function_call is not None:
            raise InvalidRequestError("functions are not supported: use tools")
        if self.audio is not None or any(kind != "text" for kind in _kinds(self.modalities)):
            raise InvalidRequestError("modalities: only text works")


def check_template(body: TemplateFields) -> None:
    """A request can not bring a template. Raises InvalidRequestError."""
    if body.chat_template is not None:
        raise InvalidRequestError("chat_template is not supported: the model's own is used")


def template_messages(messages: list[ChatMessage]) -> list[Message]:
    """As templates know them: the developer speaks as the system."""
    return [{**each, "role": "system"} if each.get("role") == "developer" else {**each} for each in messages]


def _kinds(modalities: object) -> list[object]:
    if modalities is None:
        return []
    return cast("list[object]", modalities) if isinstance(modalities, list) else [modalities]


# ----------------------------------------------------------------- answers


class TopLogprob(msgspec.Struct):
    """A likely token. bytes: what it adds to the text, be it a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(msgspec.Struct):
    """A token of the answer, and the likeliest ones at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Of the answer's tokens."""

    content: list[ContentLogprob]
    refusal: None = None


class FunctionCall(msgspec.Struct):
    """arguments: JSON; in chunks the next part of it."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCall(msgspec.Struct):
    """A call that the model asks for."""

    id: str
    function: FunctionCall
    type: str = "function"


class ToolCallDelta(msgspec.Struct):
    """What is new of a call."""

    index: int
    function: FunctionCall
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class AnswerMessage(msgspec.Struct):
    """The model's turn. reasoning_content: what it thought before."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    """One of n."""

    index: int
    message: AnswerMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None
    stop_reason: str | int | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct):
    """The answer."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
    object: str = "chat.completion"
    prompt_logprobs: PromptLogprobsBody = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Delta(msgspec.Struct):
    """What is new of a turn."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    """One of n, in a chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
