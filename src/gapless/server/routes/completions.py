"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from msgspec import UNSET

from gapless.collector import Prepared
from gapless.loading import Loaded
from gapless.outputs import CompletionOutput, RequestOutput, TokenLogprob, Usage
from gapless.params import SamplingParams
from gapless.prompts import TextPrompt, TokensPrompt
from gapless.server.generation import Batch, Job
from gapless.server.http.auth import cache_salt_of, needs_key
from gapless.server.http.body import JsonBody
from gapless.server.http.depends import RequestId, ServerContext
from gapless.server.http.errors import ApiError
from gapless.server.http.openapi import POST, responses
from gapless.server.http.sse import EventStream
from gapless.server.protocol.answers import UsageBody
from gapless.server.protocol.completions import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from gapless.server.routes.common import (
    LONG_TEXT,
    MANY_LOGPROBS,
    Chunks,
    Head,
    check_length,
    model_of,
    shows_something,
)
from gapless.server.token_texts import Offsets, TokenTexts
from gapless.text.tokenizer import Tokenizer

router = APIRouter(tags=["OpenAI"])
SCHEMAS = (Completion,)
_FEW_PROMPTS = 4
_BEHIND = b',"logprobs":null,"finish_reason":null}'


@router.post(
    "/v1/completions",
    dependencies=[Depends(needs_key)],
    responses=responses(Completion, (*POST, 404), stream=True),
)
async def create_completion(
    request: Request,
    context: ServerContext,
    request_id: RequestId,
    body: Annotated[CompletionRequest, Depends(JsonBody(CompletionRequest))],
) -> Response:
    """Go on with a text or token ids, with up to 256 of them at once."""
    head = Head(f"cmpl-{request_id}", model_of(context, body.model))
    params, prompts = body.params(), body.prompts
    salt = cache_salt_of(request, context.config, body.cache_salt)
    loaded = context.llm.loaded
    for prompt in prompts:
        check_length(len(prompt), loaded.engine.admission.limits.max_model_len, text=isinstance(prompt, str))

    def prepare(loaded: Loaded) -> list[Prepared]:
        return [loaded.prepare(_prompt(each, salt, body.priority or 0), params) for each in prompts]

    job = await Job.start(
        request,
        context,
        prepare,
        count=len(prompts),
        rows=params.n,
        stream=bool(body.stream),
        has_form=params.has_form,
        is_long=len(prompts) > _FEW_PROMPTS or sum(map(len, prompts)) > LONG_TEXT,
    )
    if body.stream:
        return EventStream(job, CompletionWriter(head, body, params, loaded.tokenizer, job), request_id)
    outputs = await job.whole()
    many = sum(len(each.prompt_token_ids) for each in outputs) * (1 + (params.prompt_logprobs or 0)) > MANY_LOGPROBS
    render = CompletionWriter(head, body, params, loaded.tokenizer, job).whole
    answer = await asyncio.to_thread(render, outputs) if many else render(outputs)
    return Response(answer, media_type="application/json")


def _prompt(given: str | list[int], salt: str, priority: int) -> TextPrompt | TokensPrompt:
    if isinstance(given, str):
        return {"prompt": given, "cache_salt": salt, "priority": priority}
    return {"prompt_token_ids": given, "cache_salt": salt, "priority": priority}


class CompletionWriter:
    """Makes the answer of what the engine gives, whole or in chunks."""

    def __init__(
        self, head: Head, body: CompletionRequest, params: SamplingParams, tokenizer: Tokenizer | None, job: Job
    ) -> None:
        self._head = head
        self._body = body
        self._params = params
        self._tokenizer = tokenizer
        self._job = job
        self._chunks = Chunks(head, "text_completion", body.stream_options)
        self._texts = TokenTexts(tokenizer)
        self._offsets: dict[int, Offsets] = {}
        self._prompts: dict[int, list[TokenLogprob | None] | None] = {}
        self._begun: set[int] = set()
        self._is_plain = body.logprobs is None and not (
            body.return_token_ids or body.scores_only or self._chunks.usage_always or tokenizer is None
        )

    def whole(self, outputs: Sequence[RequestOutput]) -> bytes:
        """As JSON."""
        choices = [self._choice(place, output, each) for place, output in enumerate(outputs) for each in output.outputs]
        return msgspec.json.encode(
            Completion(self._head.id, self._head.created, self._head.model, choices, UsageBody.of(self._usage))
        )

    def write(self, batch: Batch) -> bytes:
        """See sse.py `Writer`."""
        chunks: list[bytes] = []
        for place, output in batch:
            for each in output.outputs:
                index = place * self._params.n + each.index
                if self._is_plain and each.finish_reason is None and index in self._begun:
                    if each.text:
                        chunks.append(self._chunks.text(b'{"index":%d,"text":' % index, each.text, _BEHIND))
                elif each.finish_reason or shows_something(each, self._tokenizer, ids=self._body.return_token_ids):
                    usage = self._usage if self._chunks.usage_always else None
                    chunks.append(self._chunks.chunk(self._choice(place, output, each), usage))
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def end(self) -> bytes:
        """See sse.py `Writer`."""
        return self._chunks.end(self._usage)

    def fail(self, error: ApiError) -> bytes:
        """See sse.py `Writer`."""
        return self._chunks.fail(error)

    @property
    def _usage(self) -> Usage:
        usage = self._job.usage
        return Usage(usage.prompt_tokens, 0, usage.cached_tokens) if self._body.scores_only else usage

    def _choice(self, place: int, output: RequestOutput, each: CompletionOutput) -> CompletionChoice:
        """A choice, or what is new of it."""
        body, index = self._body, place * self._params.n + each.index
        if output.prompt_logprobs is not None:
            self._prompts[place] = output.prompt_logprobs
        first = index not in self._begun
        self._begun.add(index)
        choice = CompletionChoice(index, each.text, self._logprobs(index, place, output, each, first=first))
        choice.finish_reason = each.finish_reason
        choice.stop_reason = UNSET if each.stop_reason is None else each.stop_reason
        if body.return_token_ids:
            choice.token_ids = each.token_ids
            choice.prompt_token_ids = output.prompt_token_ids if first else UNSET
        if body.prompt_logprobs is not None and first:
            choice.prompt_logprobs = self._texts.prompt(self._prompts.get(place))
        return self._without_answer(choice, place, first=first) if body.scores_only else choice

    def _without_answer(self, choice: CompletionChoice, place: int, *, first: bool) -> CompletionChoice:
        choice.text = self._job.prepared[place].echo if first else ""
        choice.finish_reason = "length" if choice.finish_reason else None
        choice.stop_reason = UNSET
        choice.token_ids = [] if self._body.return_token_ids else UNSET
        return choice

    def _logprobs(
        self, index: int, place: int, output: RequestOutput, each: CompletionOutput, *, first: bool
    ) -> CompletionLogprobs | None:
        body = self._body
        if body.logprobs is None:
            return None
        offsets = self._offsets.setdefault(index, Offsets(self._texts))
        found = CompletionLogprobs([], [], [], [])
        if first and body.echo:
            echo = self._job.prepared[place].echo
            offsets.add(found, output.prompt_token_ids, self._prompts.get(place) or (), body.logprobs, spelled=echo)
            offsets.begin_answer(len(echo))
        if not body.scores_only:
            offsets.add(found, each.token_ids, each.logprobs or (), body.logprobs)
        return found
