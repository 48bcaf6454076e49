"""/v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field, WithJsonSchema

from gapless.errors import InvalidRequestError
from gapless.outputs import Usage
from gapless.params import MAX_ID, MAX_LOGPROBS, SamplingParams
from gapless.server.protocol.chat import MAX_MESSAGES, MAX_TOOLS
from gapless.server.protocol.sampling import Body, SamplingFields, Schema, make_params

MAX_METADATA = 16
FunctionName = Annotated[str, WithJsonSchema({"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"})]
Item = Annotated[Any, WithJsonSchema({"type": "object"})]
_NEEDS_STORE = ("previous_response_id", "conversation", "prompt")


class ResponseTool(Body):
    """A function that the model may ask to be called. parameters: a JSON schema."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class ChosenTool(Body):
    """This function has to be called."""

    type: Literal["function"]
    name: str


class TextFormat(Body):
    """Of what form the answer is."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """Of the answer's text."""

    format: TextFormat | None = None


class ReasoningOptions(Body):
    """effort: for chat templates that know it; "none" asks for no thoughts."""

    effort: Annotated[str, Field(max_length=32)] | None = None


class ResponsesRequest(SamplingFields):
    """A chat to go on with, as a text or as items. Nothing is stored: send all of the chat each time."""

    model: str | None = None
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_ID)] | None = None
    text: TextOptions | None = None
    tools: Annotated[list[ResponseTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: Annotated[list[str], Field(max_length=MAX_METADATA)] | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None

    def check(self) -> None:
        """Refuse what this server can not do. Raises InvalidRequestError."""
        for name in _NEEDS_STORE:
            if getattr(self, name) is not None:
                raise InvalidRequestError(
                    f"{name} is not supported, as this server stores nothing: send all of the chat"
                )
        if self.top_logprobs or "message.output_text.logprobs" in (self.include or ()):
            raise InvalidRequestError(
                "top_logprobs is not supported here: /v1/chat/completions gives log probabilities"
            )
        if self.background:
            raise InvalidRequestError("background is not supported, as this server stores nothing")
        if (self.n or 1) > 1:
            raise InvalidRequestError("n: a response is one answer; /v1/chat/completions gives more")

    def params(self, form: dict[str, Any]) -> SamplingParams:
        """form: the answer's. Raises InvalidRequestError."""
        return make_params({**self.sampling_arguments(form), "max_tokens": self.max_output_tokens})

    def template_arguments(self) -> dict[str, Any]:
        """For the chat template."""
        effort = self.reasoning.effort if self.reasoning is not None else None
        wanted: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
        if effort == "none":
            wanted["enable_thinking"] = False
        return wanted | (self.chat_template_kwargs or {})

    def _forms(self) -> list[tuple[str, Any]]:
        form = self.text.format if self.text is not None else None
        if form is None or form.type == "text":
            return super()._forms()
        if form.type == "json_schema" and form.schema_ is None:
            raise InvalidRequestError("text.format.schema is missing")
        asked = ("json_object", True) if form.type == "json_object" else ("json_schema", form.schema_)
        return [*super()._forms(), asked]


# ----------------------------------------------------------------- answers

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    """A part of a message."""

    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class ReasoningText(msgspec.Struct, tag_field="type", tag="reasoning_text"):
    """A part of the thoughts."""

    text: str


class MessageItem(msgspec.Struct, tag_field="type", tag="message"):
    """What the user is to read."""

    id: str
    status: ItemStatus
    content: list[OutputText]
    role: str = "assistant"


class ReasoningItem(msgspec.Struct, tag_field="type", tag="reasoning"):
    """What the model thought before."""

    id: str
    status: ItemStatus
    content: list[ReasoningText]
    summary: list[Any] = []


class FunctionCallItem(msgspec.Struct, tag_field="type", tag="function_call"):
    """A call that the model asks for. arguments: JSON."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = MessageItem | ReasoningItem | FunctionCallItem


class InputTokensDetails(msgspec.Struct):
    """cached_tokens: of the prompt, whose KV was found in the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct):
    """reasoning_tokens: about how many of the answer's were thoughts."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct):
    """Tokens that a request took."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage, reasoning_tokens: int) -> ResponseUsage:
        return cls(
            usage.prompt_tokens,
            InputTokensDetails(usage.cached_tokens),
            usage.completion_tokens,
            OutputTokensDetails(min(reasoning_tokens, usage.completion_tokens)),
            usage.prompt_tokens + usage.completion_tokens,
        )


class ResponseFailure(msgspec.Struct):
    """Why an answer that had begun came to no end."""

    code: str
    message: str


class IncompleteDetails(msgspec.Struct):
    """Why an answer is cut."""

    reason: str


class ResponseBody(msgspec.Struct, kw_only=True):
    """The answer. output: its items, in order. The rest repeats what was asked."""

    id: str
    created_at: int
    model: str
    status: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    tool_choice: Any
    tools: list[Any]
    temperature: float
    top_p: float
    text: dict[str, Any]
    reasoning: dict[str, Any]
    metadata: dict[str, str]
    instructions: str | None = None
    max_output_tokens: int | None = None
    usage: ResponseUsage | None = None
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    user: str | None = None
    previous_response_id: None = None
    background: bool = False
    store: bool = False
    truncation: str = "disabled"
    object: str = "response"

    @classmethod
    def begin(cls, response_id: str, created: int, model: str, body: ResponsesRequest) -> ResponseBody:
        """The answer to `body` before there is any of it."""
        choice, form = body.tool_choice, body.text.format if body.text is not None else None
        return cls(
            id=response_id,
            created_at=created,
            model=model,
            status="in_progress",
            output=[],
            parallel_tool_calls=body.parallel_tool_calls is not False,
            tool_choice=choice.model_dump() if isinstance(choice, ChosenTool) else choice or "auto",
            tools=[{"strict": False, "parameters": None, **plain_tool(tool)} for tool in body.tools or ()],
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            text={"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
            reasoning={"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
            metadata=body.metadata or {},
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            user=body.user,
        )


def plain_tool(tool: ResponseTool) -> dict[str, Any]:
    """As JSON, without what was not given."""
    return tool.model_dump(exclude_none=True)
