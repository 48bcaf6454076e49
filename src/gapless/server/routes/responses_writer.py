"""An answer of /v1/responses, whole or as events, of what the engine gives."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from gapless.outputs import CompletionOutput, RequestOutput
from gapless.server.answers import AnswerParser, Content, Piece, Reasoning, ToolCallBegin
from gapless.server.generation import Batch, Job
from gapless.server.http.errors import ApiError
from gapless.server.protocol.responses import (
    FunctionCallItem,
    IncompleteDetails,
    ItemStatus,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseBody,
    ResponseFailure,
    ResponseUsage,
)
from gapless.text.tokenizer import Tokenizer

Emit = Callable[[str, dict[str, Any]], None]
_encoder = msgspec.json.Encoder()


class ResponsesWriter:
    """Of one request."""

    def __init__(self, response: ResponseBody, parser: AnswerParser, tokenizer: Tokenizer | None, job: Job) -> None:
        self._response = response
        self._parser = parser
        self._tokenizer = tokenizer
        self._job = job
        self._items = Items(response.output, self._emit)
        self._events: list[bytes] = []
        self._sequence = 0
        self._cut = False

    def whole(self, outputs: Sequence[RequestOutput]) -> ResponseBody:
        """The answer of a job's one prompt."""
        (output,) = outputs
        self._items.emit = _drop
        for each in output.outputs:
            self._take(each)
        return self._ended()

    def write(self, batch: Batch) -> bytes:
        """See sse.py `Writer`."""
        self._begin()
        for _, output in batch:
            for each in output.outputs:
                self._take(each)
        return self._take_events()

    def end(self) -> bytes:
        """See sse.py `Writer`."""
        self._begin()
        response = self._ended()
        self._emit(f"response.{response.status}", {"response": response})
        return self._take_events()

    def fail(self, error: ApiError) -> bytes:
        """See sse.py `Writer`."""
        self._begin()
        self._items.abandon()
        self._response.status = "failed"
        self._response.error = ResponseFailure("server_error", str(error))
        self._emit("response.failed", {"response": self._response})
        return self._take_events()

    def _begin(self) -> None:
        if not self._sequence:
            self._emit("response.created", {"response": self._response})
            self._emit("response.in_progress", {"response": self._response})

    def _take(self, each: CompletionOutput) -> None:
        self._items.take(self._parser.push(each.text))
        if each.finish_reason is not None:
            self._cut = each.finish_reason == "length"
            self._items.take(self._parser.finish())

    def _ended(self) -> ResponseBody:
        response = self._response
        self._items.finish("incomplete" if self._cut else "completed")
        response.status = "incomplete" if self._cut else "completed"
        response.incomplete_details = IncompleteDetails("max_output_tokens") if self._cut else None
        response.usage = ResponseUsage.of(self._job.usage, self._reasoning_tokens())
        return response

    def _reasoning_tokens(self) -> int:
        thoughts = [
            part.text for item in self._response.output if isinstance(item, ReasoningItem) for part in item.content
        ]
        return 0 if self._tokenizer is None else sum(len(self._tokenizer.encode(text)) for text in thoughts)

    def _emit(self, kind: str, fields: dict[str, Any]) -> None:
        body = _encoder.encode({"type": kind, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        self._events.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), body))

    def _take_events(self) -> bytes:
        events, self._events = b"".join(self._events), []
        return events


class Items:
    """Puts the parts of an answer into items, and tells of each step."""

    def __init__(self, items: list[OutputItem], emit: Emit) -> None:
        self.emit = emit
        self._items = items
        self._item: OutputItem | None = None  # the last one, while it is open
        self._texts: list[str] = []  # of it

    def take(self, pieces: Iterable[Piece]) -> None:
        """More of the answer."""
        for piece in pieces:
            if isinstance(piece, ToolCallBegin):
                self._open(FunctionCallItem(_new_id("fc"), "in_progress", piece.call_id, piece.name, ""))
                continue
            if isinstance(piece, Content) and not isinstance(self._item, MessageItem):
                self._open_message()
            elif isinstance(piece, Reasoning) and not isinstance(self._item, ReasoningItem):
                self._open(ReasoningItem(_new_id("rs"), "in_progress", []))
                self._tell("response.content_part.added", part=ReasoningText(""), content_index=0)
            self._texts.append(piece.text)
            self._tell_text("delta", delta=piece.text)

    def finish(self, status: ItemStatus) -> None:
        """There is no more. An answer has at least one item, be it empty."""
        if not self._items:
            self._open_message()
        self._close(status)

    def abandon(self) -> None:
        """There is no more, and no end either."""
        if self._item is not None:
            self._put(self._item, "incomplete")
            self._item = None

    def _open_message(self) -> None:
        self._open(MessageItem(_new_id("msg"), "in_progress", []))
        self._tell("response.content_part.added", part=OutputText(""), content_index=0)

    def _open(self, item: OutputItem) -> None:
        self._close("completed")
        self._items.append(item)
        self._item, self._texts = item, []
        self.emit("response.output_item.added", {"output_index": len(self._items) - 1, "item": item})

    def _close(self, status: ItemStatus) -> None:
        item = self._item
        if item is None:
            return
        text = self._put(item, status)
        if isinstance(item, FunctionCallItem):
            self._tell_text("done", arguments=text, name=item.name)
        else:
            self._tell_text("done", text=text)
            self._tell("response.content_part.done", part=item.content[0], content_index=0)
        self.emit("response.output_item.done", {"output_index": len(self._items) - 1, "item": item})
        self._item = None

    def _put(self, item: OutputItem, status: ItemStatus) -> str:
        """The text into its item."""
        text = "".join(self._texts)
        item.status = status
        if isinstance(item, FunctionCallItem):
            item.arguments = text
        elif isinstance(item, MessageItem):
            item.content = [OutputText(text)]
        else:
            item.content = [ReasoningText(text)]
        return text

    def _tell_text(self, what: str, **fields: Any) -> None:
        if isinstance(self._item, FunctionCallItem):
            self._tell(f"response.function_call_arguments.{what}", **fields)
        elif isinstance(self._item, MessageItem):
            self._tell(f"response.output_text.{what}", content_index=0, logprobs=[], **fields)
        else:
            self._tell(f"response.reasoning_text.{what}", content_index=0, **fields)

    def _tell(self, kind: str, **fields: Any) -> None:
        assert self._item is not None
        self.emit(kind, {"item_id": self._item.id, "output_index": len(self._items) - 1, **fields})


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}"


def _drop(kind: str, fields: dict[str, Any]) -> None:
    """Nobody reads events."""
