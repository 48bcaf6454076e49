"""From the items of a /v1/responses request to the messages of a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from gapless.errors import InvalidRequestError

_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_ROLES = ("user", "assistant", "system", "developer")


def messages_of(given: str | Sequence[object], instructions: str | None) -> list[dict[str, Any]]:
    """Calls and thoughts become part of the assistant's turn that they belong to, and the instructions part of the
    system's. Raises InvalidRequestError that names the item."""
    chat = _Chat()
    if instructions:
        chat.messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        chat.messages.append({"role": "user", "content": given})
        return chat.messages
    for place, item in enumerate(given):
        where = f"input[{place}]"
        if not isinstance(item, Mapping):
            raise InvalidRequestError(f"{where} must be an object")
        chat.add(cast("Mapping[str, object]", item), where)
    return chat.messages


class _Chat:
    """The messages so far."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}  # of functions, by the id of a call
        self._thoughts = ""

    def add(self, item: Mapping[str, object], where: str) -> None:
        kind = item.get("type", "message")
        if kind == "message":
            self._add_message(item, where)
        elif kind == "function_call":
            self._add_call(item, where)
        elif kind == "function_call_output":
            call_id = _text_field(item, "call_id", where)
            content = _content(item.get("output"), f"{where}.output")
            message = {"role": "tool", "tool_call_id": call_id, "content": content}
            self.messages.append(message | ({"name": self._names[call_id]} if call_id in self._names else {}))
        elif kind == "reasoning":
            self._thoughts = _content(item.get("content") or item.get("summary") or "", f"{where}.content")
        else:
            raise InvalidRequestError(f"{where}.type {kind!r:.100} is not supported")

    def _add_message(self, item: Mapping[str, object], where: str) -> None:
        role = item.get("role")
        if role not in _ROLES:
            raise InvalidRequestError(f"{where}.role must be one of {', '.join(_ROLES)}")
        content = _content(item.get("content"), f"{where}.content")
        last = self.messages[-1] if self.messages else None
        if role == "assistant":
            self.messages.append({"role": role, "content": content, **self._take_thoughts()})
        elif role in ("system", "developer") and len(self.messages) == 1 and last and last["role"] == "system":
            last["content"] += "\n\n" + content
        else:
            self.messages.append({"role": "user" if role == "user" else "system", "content": content})

    def _add_call(self, item: Mapping[str, object], where: str) -> None:
        call_id, name = _text_field(item, "call_id", where), _text_field(item, "name", where)
        arguments = _text_field(item, "arguments", where)
        try:
            json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise InvalidRequestError(f"{where}.arguments is not valid JSON") from None
        self._names[call_id] = name
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": "", **self._take_thoughts()})
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self.messages[-1].setdefault("tool_calls", []).append(call)

    def _take_thoughts(self) -> dict[str, str]:
        thoughts, self._thoughts = self._thoughts, ""
        return {"reasoning_content": thoughts} if thoughts else {}


def _text_field(item: Mapping[str, object], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise InvalidRequestError(f"{where}.{name} must be a text")
    return value


def _content(content: object, where: str) -> str:
    """A text, or parts that are joined by line breaks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InvalidRequestError(f"{where} must be a text or a list of text parts")
    texts: list[str] = []
    for place, part in enumerate(cast("Sequence[object]", content)):
        fields = cast("Mapping[str, object]", part) if isinstance(part, Mapping) else {}
        text = fields.get("refusal" if fields.get("type") == "refusal" else "text")
        if fields.get("type") not in (*_TEXTS, "refusal") or not isinstance(text, str):
            raise InvalidRequestError(f"{where}[{place}] must be a text part: only text works")
        texts.append(text)
    return "\n".join(texts)
