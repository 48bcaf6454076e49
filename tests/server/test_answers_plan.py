"""What tools ask of an answer: who writes calls how, what is refused, and grammars that let nothing else through."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest

from gapless import AsyncLLM, EngineConfig, SamplingParams
from gapless.errors import ConfigError, InvalidRequestError
from gapless.grammar.compiler import GrammarCompiler
from gapless.grammar.spec import GrammarSpec
from gapless.loading import load_engine
from gapless.server.answers import (
    Content,
    Dialect,
    ToolCallArguments,
    ToolCallBegin,
    dialect_of,
    plan_answer,
    reasoning_tag_of,
)
from gapless.server.answers.plan import AnswerPlan
from gapless.text.tokenizer import Tokenizer
from gapless.weights.source import resolve_model
from support.grammars import STOPS, V, line
from text.templates import CHATML_TOOLS, HEADERS

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}
F: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
STRICT: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}
G: dict[str, Any] = {"type": "function", "function": {"name": "g"}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 3}}\n</tool_call>'
CALL_G = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
WRONG = '<tool_call>\n{"name": "f", "arguments": {"b": 3}}\n</tool_call>'
BARE = '{"name": "f", "parameters": {"a": 3}}'


def plan(
    tools: object,
    choice: object = None,
    *,
    dialect: Dialect = "hermes",
    tag: str | None = None,
    several: bool | None = None,
    flat: bool = False,
) -> AnswerPlan:
    return plan_answer(
        tools=tools, tool_choice=choice, parallel_tool_calls=several, dialect=dialect, reasoning_tag=tag, flat=flat
    )


# ----------------------------------------------------------------- who writes calls how


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, "none"),
        (CHATML_TOOLS, "hermes"),
        (HEADERS, "llama3_json"),
        ("{{ messages[0].content }}", "none"),
        ("<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>", "hermes"),
        ("<tool_call>\n<function=example>\n</tool_call>", "none"),
        ("<tool_call>{name}\n<arg_key>{key}</arg_key></tool_call>", "none"),
        ("{{- '{\"name\": \"' + call.name + '\", ' }}{{- '\"parameters\": ' }}", "llama3_json"),
        ('[TOOL_CALLS] {"name": "f", "parameters": {}}', "none"),
        ('{"name": "f", "arguments": {}} {"parameters": {}}', "none"),
        ('Respond in the format {"name": function name, "parameters": dictionary of values}.', "llama3_json"),
    ],
)  # fmt: skip
def test_the_template_shows_how_calls_are_written(source: str | None, expected: str):
    assert dialect_of(source, None) == expected
    assert dialect_of(source, "hermes") == "hermes"


def test_thoughts_stand_in_the_templates_tag():
    assert reasoning_tag_of("{{ '<think>\n' }}", None) == "think"
    assert reasoning_tag_of("{{ '<think>\n' }}", "none") is None
    assert reasoning_tag_of("", None) is None
    assert reasoning_tag_of(None, "seed:think") == "seed:think"


def test_an_unknown_parser_is_a_wrong_option():
    with pytest.raises(ConfigError, match="hermes"):
        dialect_of(None, "hermes2")
    with pytest.raises(ConfigError, match="reasoning_parser"):
        reasoning_tag_of(None, "<think>")


# ----------------------------------------------------------------- what is refused, and what is asked


def named(name: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("tools", "choice", "said"),
    [
        ("f", None, "tools must be a list"),
        ([3], None, r"tools\[0\] must be an object"),
        ([{"type": "function"}], None, r"tools\[0\] must be an object"),
        ([{"type": "web_search"}], None, r"tools\[0\]\.type"),
        ([F, named("a b")], None, r"tools\[1\]\.function\.name"),
        ([named("a" * 65)], None, r"tools\[0\]\.function\.name"),
        ([named("f\n")], None, r"tools\[0\]\.function\.name"),
        ([named(3)], None, r"tools\[0\]\.function\.name"),
        ([F, F], None, r"tools\[1\] has the name 'f'"),
        ([named(f"f{i}") for i in range(129)], None, "at most 128"),
        ([{"function": {"name": "f", "description": 3}}], None, r"tools\[0\]\.function\.description"),
        ([{"function": {"name": "f", "strict": 1}}], None, r"tools\[0\]\.function\.strict"),
        ([{"function": {"name": "f", "parameters": []}}], None, r"tools\[0\]\.function\.parameters"),
        ([{"function": {"name": "f", "parameters": {"type": "string"}}}], None, "schema of an object"),
        ([{"function": {"name": "f", "parameters": {"a": float("nan")}}}], None, "is not JSON"),
        ([{"function": {"name": "f", "parameters": {"title": "a" * 66_000}}}], None, "the limit is 65536"),
        (None, "required", "tool_choice needs tools"),
        ([F], "sometimes", "tool_choice must be"),
        ([F], 3, "tool_choice must be"),
        ([F], named("g"), "tool_choice names 'g'"),
        ([F], {"type": "function"}, "tool_choice must name"),
        ([F], {"type": "web_search", "name": "f"}, "tool_choice must name"),
    ],
)
def test_wrong_tools_are_refused_by_name(tools: object, choice: object, said: str):
    with pytest.raises(InvalidRequestError, match=said):
        plan(tools, choice)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"properties": {"a": {"pattern": "a" * 3000}}}, r"tools\[0\]\.function\.parameters: a pattern"),
        ({"x-guidance": {}}, r"tools\[0\]\.function\.parameters: .*x-guidance"),
        ({"$comment": "a" * 65_400}, "too long"),
        (nested(150), "nested deeper than 100"),
    ],
)
def test_a_schema_that_no_grammar_takes_is_refused_where_one_is_needed(schema: dict[str, Any], said: str):
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert plan([tool]).form == {}
    with pytest.raises(InvalidRequestError, match=said):
        _ = plan([tool], "required").form


def test_the_template_gets_the_tools_unless_none_may_be_called():
    definition = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
    assert plan([STRICT]).template_tools == [definition]
    assert plan(
        [{"type": "function", "name": "f", "parameters": SCHEMA, "strict": None}], flat=True
    ).template_tools == [definition]
    assert plan([F, G], named("g")).template_tools == [definition, G]
    assert plan([F], "none").template_tools is None
    assert plan([]).template_tools is None
    with pytest.raises(InvalidRequestError, match=r"tools\[0\]\.name"):
        plan([{"type": "function", "name": ""}], flat=True)


def test_there_is_a_form_where_something_is_promised():
    assert not plan(None).has_form
    assert not plan([F, G]).has_form
    assert not plan([STRICT], "none").has_form
    assert not plan([STRICT], dialect="none").has_form
    assert plan([F], several=False).has_form
    assert plan([F, STRICT | {"function": {**STRICT["function"], "name": "s"}}]).has_form
    assert plan([F], "required", dialect="none").has_form
    assert set(plan([F], named("f")).form) == {"grammar"}


def test_no_call_is_seen_where_none_may_come():
    assert plan([F], "none").parser("").push(CALL) == [Content(CALL)]
    begin, *_ = plan([F]).parser("").push(CALL)
    assert isinstance(begin, ToolCallBegin)


@pytest.mark.parametrize("text", [f"\n{CALL}\n{CALL_G}", f"<think>so</think>\n{CALL}", f" {BARE}; {BARE}"])
@pytest.mark.parametrize("choice", ["required", named("f")])
def test_calls_that_must_come_and_are_cut_off_leave_no_pieces_as_content(text: str, choice: object):
    forced = plan([F, G], choice, tag="think", dialect="llama3_json" if BARE in text else "hermes")
    free = replace(forced, choice="auto")
    for end in range(len(text)):
        reader, other = forced.parser(""), free.parser("")
        found = [*reader.push(text[:end]), *reader.finish()]
        assert not any(isinstance(piece, Content) for piece in found)
        calls = [piece for piece in [*other.push(text[:end]), *other.finish()] if not isinstance(piece, Content)]
        assert [type(piece) for piece in found] == [type(piece) for piece in calls]


def test_the_prompts_end_says_whether_the_answer_begins_in_thoughts():
    thinking = plan([F], "required", tag="think")
    assert thinking.parser("<think>\n").push("hm <")[0] != Content("hm")
    assert thinking.parser("<think>\n\n</think>\n\n").push(CALL)[1] == ToolCallArguments(0, '{"a": 3}')
    assert thinking.form_after("<think>\n") != thinking.form == thinking.form_after("<think></think>")


# ----------------------------------------------------------------- grammars


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    folder = resolve_model("demo").folder
    assert folder is not None
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, V, STOPS, seconds=60.0)


def accepts(compiler: GrammarCompiler, tokenizer: Tokenizer, form: dict[str, Any], text: str) -> bool:
    """Whether a model could write this text under the form, and end."""
    spec = GrammarSpec.of(**form)
    assert spec is not None
    matcher = compiler.compile(spec).matcher()
    for token in tokenizer.encode(text, add_special_tokens=False, special_as_text=True):
        mask_W = line()
        matcher.fill(mask_W)
        assert matcher.error is None
        if not np.uint32(mask_W.view(np.uint32)[token // 32] >> np.uint32(token % 32)) & 1:
            return False
        matcher.accept(token)
    return matcher.accepting


THOUGHT = "<think>\nMaybe <tool_call>, maybe not.\n</think>\n\n"
FORMS: list[tuple[str, AnswerPlan, str, list[str], list[str]]] = [
    (
        "required", plan([F, G], "required"), "",
        [CALL, f"{CALL}\n{CALL_G}"],
        ["", "Hi", WRONG, f"Hi {CALL}", f"{CALL} bye"],
    ),
    ("one at most", plan([F, G], "required", several=False), "", [CALL, CALL_G], [f"{CALL}\n{CALL_G}"]),
    ("named", plan([F, G], named("g"), dialect="none"), "", [CALL_G], [CALL, "Hi"]),
    (
        "required, thinking", plan([F], "required", tag="think"), "",
        [CALL, THOUGHT + CALL],
        [THOUGHT, THOUGHT + "Hi", f"{THOUGHT[7:]}{CALL}"],
    ),
    (
        "required, in thoughts", plan([F], "required", tag="think"), "<think>\n",
        [THOUGHT[7:] + CALL, f"hm</think>{CALL}"],
        [CALL, "hm", "hm</think>Hi"],
    ),
    (
        "strict", plan([STRICT, G]), "",
        ["", "Hi <b> <tool_cal", CALL, f"So.\n{CALL}\n{CALL_G} bye", CALL_G.replace("{}", '{"x": [1]}')],
        [WRONG, f"{CALL} {WRONG}", "<tool_call>\n{\"name\": \"h\"", "<tool_call> f()"],
    ),
    ("strict, one at most", plan([STRICT], several=False), "", ["Hi", f"So. {CALL}"], [f"{CALL} and", f"{CALL}{CALL}"]),
    (
        "strict, thinking", plan([STRICT], tag="think"), "",
        ["Hi", THOUGHT, f"{THOUGHT}Hi {CALL}", "<thin"],
        [f"{THOUGHT}{WRONG}", "<think>hm"],
    ),
    (
        "strict, in thoughts", plan([STRICT], tag="think"), "<think>",
        [THOUGHT[7:] + CALL, "</think>Hi"],
        ["Hi", f"</think>{WRONG}"],
    ),
    (
        "strict, bare", plan([STRICT], dialect="llama3_json", tag="think"), "",
        ["", "Hi", BARE, f"{BARE}; {BARE}", f"{THOUGHT}{BARE}", '{"title": 3}', f"So {BARE}"],
        [
            '{"name": "f", "parameters": {"b": 1}}', '{ "name": "f"}', '{"parameters": {}}', '\n{"type" : 1}',
            "<|python_tag|>f()", f"{BARE} bye",
        ],
    ),
    (
        "required, bare", plan([F], "required", dialect="llama3_json"), "",
        [BARE, f"{BARE}; {BARE}"],
        ["Hi", '{"title": 3}', CALL],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "prompt", "good", "bad"), [case[1:] for case in FORMS], ids=[case[0] for case in FORMS]
)
def test_the_form_lets_through_what_is_promised_and_nothing_else(
    compiler: GrammarCompiler, tokenizer: Tokenizer, asked: AnswerPlan, prompt: str, good: list[str], bad: list[str]
):
    form = asked.form_after(prompt)
    assert [text for text in good if not accepts(compiler, tokenizer, form, text)] == []
    assert [text for text in bad if accepts(compiler, tokenizer, form, text)] == []


@pytest.mark.parametrize(
    ("schema", "good"),
    [
        (None, "{}"),
        ({}, '{"a": 3}'),
        ({"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"type": "integer"}}}, '{"a": 3}'),
        ({"properties": {"a": {"const": {"title": "x"}}}}, '{"a": {"title": "x"}}'),
        ({"type": "object", "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, '{"a": 3}'),
        ({"properties": {"title": {"enum": ["</x>"], "title": "T"}}, "description": "Of a page."}, '{"title": "</x>"}'),
    ],
)
def test_schemas_of_all_kinds_compile(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any] | None, good: str
):
    tool = {"type": "function", "function": {"name": "f"} | ({} if schema is None else {"parameters": schema})}
    form = plan([tool], "required").form
    assert "Of a page." not in form["grammar"]
    assert accepts(compiler, tokenizer, form, CALL.replace('{"a": 3}', good))
    assert not accepts(compiler, tokenizer, form, CALL.replace('{"a": 3}', "3"))
    assert accepts(compiler, tokenizer, form, CALL.replace('{"a": 3}', '{"title": "x"}')) == (
        schema is not None and not set(schema) & {"anyOf", "description"}
    )


# ----------------------------------------------------------------- the demo model

TRIP: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 4},
        "by": {"enum": ["train", "boat"]},
    },
    "required": ["city", "by"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "trip", "parameters": TRIP}}, F]
SCHEMAS = {"trip": TRIP, "f": SCHEMA}
SEEDS = 6


def test_forced_calls_of_the_demo_model_follow_their_schemas():
    plans = [
        plan(TOOLS, "required", dialect="hermes", several=False),
        plan(TOOLS, named("f"), dialect="llama3_json", several=False),
    ]

    async def one(llm: AsyncLLM, asked: AnswerPlan, seed: int) -> tuple[str, str]:
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=160, **asked.form)
        chat: Any = {"messages": [{"role": "user", "content": "Plan a trip to Rome, please."}]}
        parser, pieces = asked.parser(""), []
        async for output in llm.generate(chat, params, output_kind="delta"):
            pieces += parser.push(output.outputs[0].text)
            if output.finished:
                assert output.outputs[0].finish_reason == "stop"
        begin, *rest = pieces + parser.finish()
        assert isinstance(begin, ToolCallBegin)
        assert all(isinstance(piece, ToolCallArguments) for piece in rest)
        return begin.name, "".join(piece.text for piece in rest)

    async def scenario() -> list[tuple[str, str]]:
        loaded = load_engine("demo", EngineConfig(device="cpu", max_rows=2 * SEEDS))
        async with AsyncLLM.from_loaded(loaded) as llm:
            return await asyncio.gather(*(one(llm, asked, seed) for asked in plans for seed in range(SEEDS)))

    calls = asyncio.run(scenario())
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    assert {name for name, _ in calls[SEEDS:]} == {"f"}
    assert len(set(calls)) > SEEDS
