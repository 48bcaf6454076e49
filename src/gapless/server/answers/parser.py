"""From a model's text to the parts of an answer, as the text comes.

What may yet turn out to be a tag or a call is held back, so nothing is ever taken back. Text that only looks like a
call is content. White space around tags and calls belongs to them. A call that breaks off after its arguments have
begun stays incomplete, which no reader of JSON takes for a call; what follows is content.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Collection
from typing import Final, Literal

from gapless.server.answers.calls import CallReader
from gapless.server.answers.pieces import Content, Piece, Reasoning, ToolCallArguments, ToolCallBegin

Dialect = Literal["hermes", "llama3_json", "none"]

NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")
CALL_TAG: Final = "<tool_call>"
END_TAG: Final = "</tool_call>"
PYTHON_TAG: Final = "<|python_tag|>"
_SPACE: Final = re.compile(r"\s*")
_ID_LENGTH: Final = 24


class AnswerParser:
    """One continuation's text. push() takes what is new of it, finish() says that there is no more.

    Each state is a method that takes what it can from the buffer and returns whether there is something left to do
    with what is there.
    """

    def __init__(
        self,
        dialect: Dialect = "none",
        *,
        names: Collection[str] = (),
        reasoning_tag: str | None = None,
        inside: bool = False,
        only_calls: bool = False,
    ) -> None:
        """dialect  how calls are written. "hermes": behind <tool_call>, anywhere. "llama3_json": as objects at the
        beginning, separated by ";". "none": not at all.

        names          of the functions. In tags other names count as well: the caller can tell the model.
        reasoning_tag  what the thoughts at the beginning stand in.
        inside         the prompt has opened that tag.
        only_calls     the grammar leaves room for nothing else: what is no call is a piece of one that was cut off, and
                       left out.
        """
        self._only_calls = only_calls
        self._names = frozenset(names)
        self._tagged = dialect == "hermes"
        self._open_tag, self._close_tag = f"<{reasoning_tag}>", f"</{reasoning_tag}>"
        self._buffer = ""
        self._at = 0
        self._space: list[str] = []  # held back: white space, which a tag may follow, and a separator of calls
        self._separated = False
        self._fresh = True  # no content, since the beginning or since a call
        self._index = 0  # of the next call
        self._call = CallReader(self._knows, needs_arguments=not self._tagged)
        self._call_tag = ""
        self._pieces: list[Piece] = []
        texts = {"hermes": self._tagged_text, "llama3_json": self._bare_text, "none": self._plain_text}
        self._text: Callable[[], bool] = texts[dialect]
        self._step: Callable[[], bool] = self._text
        if reasoning_tag is not None:
            self._step = self._before_thoughts if inside else self._beginning

    def push(self, text: str) -> list[Piece]:
        """More of the text. Returns what is sure by now."""
        self._buffer = self._buffer[self._at :] + text
        self._at = 0
        while self._step():
            pass
        return self._take_pieces()

    def finish(self) -> list[Piece]:
        """No more text comes. Returns what was held back."""
        rest = self._buffer[self._at :]
        self._at = len(self._buffer)
        if self._step == self._thoughts:
            self._add(Reasoning("".join(self._space) + rest if rest else ""))
        elif self._step == self._in_call:
            if self._call.name is None:
                self._add_content(self._call_tag + self._call.held + rest)
            elif not self._call.complete:
                self._add(ToolCallArguments(self._index, rest))
        elif self._step != self._behind_call and (rest or not self._fresh or not self._index):
            self._add_content(rest)
        return self._take_pieces()

    def _beginning(self) -> bool:
        self._hold_space()
        if self._buffer.startswith(self._open_tag, self._at):
            self._at += len(self._open_tag)
            self._space = []
            self._step = self._before_thoughts
            return True
        if self._may_become(self._open_tag):
            return False
        self._step = self._text
        return True

    def _before_thoughts(self) -> bool:
        return self._drop_space(self._thoughts)

    def _thoughts(self) -> bool:
        if not self._take_until(self._close_tag, Reasoning):
            return False
        self._at += len(self._close_tag)
        self._space = []
        self._step = self._behind_thoughts
        return True

    def _behind_thoughts(self) -> bool:
        return self._drop_space(self._text)

    def _plain_text(self) -> bool:
        self._add_content(self._buffer[self._at :])
        self._at = len(self._buffer)
        return False

    def _tagged_text(self) -> bool:
        return self._take_until(CALL_TAG, Content) and self._begin_call(CALL_TAG)

    def _bare_text(self) -> bool:
        if not self._fresh:
            return self._plain_text()
        self._hold_space()
        if self._index and not self._separated and self._buffer[self._at : self._at + 1] in (";", ","):
            self._space.append(self._buffer[self._at])
            self._at += 1
            self._separated = True
            return True
        if self._buffer.startswith("{", self._at):
            return self._begin_call("")
        if self._buffer.startswith(PYTHON_TAG, self._at):
            return self._begin_call(PYTHON_TAG)
        return False if self._may_become(PYTHON_TAG) else self._plain_text()

    def _begin_call(self, tag: str) -> bool:
        self._at += len(tag)
        self._call = CallReader(self._knows, needs_arguments=not self._tagged)
        self._call_tag = tag
        self._step = self._in_call
        return True

    def _in_call(self) -> bool:
        call, begun = self._call, self._call.name is not None
        self._at, arguments = call.feed(self._buffer, self._at)
        if call.name is not None and not begun:
            self._space = []
            self._add(ToolCallBegin(self._index, _new_id(), call.name))
        self._add(ToolCallArguments(self._index, arguments))
        if not call.done and not call.broken:
            return False
        self._step = self._text
        if call.name is None:
            self._add_content(self._call_tag + call.held)
        else:
            self._end_call()
        return True

    def _end_call(self) -> None:
        self._index += 1
        self._fresh, self._separated = self._call.complete, False
        left = "" if self._call.done else self._call.held
        if left.strip():
            self._add_content(left)
        else:
            self._space = [left]
            if self._tagged and self._call.complete:
                self._step = self._behind_call

    def _behind_call(self) -> bool:
        self._hold_space()
        if self._buffer.startswith(END_TAG, self._at):
            self._at += len(END_TAG)
            self._space = []
        elif self._may_become(END_TAG):
            return False
        self._step = self._text
        return True

    def _take_until(self, tag: str, kind: type[Content | Reasoning]) -> bool:
        """What comes before the tag is a piece, but for white space. Returns whether the tag is there."""
        found = self._buffer.find(tag, self._at)
        end = found if found >= 0 else len(self._buffer) - self._beginning_at_end(tag)
        part = self._buffer[self._at : end]
        body = part.rstrip()
        if body:
            self._add(kind("".join(self._space) + body))
            self._space = []
        self._space.append(part[len(body) :])
        self._at = end
        return found >= 0

    def _beginning_at_end(self, tag: str) -> int:
        """How long a beginning of the tag the buffer ends with."""
        most = min(len(tag) - 1, len(self._buffer) - self._at)
        return next((length for length in range(most, 0, -1) if self._buffer.endswith(tag[:length])), 0)

    def _may_become(self, tag: str) -> bool:
        return len(self._buffer) - self._at < len(tag) and tag.startswith(self._buffer[self._at :])

    def _hold_space(self) -> None:
        end = _SPACE.match(self._buffer, self._at).end()  # pyright: ignore[reportOptionalMemberAccess]
        self._space.append(self._buffer[self._at : end])
        self._at = end

    def _drop_space(self, then: Callable[[], bool]) -> bool:
        self._at = _SPACE.match(self._buffer, self._at).end()  # pyright: ignore[reportOptionalMemberAccess]
        if self._at == len(self._buffer):
            return False
        self._step = then
        return True

    def _knows(self, name: str) -> bool:
        return NAME.fullmatch(name) is not None and (self._tagged or name in self._names)

    def _add_content(self, text: str) -> None:
        """With the white space that was held back before it."""
        self._add(Content("".join(self._space) + text))
        self._space = []

    def _add(self, piece: Piece) -> None:
        if isinstance(piece, ToolCallBegin):
            self._pieces.append(piece)
            return
        if not piece.text or (self._only_calls and isinstance(piece, Content)):
            return
        if isinstance(piece, Content):
            self._fresh = False
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, Content) and isinstance(piece, Content):
            self._pieces[-1] = Content(last.text + piece.text)
        else:
            self._pieces.append(piece)

    def _take_pieces(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces


def _new_id() -> str:
    return "call_" + "".join(secrets.choice(string.ascii_letters) for _ in range(_ID_LENGTH))
