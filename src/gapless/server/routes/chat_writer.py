"""A chat's answer, whole or in chunks, of what the engine gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec import UNSET

from gapless.outputs import CompletionOutput, RequestOutput
from gapless.server.answers import Content, Piece, Reasoning, ToolCallArguments, ToolCallBegin
from gapless.server.generation import Batch, Job
from gapless.server.http.errors import ApiError
from gapless.server.protocol.answers import UsageBody
from gapless.server.protocol.chat import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    Delta,
    FunctionCall,
    ToolCall,
    ToolCallDelta,
)
from gapless.server.routes.common import Chunks, Head, shows_something
from gapless.server.token_texts import TokenTexts
from gapless.text.tokenizer import Tokenizer

_BEHIND = b'},"logprobs":null,"finish_reason":null}'


class Parser(Protocol):
    """Takes a choice's text apart: see answers/parser.py."""

    def push(self, text: str) -> list[Piece]:
        """More of the text."""
        ...

    def finish(self) -> list[Piece]:
        """There is no more."""
        ...


@dataclass(slots=True)
class _Choice:
    """One of n, as far as it is written."""

    parser: Parser
    before: bytes  # the text of a chunk with nothing else
    begun: bool = False
    called: bool = False


class ChatWriter:
    """Of one request."""

    def __init__(
        self, head: Head, body: ChatRequest, parsers: Sequence[Parser], tokenizer: Tokenizer | None, job: Job
    ) -> None:
        self._head = head
        self._body = body
        self._tokenizer = tokenizer
        self._job = job
        self._choices = [
            _Choice(parser, b'{"index":%d,"delta":{"content":' % index) for index, parser in enumerate(parsers)
        ]
        self._chunks = Chunks(head, "chat.completion.chunk", body.stream_options)
        self._texts = TokenTexts(tokenizer)
        self._is_plain = not (body.logprobs or body.return_token_ids or self._chunks.usage_always or tokenizer is None)

    def whole(self, outputs: Sequence[RequestOutput]) -> ChatCompletion:
        """The answer of a job's one prompt."""
        (output,) = outputs
        answer = ChatCompletion(
            self._head.id,
            self._head.created,
            self._head.model,
            [self._whole_choice(each) for each in output.outputs],
            UsageBody.of(output.usage),
        )
        answer.prompt_logprobs = self._texts.prompt(output.prompt_logprobs)
        if self._body.return_token_ids:
            answer.prompt_token_ids = output.prompt_token_ids
        return answer

    def _whole_choice(self, each: CompletionOutput) -> ChatChoice:
        parser = self._choices[each.index].parser
        message = message_of(parser.push(each.text) + parser.finish())
        return ChatChoice(
            each.index,
            message,
            finish_reason(each.finish_reason, called=message.tool_calls is not UNSET),
            self._texts.chat(each.logprobs),
            UNSET if each.stop_reason is None else each.stop_reason,
            each.token_ids if self._body.return_token_ids else UNSET,
        )

    def write(self, batch: Batch) -> bytes:
        """See sse.py `Writer`."""
        chunks: list[bytes] = []
        for _, output in batch:
            for each in output.outputs:
                state = self._choices[each.index]
                pieces = state.parser.push(each.text) if each.text else []
                if self._is_plain and state.begun and each.finish_reason is None:
                    if len(pieces) == 1 and type(piece := pieces[0]) is Content:
                        chunks.append(self._chunks.text(state.before, piece.text, _BEHIND))
                        continue
                    if not pieces:
                        continue
                usage = output.usage if self._chunks.usage_always else None
                chunks += [self._chunks.chunk(choice, usage) for choice in self._chunk_choices(each, pieces)]
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def end(self) -> bytes:
        """See sse.py `Writer`."""
        return self._chunks.end(self._job.usage)

    def fail(self, error: ApiError) -> bytes:
        """See sse.py `Writer`."""
        return self._chunks.fail(error)

    def _chunk_choices(self, each: CompletionOutput, pieces: list[Piece]) -> Iterable[ChunkChoice]:
        state, index = self._choices[each.index], each.index
        ends = each.finish_reason is not None
        ids = each.token_ids if self._body.return_token_ids else UNSET
        if not ends and not shows_something(each, self._tokenizer, ids=self._body.return_token_ids):
            return
        if not state.begun:
            state.begun = True
            yield ChunkChoice(index, Delta(role="assistant", content=""))
        deltas = [delta_of(piece) for piece in pieces + (state.parser.finish() if ends else [])]
        state.called |= any(delta.tool_calls is not UNSET for delta in deltas)
        logprobs = self._texts.chat(each.logprobs)
        if not deltas and (ids is not UNSET or _has_content(logprobs)):
            deltas = [Delta(content="")]
        for place, delta in enumerate(deltas):
            yield ChunkChoice(index, delta, None if place else logprobs, token_ids=UNSET if place else ids)
        if ends:
            last = ChunkChoice(index, Delta(), finish_reason=finish_reason(each.finish_reason, called=state.called))
            last.stop_reason = UNSET if each.stop_reason is None else each.stop_reason
            yield last


def message_of(pieces: Iterable[Piece]) -> AnswerMessage:
    """A turn of its parts."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    for piece in pieces:
        match piece:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case ToolCallBegin(_, call_id, name):
                calls.append(ToolCall(call_id, FunctionCall("", name)))
            case ToolCallArguments(index, text):
                calls[index].function.arguments += text
    message = AnswerMessage("".join(content) if content or not calls else None)
    message.reasoning_content = "".join(reasoning) if reasoning else UNSET
    message.tool_calls = calls or UNSET
    return message


def delta_of(piece: Piece) -> Delta:
    """A part of a turn as what is new of it."""
    match piece:
        case Content(text):
            return Delta(content=text)
        case Reasoning(text):
            return Delta(reasoning_content=text)
        case ToolCallBegin(index, call_id, name):
            return Delta(tool_calls=[ToolCallDelta(index, FunctionCall("", name), call_id, "function")])
        case ToolCallArguments(index, text):
            return Delta(tool_calls=[ToolCallDelta(index, FunctionCall(text))])


def finish_reason(word: str | None, *, called: bool) -> str:
    """tool_calls, if the answer came to its end with one."""
    return "tool_calls" if called and word == "stop" else word or "stop"


def _has_content(logprobs: ChatLogprobs | None) -> bool:
    return logprobs is not None and len(logprobs.content) > 0
