"""Taking a model's text apart: tags, thoughts and calls, in any cut."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapless.server.answers import AnswerParser, Content, Dialect, Piece, Reasoning, ToolCallArguments, ToolCallBegin

DIALECTS: list[Dialect] = ["hermes", "llama3_json", "none"]
Joined = list[tuple[str, Any]]


def parser(dialect: Dialect = "hermes", *, inside: bool = False, thinks: bool = False) -> AnswerParser:
    return AnswerParser(dialect, names=["f", "g"], reasoning_tag="think" if thinks or inside else None, inside=inside)


def pieces_of(parser: AnswerParser, parts: Iterable[str]) -> list[Piece]:
    found: list[Piece] = []
    for part in parts:
        found += parser.push(part)
    return found + parser.finish()


def joined(pieces: Iterable[Piece]) -> Joined:
    """Without ids, and with neighbours of a kind as one."""
    found: Joined = []
    for piece in pieces:
        if isinstance(piece, ToolCallBegin):
            found.append(("call", (piece.index, piece.name)))
            continue
        key = f"arguments {piece.index}" if isinstance(piece, ToolCallArguments) else type(piece).__name__
        if found and found[-1][0] == key:
            found[-1] = (key, found[-1][1] + piece.text)
        else:
            found.append((key, piece.text))
    return found


def cut(text: str, places: Sequence[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[low:high] for low, high in pairwise(ends)]


TAGGED = '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>'
BARE = '{"name": "f", "parameters": %s}'


def calls(*arguments: str, name: str = "f") -> Joined:
    found: Joined = []
    for index, each in enumerate(arguments):
        found += [("call", (index, name)), (f"arguments {index}", each)]
    return found


def content(text: str) -> Joined:
    return [("Content", text)]


CASES: list[tuple[str, Dialect, str, Joined | None]] = [  # None: it is content as it is
    ("text alone", "hermes", " a <b> \n", None),
    ("white space alone", "hermes", " \n", None),
    ("a call", "hermes", TAGGED % '{"a": 1}', calls('{"a": 1}')),
    ("two calls", "hermes", f"So.\n{TAGGED % '{}'}\n{TAGGED % '{ }'} \n", content("So.") + calls("{}", "{ }")),
    ("text behind", "hermes", f"{TAGGED % '{}'}\nbye ", calls("{}") + content("\nbye ")),
    (
        "tags in strings",
        "hermes",
        TAGGED % '{"</tool_call>": "<tool_call>{"}',
        calls('{"</tool_call>": "<tool_call>{"}'),
    ),
    ("arguments first", "hermes", '<tool_call>{"arguments": {"a": [1]}, "name": "f"}</tool_call>', calls('{"a": [1]}')),
    ("arguments in a text", "hermes", TAGGED % '"{\\"a\\": 1}"', calls('{"a": 1}')),
    ("a list in a text", "hermes", TAGGED % '"[]"', None),
    ("no arguments", "hermes", '<tool_call>{"name": "f"}</tool_call>', calls("{}")),
    ("null arguments", "hermes", TAGGED % "null", calls("{}")),
    ("members before", "hermes", '<tool_call>{"type": "x", "id": 3, "name": "f", "arguments": {}}', calls("{}")),
    ("members behind", "hermes", TAGGED % '{}, "x": [{}], "arguments": {"a": 1}', calls("{}")),
    ("a name that nobody offers", "hermes", '<tool_call>{"name": "h", "arguments": {}}', calls("{}", name="h")),
    ("a brace is missing", "hermes", TAGGED.replace("}", "") % "{}" + " x", calls("{}") + content(" x")),
    ("brace and end are missing", "hermes", TAGGED[:-14] % "{}" + "\n x", calls("{}") + content("\n x")),
    ("the end is missing", "hermes", '<tool_call>{"name": "f", "arguments": {}}', calls("{}")),
    ("cut in the arguments", "hermes", '<tool_call>{"name": "f", "arguments": {"a": tr', calls('{"a": tr')),
    ("cut before the name", "hermes", ' <tool_call>\n{"name": "f', None),
    ("cut in the tag", "hermes", "a <tool_c", None),
    ("no object", "hermes", " <tool_call> f() </tool_call>", None),
    ("a name that is none", "hermes", '<tool_call>{"name": "a b", "arguments": {}}', None),
    ("a name that is no text", "hermes", '<tool_call>{"name": 3, "arguments": {}}', None),
    ("an unknown first member", "hermes", '<tool_call>{"x": 3, "name": "f", "arguments": {}}', None),
    ("arguments that are a list", "hermes", TAGGED % "[]", None),
    (
        "a call behind nonsense",
        "hermes",
        f"<tool_call>no<tool_{TAGGED % '{}'}",
        content("<tool_call>no<tool_") + calls("{}"),
    ),
    ("a line break in a string", "hermes", TAGGED % '{"a": "b\n', calls('{"a": "b') + content("\n}\n</tool_call>")),
    ("nonsense behind the arguments", "hermes", TAGGED % "{}, x", calls("{}") + content(", x}\n</tool_call>")),
    ("a bare call", "llama3_json", BARE % '{"a": 1}', calls('{"a": 1}')),
    ("bare calls", "llama3_json", f" <|python_tag|> {BARE % '{}'} ; {BARE % '{}'}\n", calls("{}", "{}")),
    ("bare calls in lines", "llama3_json", f"{BARE % '{}'}\n{BARE % '{}'}", calls("{}", "{}")),
    ("a bare object that is no call", "llama3_json", '{"name": "Rome", "parameters": {}}', None),
    ("a bare object without parameters", "llama3_json", '{"name": "f"}', None),
    ("a bare object with other keys", "llama3_json", '{"title": {}}', None),
    ("a bare call behind text", "llama3_json", f"ok {BARE % '{}'}", None),
    ("text behind bare calls", "llama3_json", f"{BARE % '{}'}; so", calls("{}") + content("; so")),
    ("code behind the tag", "llama3_json", "<|python_tag|>f()", None),
    ("no dialect", "none", TAGGED % "{}", None),
]


@pytest.mark.parametrize(("dialect", "text", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_text_is_taken_apart_the_same_in_one_push_and_in_letters(
    dialect: Dialect, text: str, expected: Joined | None
):
    for parts in ([text], text):
        assert joined(pieces_of(parser(dialect), parts)) == (content(text) if expected is None else expected)


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>\nhm\n</think>\n\nYes", False, [("Reasoning", "hm"), ("Content", "Yes")]),
        ("\nhm </b> < \n</think>\n\nYes ", True, [("Reasoning", "hm </b> <"), ("Content", "Yes ")]),
        ("\n<think>hm", False, [("Reasoning", "hm")]),
        ("hm </thi", True, [("Reasoning", "hm </thi")]),
        ("<think>\n\n</think>\n", False, []),
        (" <thin", False, [("Content", " <thin")]),
        ("Yes <think>no</think>", False, [("Content", "Yes <think>no</think>")]),
        (f"<think>{TAGGED}</think>\n{TAGGED % '{}'}", False,
         [("Reasoning", TAGGED), ("call", (0, "f")), ("arguments 0", "{}")]),
    ],
)  # fmt: skip
def test_thoughts_come_first_and_on_their_own(text: str, inside: bool, expected: Joined):
    for parts in ([text], text):
        assert joined(pieces_of(parser(thinks=True, inside=inside), parts)) == expected


def test_arguments_are_given_as_they_come():
    found = parser()
    assert found.push('<tool_call>\n{"name": "f", "argu') == []
    begin, first = found.push('ments": {"a": "b')
    assert isinstance(begin, ToolCallBegin)
    assert re.fullmatch("call_[A-Za-z]{24}", begin.call_id)
    assert first == ToolCallArguments(0, '{"a": "b')
    assert found.push("c\\u00") == [ToolCallArguments(0, "c")]
    assert found.push('e9"}') == [ToolCallArguments(0, '\\u00e9"}')]
    assert found.push("}\n</tool_call>") == []
    assert found.finish() == []


def test_text_is_held_back_no_longer_than_it_may_be_a_tag():
    found = parser(thinks=True)
    assert found.push("<") == []
    assert found.push("b> 1 <tool") == [Content("<b> 1")]
    assert found.push("s") == [Content(" <tools")]
    assert parser("llama3_json").push('{"title": ') == [Content('{"title": ')]


def test_each_call_has_an_id_of_its_own():
    begins = [each for each in pieces_of(parser(), [TAGGED % "{}" * 50]) if isinstance(each, ToolCallBegin)]
    assert len({begin.call_id for begin in begins}) == 50


fragments = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", '{"name": "f", ', '"arguments": ',
        '"parameters": ', "{", "}", '"', "\\", '"a": ', "1", "-", "e", "true", "[", "]", ",", ";", " ", "\n", "\\u00e9",
        "é", "\U0001f600", "f", TAGGED % "{}", BARE % '{"a": "b"}',
    ]
)  # fmt: skip
texts = st.lists(fragments | st.text(max_size=4), max_size=30).map("".join)


@given(texts, st.sampled_from(DIALECTS), st.booleans(), st.booleans(), st.lists(st.integers(0, 10_000), max_size=30))
def test_any_cut_of_any_text_gives_the_same_pieces(
    text: str, dialect: Dialect, thinks: bool, inside: bool, places: list[int]
):
    whole = pieces_of(parser(dialect, thinks=thinks, inside=inside), [text])
    assert joined(pieces_of(parser(dialect, thinks=thinks, inside=inside), cut(text, places))) == joined(whole)
    for piece in whole:
        assert isinstance(piece, ToolCallBegin) or piece.text


def squeezed(text: str) -> str:
    return "".join(text.split())


@given(texts, st.sampled_from(DIALECTS))
def test_no_text_is_lost_but_what_calls_are_made_of(text: str, dialect: Dialect):
    pieces = pieces_of(parser(dialect), [text])
    at = 0
    for piece in pieces:
        if isinstance(piece, Content | Reasoning):
            part = squeezed(piece.text)
            found = squeezed(text).find(part, at)
            assert found >= 0
            at = found + len(part)
    if not any(isinstance(piece, ToolCallBegin) for piece in pieces):
        assert "".join(piece.text for piece in pieces if isinstance(piece, Content)) == text


@given(st.text().filter(lambda text: "<" not in text and "{" not in text), st.sampled_from(DIALECTS))
def test_plain_text_passes_as_it_is(text: str, dialect: Dialect):
    assert joined(pieces_of(parser(dialect, thinks=True), text)) == ([("Content", text)] if text else [])


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
arguments = st.dictionaries(texts, values, max_size=4)


@given(
    st.lists(arguments, min_size=1, max_size=4),
    st.sampled_from(["hermes", "llama3_json"]),
    st.booleans(),
    st.lists(st.integers(0, 10_000), max_size=20),
)
def test_what_calls_are_written_comes_back_letter_by_letter(
    given: list[dict[str, Any]], dialect: Dialect, plain: bool, places: list[int]
):
    written = [json.dumps(each, ensure_ascii=plain, indent=2 if plain else None) for each in given]
    text = (
        "\n".join(TAGGED % each for each in written)
        if dialect == "hermes"
        else ";".join(BARE % each for each in written)
    )
    expected: Joined = []
    for index, each in enumerate(written):
        expected += [("call", (index, "f")), (f"arguments {index}", each)]
    assert joined(pieces_of(parser(dialect), cut(text, places))) == expected


@given(texts, st.sampled_from(["hermes", "llama3_json"]))
def test_arguments_are_an_object_unless_content_or_the_end_breaks_them_off(text: str, dialect: Dialect):
    pieces = joined(pieces_of(parser(dialect), [text]))
    for (key, value), (next_key, _) in pairwise([*pieces, ("", "")]):
        if key.startswith("arguments") and next_key == "call":
            assert isinstance(json.loads(value), dict)
        elif key.startswith("arguments"):
            assert value.startswith("{")


@pytest.mark.parametrize("unit", ["<tool_call>", " ", '<tool_call>{"name":"', '{"arguments": [', "<think>", "\\", "<"])
def test_a_long_text_takes_time_in_proportion(unit: str):
    """Of a megabyte in small pushes: one that took time in proportion to its square would not end."""
    for dialect in DIALECTS:
        found = parser(dialect, thinks=True)
        for _ in range(100_000 // len(unit)):
            found.push(unit)
        found.finish()


def test_nesting_beyond_what_readers_take_is_content():
    deep = '<tool_call>{"arguments": ' + '{"a": ' * 1000
    assert joined(pieces_of(parser(), [deep])) == [("Content", deep)]
