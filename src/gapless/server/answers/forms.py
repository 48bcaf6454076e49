"""Grammars of answers with calls: what a model may write so that every call has a function's name and its arguments.

    must call    thoughts? call+
    may call     thoughts? (text call)* text

Text runs up to the tag that begins a call, as a lazy lexeme; where calls have no tag, they are the whole answer and
text does not begin as they do. Of a prompt that has opened the tag of thoughts, the answer begins inside of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gapless.errors import InvalidRequestError
from gapless.grammar.compiler import WHITESPACE
from gapless.grammar.spec import MAX_GRAMMAR
from gapless.server.answers.calls import KEYS
from gapless.server.answers.parser import CALL_TAG, END_TAG, PYTHON_TAG, Dialect

_OPTIONS: Final = {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}
_ANY: Final = "(?s:.*)"
_GAP: Final = r"GAP: /\s{1,4}/"
_OPENING: Final = '{"name": "'


def calls_form(
    functions: Sequence[tuple[str, Mapping[str, Any]]],
    dialect: Dialect,
    *,
    must_call: bool,
    several: bool,
    reasoning_tag: str | None,
    inside: bool,
) -> str:
    """A Lark grammar.

    functions  name and schema of each.
    several    more than one call may come.
    inside     the prompt has opened the reasoning tag.

    Raises InvalidRequestError: the schemas are too long for one grammar.
    """
    rules = _thoughts(reasoning_tag, inside=inside)
    shown = reasoning_tag if not inside else None
    if dialect == "llama3_json":
        rules += _bare(must_call, several, shown)
    else:
        rules += _tagged(must_call, several, shown)
    key, end = ("parameters", "}") if dialect == "llama3_json" else ("arguments", "}\n" + END_TAG)
    for place, (name, schema) in enumerate(functions):
        begin = f'{name}", "{key}": '
        guided = json.dumps({**schema, "x-guidance": _OPTIONS}, ensure_ascii=False, separators=(",", ":"))
        rules.append(f"function_{place}: {_quoted(begin)} %json {guided} {_quoted(end)}")
    rules.append("function: " + " | ".join(f"function_{place}" for place in range(len(functions))))
    text = "\n".join(rules)
    if len(text.encode()) > MAX_GRAMMAR:
        raise InvalidRequestError(
            f"tools: their schemas are too long for calls that must follow them: {len(text.encode())} bytes with all "
            f"that belongs to it, the limit is {MAX_GRAMMAR}. Offer fewer at a time"
        )
    return text


def _thoughts(tag: str | None, *, inside: bool) -> list[str]:
    """`start`, which goes on with `answer`."""
    rules = [f"ANY: /{_ANY}/"]
    if tag is None:
        return [*rules, "start: answer"]
    begin = "" if inside else _quoted(f"<{tag}>")
    return [
        *rules,
        f"start: thoughts{'' if inside else '?'} answer",
        f"thoughts[lazy]: {begin} ANY {_quoted(f'</{tag}>')}",
    ]


def _tagged(must_call: bool, several: bool, tag: str | None) -> list[str]:
    body = _quoted("\n" + _OPENING) + " function"
    if must_call:
        return [_GAP, _calls("answer: GAP?", several, "\n"), f"call: {_quoted(CALL_TAG)} {body}"]
    return [
        f"answer: {'call* text' if several else 'call | text'}",
        "text: TEXT",
        _text(tag, []),
        f"call: trigger {body}",
        f"trigger[lazy]: TEXT {_quoted(CALL_TAG)}",
    ]


def _bare(must_call: bool, several: bool, tag: str | None) -> list[str]:
    call = f"call: {_quoted(_OPENING)} function"
    if must_call:
        return [_GAP, _calls("answer: GAP?", several, "; "), call]
    begins = [r"\s", rf"\{{\s*\"({'|'.join(KEYS)})\"", re.escape(PYTHON_TAG)]
    return [
        _GAP,
        "answer: GAP? (calls | text)",
        "text: TEXT",
        _text(tag, begins),
        _calls("calls:", several, "; "),
        call,
    ]


def _calls(rule: str, several: bool, between: str) -> str:
    return f"{rule} call{f' ({_quoted(between)} call)*' if several else ''}"


def _text(tag: str | None, begins: Sequence[str]) -> str:
    """TEXT, which does not begin like thoughts, or with any of `begins`."""
    excluded = [*begins, *([] if tag is None else [f"<{re.escape(tag)}>"])]
    return "TEXT: ANY" + "".join(f" & ~/{each}{_ANY}/" for each in excluded)


def _quoted(text: str) -> str:
    return json.dumps(text)
