"""The functions that a request offers, and which of them it wants called, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from gapless.errors import InvalidRequestError
from gapless.grammar.spec import GrammarSpec
from gapless.server.answers.parser import NAME

MAX_TOOLS: Final = 128
MAX_SCHEMA: Final = 64 * 1024  # bytes of a function's parameters

_DESCRIPTIONS: Final = ("title", "description", "examples")
_NAMES_OF_SCHEMAS: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES: Final = ("const", "enum", "default")

Choice = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function.

    definition  as templates know it: {"type": "function", "function": {...}}.
    schema      of its arguments, an object. None: none was given.
    strict      every call must follow it.
    where       the place of the schema in the request.
    """

    name: str
    definition: dict[str, Any]
    schema: dict[str, Any] | None
    strict: bool
    where: str

    def checked_schema(self) -> dict[str, Any]:
        """The schema for a grammar; no arguments if there is none. Raises InvalidRequestError."""
        if self.schema is None:
            return {"type": "object", "additionalProperties": False}
        try:
            spec = GrammarSpec.of(json_schema=_bare(self.schema))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{self.where}: {error}") from None
        except RecursionError:
            raise InvalidRequestError(f"{self.where} is nested too deep") from None
        assert spec is not None
        return {"type": "object", **json.loads(spec.text)}


def read_tools(tools: object, *, flat: bool = False) -> list[Tool]:
    """flat: as /v1/responses has them, without an object around name and parameters. Raises InvalidRequestError."""
    if tools is None:
        return []
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise InvalidRequestError("tools must be a list")
    given = cast("Sequence[object]", tools)
    if len(given) > MAX_TOOLS:
        raise InvalidRequestError(f"tools: at most {MAX_TOOLS}, not {len(given)}")
    found = [_read_tool(tool, f"tools[{place}]", flat) for place, tool in enumerate(given)]
    names: set[str] = set()
    for place, tool in enumerate(found):
        if tool.name in names:
            raise InvalidRequestError(f"tools[{place}] has the name {tool.name!r}, as another one does")
        names.add(tool.name)
    return found


def read_choice(choice: object, tools: Sequence[Tool]) -> tuple[Choice, Sequence[Tool]]:
    """Whether calls may or must come, and of which functions. Raises InvalidRequestError."""
    if choice is None:
        choice = "auto"
    if choice == "none" or (choice == "auto" and not tools):
        return "none", ()
    if choice not in ("auto", "required") and not isinstance(choice, Mapping):
        raise InvalidRequestError(f"tool_choice must be none, auto, required or a function, not {choice!r:.100}")
    if not tools:
        raise InvalidRequestError("tool_choice needs tools")
    if isinstance(choice, str):
        return cast("Choice", choice), tools
    name = _chosen_name(cast("Mapping[str, object]", choice))
    chosen = [tool for tool in tools if tool.name == name]
    if not chosen:
        raise InvalidRequestError(f"tool_choice names {name!r:.100}, which is not among the tools")
    return "required", chosen


def _chosen_name(choice: Mapping[str, object]) -> str:
    """Of {"type": "function", "function": {"name": ...}} or {"type": "function", "name": ...}."""
    inner = choice.get("function")
    name = cast("Mapping[str, object]", inner).get("name") if isinstance(inner, Mapping) else choice.get("name")
    if choice.get("type", "function") != "function" or not isinstance(name, str):
        raise InvalidRequestError("tool_choice must name a function, or be none, auto or required")
    return name


def _read_tool(tool: object, where: str, flat: bool) -> Tool:
    fields = cast("Mapping[str, object]", tool) if isinstance(tool, Mapping) else {}
    if fields.get("type", "function") != "function":
        raise InvalidRequestError(f"{where}.type must be function: this server has no tools of its own")
    inner = fields if flat else fields.get("function")
    if not isinstance(inner, Mapping) or not isinstance(tool, Mapping):
        raise InvalidRequestError(f"{where} must be an object with the function's name and parameters")
    where = where if flat else f"{where}.function"
    function = {key: value for key, value in cast("Mapping[str, object]", inner).items() if value is not None}
    name, strict = function.get("name"), function.get("strict", False)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidRequestError(f"{where}.name must have 1 to 64 letters, digits, _ or -, not {name!r:.100}")
    if not isinstance(function.get("description", ""), str):
        raise InvalidRequestError(f"{where}.description must be a text")
    if not isinstance(strict, bool):
        raise InvalidRequestError(f"{where}.strict must be true or false")
    schema = _read_schema(function.get("parameters"), f"{where}.parameters")
    known = {key: value for key, value in function.items() if key in ("name", "description", "parameters")}
    return Tool(name, {"type": "function", "function": known}, schema, strict, f"{where}.parameters")


def _bare(schema: object) -> Any:
    """Without what describes and does not bind."""
    if isinstance(schema, list):
        return [_bare(each) for each in cast("list[object]", schema)]
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for key, value in cast("Mapping[str, object]", schema).items():
        if key in _NAMES_OF_SCHEMAS and isinstance(value, Mapping):
            found[key] = {name: _bare(each) for name, each in cast("Mapping[str, object]", value).items()}
        elif key in _VALUES:
            found[key] = value
        elif key not in _DESCRIPTIONS:
            found[key] = _bare(value)
    return found


def _read_schema(schema: object, where: str) -> dict[str, Any] | None:
    if schema is None:
        return None
    if not isinstance(schema, Mapping) or cast("Mapping[str, object]", schema).get("type", "object") != "object":
        raise InvalidRequestError(f"{where} must be a JSON schema of an object")
    try:
        size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, TypeError, RecursionError):
        raise InvalidRequestError(f"{where} is not JSON, or nested too deep") from None
    if size > MAX_SCHEMA:
        raise InvalidRequestError(f"{where} has {size} bytes, the limit is {MAX_SCHEMA}")
    return {**cast("Mapping[str, object]", schema)}
