"""Grammars of answers with calls: what a model may write so that every call has a function's name and its arguments.

    must call    thoughts? call+
    may call     thoughts? (text call)* text
    of a form    thoughts? (call+ | form)

Text runs up to the tag that begins a call, as a lazy lexeme; where calls have no tag, they are the whole answer and
text does not begin as they do. Of a prompt that has opened the tag of thoughts, the answer begins inside of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from llguidance import LLMatcher

from gapless.errors import InvalidRequestError
from gapless.grammar.compiler import WHITESPACE
from gapless.grammar.spec import MAX_GRAMMAR, GrammarSpec
from gapless.server.answers.calls import KEYS
from gapless.server.answers.parser import CALL_TAG, END_TAG, PYTHON_TAG, Dialect

_OPTIONS: Final = {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}
_ANY: Final = "(?s:.*)"
_GAP: Final = r"GAP: /[ \t\r\n]{1,4}/"
_OPENING: Final = '{"name": "'
_SPACE: Final = r"/[ \t\r\n]{0,4}/"
_CALL_BEGINS: Final = (rf"\{{\s*\"({'|'.join(KEYS)})\"", re.escape(PYTHON_TAG))  # where calls have no tag


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
    text = "\n".join([*rules, *_functions(functions, dialect)])
    if len(text.encode()) > MAX_GRAMMAR:
        raise InvalidRequestError(
            f"tools: their schemas are too long for calls that must follow them: {len(text.encode())} bytes with all "
            f"that belongs to it, the limit is {MAX_GRAMMAR}. Offer fewer at a time"
        )
    return text


def answer_form(
    asked: GrammarSpec,
    functions: Sequence[tuple[str, Mapping[str, Any]]],
    dialect: Dialect,
    *,
    several: bool,
    reasoning_tag: str | None,
    inside: bool,
) -> str:
    """A Lark grammar of what `asked` describes, with thoughts before it or calls in its place.

    asked      no `grammar`.
    functions  as for calls_form(); none: no call may come.

    Where calls have no tag, JSON that reads as one is one, whichever of the two it was meant to be.
    Raises InvalidRequestError: all of it is too long for one grammar.
    """
    rules = _thoughts(reasoning_tag, inside=inside, behind="late")
    rules.append("answer: calls | form" if functions else "answer: form")
    is_json = asked.kind in ("json_schema", "json_object")
    if is_json:
        rules += [_GAP, "late: GAP? answer", f"form: {_json(json.loads(asked.text))}"]
    else:
        rules.append("late: late_calls | LATE" if functions else "late: LATE")
        rules += _text_form(asked, dialect if functions else "none", reasoning_tag if not inside else None)
    if functions and is_json and dialect == "llama3_json":
        rules += [_calls("calls: call", several, "; "), "call: " + " | ".join(_json_call(*each) for each in functions)]
    elif functions:
        rules += _lark_calls(functions, dialect, several)
    text = "\n".join(rules)
    if len(text.encode()) > MAX_GRAMMAR:
        raise InvalidRequestError(
            f"{asked.kind} is too long where thoughts or calls may come as well: {len(text.encode())} bytes with all "
            f"that belongs to it, the limit is {MAX_GRAMMAR}. Make it shorter, or offer fewer tools"
        )
    return text


def _functions(functions: Sequence[tuple[str, Mapping[str, Any]]], dialect: Dialect) -> list[str]:
    """`function`: a call from its name on, with what closes it."""
    key, end = ("parameters", "}") if dialect == "llama3_json" else ("arguments", "}\n" + END_TAG)
    rules: list[str] = []
    for place, (name, schema) in enumerate(functions):
        begin = f'{name}", "{key}": '
        rules.append(f"function_{place}: {_quoted(begin)} {_json(schema)} {_quoted(end)}")
    return [*rules, "function: " + " | ".join(f"function_{place}" for place in range(len(functions)))]


def _thoughts(tag: str | None, *, inside: bool, behind: str = "answer") -> list[str]:
    """`start`, which goes on with `answer`, or what comes behind thoughts instead."""
    rules = [f"ANY: /{_ANY}/"]
    if tag is None:
        return [*rules, "start: answer"]
    begin = "" if inside else _quoted(f"<{tag}>")
    return [
        *rules,
        f"start: thoughts {behind}{'' if inside else ' | answer'}",
        f"thoughts[lazy]: {begin} ANY {_quoted(f'</{tag}>')}",
    ]


def _text_form(asked: GrammarSpec, dialect: Dialect, tag: str | None) -> list[str]:
    """`form`: a regex's or a choice's texts but those that would be read as thoughts or calls."""
    if asked.kind == "regex":
        text: str = json.loads(LLMatcher.grammar_from_regex(asked.text))["grammars"][0]["lark_grammar"]
        text = text.removeprefix("start: ")
    else:
        text = " | ".join(json.dumps(each, ensure_ascii=False) for each in json.loads(asked.text))
    calls = {"hermes": [f"{_ANY}{CALL_TAG}"], "llama3_json": [rf"\s*{each}" for each in _CALL_BEGINS], "none": []}
    thoughts = [] if tag is None else [rf"\s*<{re.escape(tag)}>"]
    return [
        f"ASKED: {text}",
        f"FORM: ASKED{_without([*calls[dialect], *thoughts])}",
        "form: FORM",
        f"LATE: {_SPACE} FORM",
    ]


def _lark_calls(functions: Sequence[tuple[str, Mapping[str, Any]]], dialect: Dialect, several: bool) -> list[str]:
    """`calls`, and `late_calls` with white space before them, in one lexeme: the lexer decides once between those that
    begin alike, and the form may begin with white space, too."""
    if dialect == "llama3_json":
        mark, body, between = _quoted(_OPENING), "function", "; "
    else:
        mark, body, between = _quoted(CALL_TAG), _quoted("\n" + _OPENING) + " function", "\n"
    return [
        f"call: {mark} {body}",
        _calls("calls: call", several, between),
        f"LATE_MARK: {_SPACE} {mark}",
        f"late_call: LATE_MARK {body}",
        _calls("late_calls: late_call", several, between),
        *_functions(functions, dialect),
    ]


def _json_call(name: str, schema: Mapping[str, Any]) -> str:
    """A call without a tag, of the same lexemes as a form that is JSON. Its schema is a resource of its own, so its
    references stay in it."""
    parameters = {"$id": "urn:parameters", **schema}
    properties = {"name": {"const": name}, "parameters": parameters}
    return _json({"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False})


def _tagged(must_call: bool, several: bool, tag: str | None) -> list[str]:
    body = _quoted("\n" + _OPENING) + " function"
    if must_call:
        return [_GAP, _calls("answer: GAP? call", several, "\n"), f"call: {_quoted(CALL_TAG)} {body}"]
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
        return [_GAP, _calls("answer: GAP? call", several, "; "), call]
    return [
        _GAP,
        "answer: GAP? (calls | text)",
        "text: TEXT",
        _text(tag, [r"\s", *_CALL_BEGINS]),
        _calls("calls: call", several, "; "),
        call,
    ]


def _calls(rule: str, several: bool, between: str) -> str:
    return rule + (f" ({_quoted(between)} call)*" if several else "")


def _text(tag: str | None, begins: Sequence[str]) -> str:
    """TEXT, which does not begin like thoughts, or with any of `begins`."""
    return "TEXT: ANY" + _without([*begins, *([] if tag is None else [f"<{re.escape(tag)}>"])])


def _without(begins: Sequence[str]) -> str:
    return "".join(f" & ~/{each}{_ANY}/" for each in begins)


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _OPTIONS}, ensure_ascii=False, separators=(",", ":"))


def _quoted(text: str) -> str:
    return json.dumps(text)
