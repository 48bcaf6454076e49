"""POST /v1/responses."""

from __future__ import annotations

from collections.abc import Sequence
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
from gapless.server.protocol.responses import ChosenTool, ResponseBody, ResponsesRequest, plain_tool
from gapless.server.routes.common import Head, check_length, is_long, model_of
from gapless.server.routes.responses_input import messages_of
from gapless.server.routes.responses_writer import ResponsesWriter
from gapless.text.chat import ALLOWED_ARGUMENTS

router = APIRouter(tags=["OpenAI"])
SCHEMAS = (ResponseBody,)


@router.post(
    "/v1/responses", dependencies=[Depends(needs_key)], responses=responses(ResponseBody, (*POST, 404), stream=True)
)
async def create_response(
    request: Request,
    context: ServerContext,
    request_id: RequestId,
    body: Annotated[ResponsesRequest, Depends(JsonBody(ResponsesRequest))],
) -> Response:
    """Go on with a chat, given as a text or as items. The server keeps nothing of it."""
    body.check()
    head = Head(f"resp_{request_id}", model_of(context, body.model))
    loaded = context.llm.loaded
    messages = messages_of(body.input, body.instructions)
    length = sum(len(each["content"]) for each in messages)
    check_length(length, loaded.engine.admission.limits.max_model_len, text=True)
    long = is_long(messages, body.chat_template_kwargs, [plain_tool(tool) for tool in body.tools or ()])
    plan = plan_of(body, loaded, context.config)
    plain = body.params(body.form())
    salt = cache_salt_of(request, context.config, body.cache_salt)
    rendered: list[str] = []

    def prepare(loaded: Loaded) -> list[Prepared]:
        text, token_ids = _render(loaded, messages, plan, body.template_arguments())
        rendered.append(text)
        params = body.params(plan.form_after(text)) if plan.has_form else plain
        priority = body.priority or 0
        return [loaded.prepare({"prompt_token_ids": token_ids, "cache_salt": salt, "priority": priority}, params)]

    has_form = plan.has_form or plain.has_form
    job = await Job.start(request, context, prepare, stream=bool(body.stream), has_form=has_form, is_long=long)
    response = ResponseBody.begin(head.id, head.created, head.model, body)
    writer = ResponsesWriter(response, plan.parser(rendered[0]), loaded.tokenizer, job)
    if body.stream:
        return EventStream(job, writer, request_id)
    answer = writer.whole(await job.whole())
    return Response(msgspec.json.encode(answer), media_type="application/json")


def plan_of(body: ResponsesRequest, loaded: Loaded, config: ServerConfig) -> AnswerPlan:
    """What the tools and the form ask of the answer. Raises InvalidRequestError."""
    source = loaded.chat_template.source if loaded.chat_template is not None else None
    choice = body.tool_choice
    return plan_answer(
        tools=[plain_tool(tool) for tool in body.tools or ()],
        tool_choice=choice.model_dump() if isinstance(choice, ChosenTool) else choice,
        parallel_tool_calls=body.parallel_tool_calls,
        dialect=dialect_of(source, config.tool_parser),
        reasoning_tag=reasoning_tag_of(source, config.reasoning_parser),
        flat=True,
        asked=body.form(),
    )


def _render(
    loaded: Loaded, messages: Sequence[dict[str, Any]], plan: AnswerPlan, arguments: dict[str, Any]
) -> tuple[str, list[int]]:
    if loaded.tokenizer is None or loaded.chat_template is None:
        raise InvalidRequestError("this model was loaded without a tokenizer: send token ids to /v1/completions")
    if unknown := sorted(arguments.keys() - ALLOWED_ARGUMENTS):
        raise InvalidRequestError(
            f"chat_template_kwargs: {unknown[0]!r:.100} is none of {', '.join(sorted(ALLOWED_ARGUMENTS))}"
        )
    return loaded.chat_template.encode(loaded.tokenizer, messages, tools=plan.template_tools, **arguments)
