"""What a request may ask of the form of its text, checked without a library or a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, cast

from gapless.errors import InvalidRequestError

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]

MAX_SCHEMA: Final = 256 * 1024  # bytes of UTF-8, as the others
MAX_REGEX: Final = 8 * 1024
MAX_GRAMMAR: Final = 64 * 1024
MAX_CHOICES: Final = 4096
MAX_CHOICES_SIZE: Final = 64 * 1024
MAX_DEPTH: Final = 100  # of a schema's JSON; the library reads 128
MAX_PATTERN: Final = 2 * 1024  # of a regex in a schema
MAX_MULTIPLE_OF: Final = 10_000

_OBJECT: Final = '{"type":"object"}'


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """One constraint and its text. Equal specs have equal text, so it is a key of caches.

    kind  which of the arguments of of() it came from.
    text  json_schema and json_object: the schema as compact JSON with its keys in the order given, which is the order
          of the properties in the answer. regex, grammar: as given. choice: a JSON list of strings.
    """

    kind: GrammarKind
    text: str

    @staticmethod
    def of(
        *,
        json_schema: str | Mapping[str, object] | bool | None = None,
        json_object: bool = False,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        grammar: str | None = None,
    ) -> GrammarSpec | None:
        """The constraint that is given, None if none is.

        json_schema  a JSON schema, as an object or as its JSON text.
        json_object  any JSON object.
        regex        in the syntax of Rust's regex library: no look-around, no backreferences. All of the text has to
                     match.
        choice       one of these strings, none of them empty.
        grammar      a context-free grammar in llguidance's variant of Lark.
        Raises InvalidRequestError if there are two, or one is wrong or too long.
        """
        if not isinstance(json_object, bool):
            raise InvalidRequestError(f"json_object must be true or false, not {json_object!r:.100}")
        given: dict[GrammarKind, object] = {
            "json_schema": json_schema,
            "json_object": json_object or None,
            "regex": regex,
            "choice": choice,
            "grammar": grammar,
        }
        kinds: list[GrammarKind] = [kind for kind, value in given.items() if value is not None]
        if len(kinds) > 1:
            raise InvalidRequestError(f"a request has at most one grammar, not {' and '.join(kinds)}")
        if not kinds:
            return None
        kind = kinds[0]
        if kind == "json_object":
            return GrammarSpec(kind, _OBJECT)
        if kind == "json_schema":
            return GrammarSpec(kind, _schema_text(json_schema))
        if kind == "choice":
            return GrammarSpec(kind, _choice_text(choice))
        return GrammarSpec(kind, _plain_text(kind, given[kind], MAX_REGEX if kind == "regex" else MAX_GRAMMAR))


def _plain_text(name: str, value: object, limit: int) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name} must be a string, not {value!r:.100}")
    if not value:
        raise InvalidRequestError(f"{name} is empty")
    if "\0" in value:
        raise InvalidRequestError(f"{name} has a NUL character")
    return _sized(name, value, limit)


def _schema_text(value: object) -> str:
    if isinstance(value, str):
        _sized("json_schema", value, MAX_SCHEMA)
    elif not isinstance(value, (Mapping, bool)):
        raise InvalidRequestError(f"json_schema must be an object or its JSON text, not {value!r:.100}")
    try:
        schema: object = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(_plain(schema, 0), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except RecursionError:
        raise InvalidRequestError(f"json_schema is nested deeper than {MAX_DEPTH}") from None
    except (ValueError, TypeError) as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise InvalidRequestError(f"json_schema is not JSON: {error!s:.200}") from None
    if text[0] != "{":
        if text == "true":
            return "{}"
        raise InvalidRequestError(f"json_schema must be a JSON object, not {text:.100}")
    if "x-guidance" in cast("dict[str, object]", schema):
        raise InvalidRequestError("json_schema must not have x-guidance: grammar takes it, in %json")
    return _sized("json_schema", text, MAX_SCHEMA)


def _plain(value: object, depth: int) -> object:
    """The schema as dicts and lists, without what would take its compiler minutes. Raises InvalidRequestError."""
    if depth > MAX_DEPTH:
        raise InvalidRequestError(f"json_schema is nested deeper than {MAX_DEPTH}")
    if isinstance(value, Mapping):
        found: dict[str, object] = {}
        for key, each in cast("Mapping[object, object]", value).items():
            if not isinstance(key, str):
                raise InvalidRequestError(f"json_schema has a key that is no string: {key!r:.100}")
            _check_costly(key, each)
            found[key] = _plain(each, depth + 1)
        return found
    if isinstance(value, (list, tuple)):
        return [_plain(each, depth + 1) for each in cast("Sequence[object]", value)]
    return value


def _check_costly(key: str, value: object) -> None:
    patterns: list[object] = []
    if key == "pattern":
        patterns = [value]
    elif key == "patternProperties" and isinstance(value, Mapping):
        patterns = list(cast("Mapping[object, object]", value))
    for each in patterns:
        if isinstance(each, str) and len(each) > MAX_PATTERN:
            raise InvalidRequestError(
                f"a pattern of json_schema has {len(each)} characters, the limit is {MAX_PATTERN}"
            )
    if key == "multipleOf" and isinstance(value, (int, float)) and value > MAX_MULTIPLE_OF:
        raise InvalidRequestError(f"multipleOf must be at most {MAX_MULTIPLE_OF}, not {value!r:.40}")


def _choice_text(value: object) -> str:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InvalidRequestError(f"choice must be a list of strings, not {value!r:.100}")
    choices = cast("Sequence[object]", value)
    if not 0 < len(choices) <= MAX_CHOICES:
        raise InvalidRequestError(f"choice must have 1 to {MAX_CHOICES} strings, not {len(choices)}")
    for each in choices:
        if not isinstance(each, str) or not each:
            raise InvalidRequestError(f"each choice must be a string that is not empty, not {each!r:.100}")
    text = json.dumps(list(dict.fromkeys(choices)), ensure_ascii=False, separators=(",", ":"))
    return _sized("choice", text, MAX_CHOICES_SIZE)


def _sized(name: str, text: str, limit: int) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{name} has half of a surrogate pair and is not valid Unicode") from None
    if size > limit:
        raise InvalidRequestError(f"{name} has {size} bytes, the limit is {limit}")
    return text
