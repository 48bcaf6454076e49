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
_GAP: Final = r"GAP: /\s{1,4}/"
_OPENING: Final = '{"name": "'
_BARE_BEGINS: Final = (r"\s", rf"\{{\s*\"({'|'.join(KEYS)})\"", re.escape(PYTHON_TAG))  # of what is no text


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
    rules = [*_thoughts(reasoning_tag, inside=inside, gap=True), f"answer: {'calls | ' if functions else ''}form"]
    is_json, bare = asked.kind in ("json_schema", "json_object"), dialect == "llama3_json"
    if is_json:
        rules.append(f"form: {_json(json.loads(asked.text))}")
    else:
        rules += _text_form(asked, dialect if functions else "none", reasoning_tag, inside=inside)
    if functions:
        rules.append(_calls("calls:", several, "; " if bare else "\n"))
        if bare and is_json:
            rules.append("call: " + " | ".join(_json(_call_schema(name, schema)) for name, schema in functions))
        else:
            begin = _quoted(_OPENING) if bare else f"{_quoted(CALL_TAG)} " + _quoted("\n" + _OPENING)
            rules += [f"call: {begin} function", *_functions(functions, dialect)]
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


def _thoughts(tag: str | None, *, inside: bool, gap: bool = False) -> list[str]:
    """`start`, which goes on with `answer`. gap: white space may stand between."""
    rules = [f"ANY: /{_ANY}/"]
    if tag is None:
        return [*rules, "start: answer"]
    begin = "" if inside else _quoted(f"<{tag}>")
    return [
        *rules,
        *([_GAP] if gap else []),
        f"start: {'(thoughts GAP?)' if gap else 'thoughts'}{'' if inside else '?'} answer",
        f"thoughts[lazy]: {begin} ANY {_quoted(f'</{tag}>')}",
    ]


def _text_form(asked: GrammarSpec, dialect: Dialect, tag: str | None, *, inside: bool) -> list[str]:
    """`form`: a regex's or a choice's texts but those that would be read as thoughts or calls, or behind thoughts
    without their first characters, which are white space."""
    if asked.kind == "regex":
        text: str = json.loads(LLMatcher.grammar_from_regex(asked.text))["grammars"][0]["lark_grammar"]
        text = text.removeprefix("start: ")
    else:
        text = " | ".join(json.dumps(each, ensure_ascii=False) for each in json.loads(asked.text))
    begins = {"hermes": (f"{_ANY}{CALL_TAG}",), "llama3_json": _BARE_BEGINS, "none": ()}[dialect]
    if tag is not None:
        begins = (*begins, r"\s")
    return ["form: FORM", f"ASKED: {text}", f"FORM: ASKED{_without(begins, None if inside else tag)}"]


def _call_schema(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Of a whole call without a tag. The schema in it is a resource of its own, so its references stay in it."""
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": {"$id": "urn:parameters", **schema}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


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
    return [
        _GAP,
        "answer: GAP? (calls | text)",
        "text: TEXT",
        _text(tag, _BARE_BEGINS),
        _calls("calls:", several, "; "),
        call,
    ]


def _calls(rule: str, several: bool, between: str) -> str:
    return f"{rule} call{f' ({_quoted(between)} call)*' if several else ''}"


def _text(tag: str | None, begins: Sequence[str]) -> str:
    """TEXT, which does not begin like thoughts, or with any of `begins`."""
    return "TEXT: ANY" + _without(begins, tag)


def _without(begins: Sequence[str], tag: str | None) -> str:
    excluded = [*begins, *([] if tag is None else [f"<{re.escape(tag)}>"])]
    return "".join(f" & ~/{each}{_ANY}/" for each in excluded)


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _OPTIONS}, ensure_ascii=False, separators=(",", ":"))


def _quoted(text: str) -> str:
    return json.dumps(text)
