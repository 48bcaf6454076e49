"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request, Response

from gapless.collector import Prepared
from gapless.errors import InvalidRequestError
from gapless.loading import Loaded
from gapless.server.answers import AnswerPlan, dialect_of, plan_answer, reasoning_tag_of
from gapless.server.config import ServerConfig
from gapless.server.generation import Job
from gapless.server.http.auth import cache_salt_of, needs_key
from gapless.server.http.body import JsonBody
from gapless.server.http.depends import RequestId, ServerContext
from gapless.server.http.openapi import POST, responses
from gapless.server.http.sse import EventStream
from gapless.server.protocol.chat import (
    ChatCompletion,
    ChatMessage,
    ChatRequest,
    TemplateFields,
    check_template,
    template_messages,
)
from gapless.server.protocol.tools import plain
from gapless.server.routes.chat_writer import ChatWriter
from gapless.server.routes.common import MANY_LOGPROBS, Head, check_length, is_long, model_of

router = APIRouter(tags=["OpenAI"])
SCHEMAS = (ChatCompletion,)
_TEMPLATE_NAMES = frozenset({"messages", "tools", "add_generation_prompt", "tokenizer"})


@router.post(
    "/v1/chat/completions",
    dependencies=[Depends(needs_key)],
    responses=responses(ChatCompletion, (*POST, 404), stream=True),
)
async def create_chat_completion(
    request: Request,
    context: ServerContext,
    request_id: RequestId,
    body: Annotated[ChatRequest, Depends(JsonBody(ChatRequest))],
) -> Response:
    """Go on with a chat."""
    body.check()
    head = Head(f"chatcmpl-{request_id}", model_of(context, body.model))
    loaded = context.llm.loaded
    length = text_length(body.messages)
    check_length(length, loaded.engine.admission.limits.max_model_len, text=True)
    long = is_long(body.messages, body.chat_template_kwargs, [plain(tool) for tool in body.tools or ()])
    plan = plan_of(body, loaded, context.config)
    params = body.params(plan.form)
    salt = cache_salt_of(request, context.config, body.cache_salt)
    rendered: list[str] = []

    def prepare(loaded: Loaded) -> list[Prepared]:
        text, token_ids = render(body, body.messages, loaded, plan.template_tools)
        rendered.append(text)
        # the prompt may have opened the thoughts
        exact = body.params(plan.form_after(text)) if plan.has_form else params
        priority = body.priority or 0
        return [loaded.prepare({"prompt_token_ids": token_ids, "cache_salt": salt, "priority": priority}, exact)]

    job = await Job.start(
        request, context, prepare, rows=params.n, stream=bool(body.stream), has_form=params.has_form, is_long=long
    )
    parsers = [plan.parser(rendered[0]) for _ in range(params.n)]
    writer = ChatWriter(head, body, parsers, loaded.tokenizer, job)
    if body.stream:
        return EventStream(job, writer, request_id)
    outputs = await job.whole()
    many = job.usage.completion_tokens * (params.logprobs or 0) + job.usage.prompt_tokens * (
        params.prompt_logprobs or 0
    )
    answer = await asyncio.to_thread(writer.whole, outputs) if many > MANY_LOGPROBS else writer.whole(outputs)
    return Response(msgspec.json.encode(answer), media_type="application/json")


def plan_of(body: ChatRequest, loaded: Loaded, config: ServerConfig) -> AnswerPlan:
    """What the tools and the form ask of the answer. Raises InvalidRequestError."""
    source = loaded.chat_template.source if loaded.chat_template is not None else None
    choice = body.tool_choice
    return plan_answer(
        tools=[plain(tool) for tool in body.tools or ()] or None,
        tool_choice=choice if choice is None or isinstance(choice, str) else choice.model_dump(),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        dialect=dialect_of(source, config.tool_parser),
        reasoning_tag=reasoning_tag_of(source, config.reasoning_parser),
        asked=body.form(),
    )


def render(
    body: TemplateFields, messages: list[ChatMessage], loaded: Loaded, tools: Sequence[Mapping[str, Any]] | None
) -> tuple[str, list[int]]:
    """The chat as the model reads it, and its token ids. Raises InvalidRequestError."""
    check_template(body)
    arguments = body.chat_template_kwargs or {}
    if taken := sorted(_TEMPLATE_NAMES & arguments.keys()):
        raise InvalidRequestError(f"chat_template_kwargs: {taken[0]!r} is no argument of the template's own")
    if loaded.tokenizer is None or loaded.chat_template is None:
        raise InvalidRequestError("this model was loaded without a tokenizer: send token ids to /v1/completions")
    return loaded.chat_template.encode(
        loaded.tokenizer,
        template_messages(messages),
        add_generation_prompt=body.add_generation_prompt is not False,
        tools=tools,
        **arguments,
    )


def text_length(messages: Sequence[ChatMessage]) -> int:
    """Characters in the contents of messages, about."""
    total = 0
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            total += len(content)
        else:
            texts = (part.get("text") for part in content or () if isinstance(part, dict))
            total += sum(len(text) for text in texts if isinstance(text, str))
    return total
