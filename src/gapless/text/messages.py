"""Checks what callers send as a chat, and makes of it the plain read-only data that a template gets to see."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from gapless.errors import InvalidRequestError

Message = Mapping[str, object]

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
_TEXT_FIELDS = ("name", "tool_call_id", "reasoning_content")
_DEEPEST = 64
MOST_VALUES = 50_000


def _refuse(*_: object, **__: object) -> NoReturn:
    raise TypeError("a chat template may not change its input")


_READ_ONLY: Any = _refuse


class FrozenList(list[Any]):
    """A list that a template can not change."""

    append = extend = insert = pop = remove = clear = sort = reverse = _READ_ONLY
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _READ_ONLY


class FrozenDict(dict[str, Any]):
    """A dict that a template can not change."""

    update = pop = popitem = clear = setdefault = _READ_ONLY
    __setitem__ = __delitem__ = __ior__ = _READ_ONLY


def check_messages(messages: Sequence[Message]) -> list[dict[str, object]]:
    """Messages with the fields that templates know, content as one text. Unknown fields are left out.

    Content is a text or a list of text parts, which are joined by line breaks. An assistant message may have tool
    calls instead; arguments that are JSON in a text are parsed, as templates expect it.
    Raises InvalidRequestError that names the message and the field.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidRequestError("messages must be a list of objects with role and content")
    if not messages:
        raise InvalidRequestError("messages must hold at least one message")
    return [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def check_tools(tools: Sequence[Mapping[str, object]] | None) -> list[Mapping[str, object]] | None:
    """Tools are objects; an empty list is none at all. Raises InvalidRequestError."""
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidRequestError("tools must be a list of objects")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError(f"tools[{index}] must be an object")
    return list(tools) or None


@dataclass(frozen=True, slots=True)
class Size:
    """Of JSON-like data: how many texts, numbers, lists, objects and keys, and the characters of all texts."""

    values: int
    characters: int


def measure(*data: object) -> Size:
    """Of all of it. Raises InvalidRequestError above MOST_VALUES: each takes a template some 10 us."""
    values = characters = 0
    left = list(data)
    while left:
        each = left.pop()
        values += 1
        if isinstance(each, str):
            characters += len(each)
        elif isinstance(each, Mapping | list | tuple):
            parts = cast("Mapping[object, object] | Sequence[object]", each)
            inside = len(parts) * (2 if isinstance(parts, Mapping) else 1)
            if values + len(left) + inside > MOST_VALUES:
                raise InvalidRequestError(f"the chat has more than {MOST_VALUES} texts, numbers, lists and objects")
            left.extend(parts)
            if isinstance(parts, Mapping):
                left.extend(parts.values())
    return Size(values, characters)


def freeze(value: object, change: Callable[[str], str], depth: int = 0) -> Any:
    """A read-only copy of JSON-like data with `change` applied to every text in it. Raises InvalidRequestError."""
    if depth > _DEEPEST:
        raise InvalidRequestError(f"the chat is nested deeper than {_DEEPEST} levels")
    if isinstance(value, str):
        return change(_encodable(value))
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return FrozenDict((freeze(str(key), change), freeze(each, change, depth + 1)) for key, each in items)
    if isinstance(value, list | tuple):
        return FrozenList(freeze(each, change, depth + 1) for each in cast("Sequence[object]", value))
    raise InvalidRequestError(f"a chat can hold texts, numbers, lists and objects, not {type(value).__name__}")


def _check_message(message: object, where: str) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{where} must be an object with role and content")
    fields = cast("Mapping[str, object]", message)
    role = fields.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise InvalidRequestError(f"{where}.role must be a word such as system, user, assistant or tool")
    checked: dict[str, object] = {"role": role}
    calls = fields.get("tool_calls")
    checked["content"] = _content(fields.get("content"), where, optional=bool(calls))
    for name in _TEXT_FIELDS:
        if (value := fields.get(name)) is not None:
            if not isinstance(value, str):
                raise InvalidRequestError(f"{where}.{name} must be a text")
            checked[name] = value
    if calls:
        if not isinstance(calls, list | tuple):
            raise InvalidRequestError(f"{where}.tool_calls must be a list")
        listed = enumerate(cast("Sequence[object]", calls))
        checked["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{index}]") for index, call in listed]
    return checked


def _content(content: object, where: str, *, optional: bool) -> str:
    if content is None and optional:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidRequestError(f"{where}.content must be a text or a list of text parts")
    texts: list[str] = []
    for index, part in enumerate(cast("Sequence[object]", content)):
        fields = cast("Mapping[str, object]", part) if isinstance(part, Mapping) else {}
        text = fields.get("text")
        if fields.get("type", "text") != "text" or not isinstance(text, str):
            raise InvalidRequestError(
                f'{where}.content[{index}] must be {{"type": "text", "text": ...}}: only text works'
            )
        texts.append(text)
    return "\n".join(texts)


def _tool_call(call: object, where: str) -> dict[str, object]:
    fields = cast("Mapping[str, object]", call) if isinstance(call, Mapping) else {}
    function = fields.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequestError(f"{where}.function must be an object with name and arguments")
    function_fields = dict(cast("Mapping[str, object]", function))
    if not isinstance(function_fields.get("name"), str):
        raise InvalidRequestError(f"{where}.function.name must be a text")
    arguments = function_fields.get("arguments")
    if isinstance(arguments, str):
        try:
            function_fields["arguments"] = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"{where}.function.arguments is not valid JSON") from error
    return {**fields, "function": function_fields}


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError("a text of the chat has half of a surrogate pair and is not valid Unicode") from error
    return text
