"""A form of the answer beside tools and thoughts: the model may think, and then call or answer in the form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from gapless import EngineConfig
from gapless.errors import InvalidRequestError
from gapless.grammar.compiler import GrammarCompiler
from gapless.grammar.spec import MAX_GRAMMAR, GrammarSpec
from gapless.loading import load_engine
from gapless.server.answers import Content, Dialect, Reasoning, ToolCallArguments, plan_answer
from gapless.server.answers.plan import AnswerPlan
from gapless.text.chat import ChatTemplate
from gapless.text.tokenizer import Tokenizer
from gapless.weights.source import resolve_model
from server.test_answers_plan import BARE, CALL, CALL_G, SCHEMA, STRICT, THOUGHT, WRONG, F, G, accepts
from support.grammars import STOPS, V
from support.server import RunningServer, running_server

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "days": {"type": "integer", "maximum": 9, "minimum": 1}},
    "required": ["name", "days"],
    "additionalProperties": False,
}
ROME = '{"name": "Rome", "days": 3}'
JSON = {"json_schema": CITY}
ANY_JSON = {"json_object": True}
INSIDE = THOUGHT.removeprefix("<think>")


def plan(
    asked: dict[str, Any],
    tools: object = None,
    choice: object = None,
    *,
    dialect: Dialect = "hermes",
    tag: str | None = None,
    several: bool = True,
) -> AnswerPlan:
    return plan_answer(
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=several,
        dialect=dialect,
        reasoning_tag=tag,
        asked=asked,
    )


# ----------------------------------------------------------------- when there is one, and when it is refused


@pytest.mark.parametrize("asked", [JSON, ANY_JSON, {"regex": "a"}, {"choice": ["a"]}, {"grammar": 'start: "a"'}, {}])
def test_a_form_is_left_as_it_is_where_neither_thoughts_nor_calls_may_come(asked: dict[str, Any]):
    for each in (plan(asked), plan(asked, [STRICT], "none"), plan(asked, [STRICT], dialect="none")):
        assert not each.has_form
        assert each.form == each.form_after("<think>") == asked


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_calls_that_must_come_leave_no_room_for_a_form(choice: object):
    with pytest.raises(InvalidRequestError, match="response_format does not go together with a tool_choice"):
        plan(JSON, [F], choice)


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"json_schema": deep(101)}, "json_schema is nested deeper than 100"),
        ({"json_schema": {"title": "a" * 300_000}}, "json_schema has .* the limit is 262144"),
        ({"json_schema": {"title": "a" * MAX_GRAMMAR}}, f"json_schema is too long where .* the limit is {MAX_GRAMMAR}"),
        ({"json_schema": {"x-guidance": {}}}, "x-guidance"),
        ({"choice": ["a" * 65_500]}, f"choice is too long where .* the limit is {MAX_GRAMMAR}"),
        ({"regex": "a" * 9000}, "regex has 9000 bytes"),
        ({"grammar": 'start: "a"'}, "grammar: .* may come as well"),
    ],
)
def test_a_form_that_can_not_stand_beside_others_is_refused(asked: dict[str, Any], said: str):
    for options in ({"tag": "think"}, {"tools": [F]}):
        with pytest.raises(InvalidRequestError, match=said):
            _ = plan(asked, options.get("tools"), tag=options.get("tag")).form  # pyright: ignore[reportArgumentType]


def test_a_regex_or_grammar_with_the_tags_in_it_is_all_of_the_answers():
    own: list[dict[str, Any]] = [
        {"regex": "<think>[^<]*</think>(yes|no)"},
        {"grammar": 'start: "<think>hm</think>" | "<tool_call>{}"'},
        {"choice": ["</think>yes"]},
    ]
    for asked in own:
        assert plan(asked, [F], tag="think").form == asked
        with pytest.raises(InvalidRequestError, match="tools of a form"):
            plan(asked, [STRICT], tag="think")
    with pytest.raises(InvalidRequestError, match="write </think> or <tool_call> into it, or give a regex"):
        plan({"grammar": 'start: "a"'}, [F], tag="think")
    with pytest.raises(InvalidRequestError, match="they stand: give a regex"):
        plan({"grammar": 'start: "a"'}, [F], dialect="llama3_json")


# ----------------------------------------------------------------- what it lets through


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    folder = resolve_model("demo").folder
    assert folder is not None
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, V, STOPS, seconds=60.0)


PARAMETERS: dict[str, Any] = {
    "type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "required": ["a"], "additionalProperties": False,
    "$defs": {"x": {"type": "integer"}},
}  # fmt: skip
DEEP = {"type": "function", "function": {"name": "d", "strict": True, "parameters": PARAMETERS}}
BARE_D = BARE.replace('"f"', '"d"')
TWICE = {"type": "function", "function": {"name": "e", "strict": True, "parameters": PARAMETERS}}
NAMED_F = '{"name": "f", "days": 3}'
WRONG_BARE = BARE.replace('"a"', '"b"')
FORMS: list[tuple[str, AnswerPlan, str, list[str], list[str]]] = [
    (
        "tools", plan(JSON, [STRICT, G]), "",
        [ROME, CALL, f"{CALL}\n{CALL_G}", CALL_G.replace("{}", '{"x": [1]}')],
        ["", "Hi", WRONG, f"So. {CALL}", f"{ROME}\n{CALL}", f"{CALL}\n{ROME}", f"\n{ROME}", "{}", THOUGHT + ROME],
    ),
    ("one call at most", plan(JSON, [F], several=False), "", [ROME, CALL, WRONG], [f"{CALL}\n{CALL}"]),
    (
        "tools, thinking", plan(JSON, [STRICT], tag="think"), "",
        [ROME, CALL, THOUGHT + ROME, THOUGHT + CALL, f"<think>{ROME}</think>{ROME}"],
        [THOUGHT, f"{THOUGHT}Hi", THOUGHT + WRONG, "<think>hm", INSIDE + ROME],
    ),
    (
        "tools, in thoughts", plan(JSON, [STRICT], tag="think"), "<think>\n",
        [INSIDE + ROME, INSIDE + CALL, f"{ROME}</think>{ROME}"],
        [ROME, CALL, INSIDE, INSIDE + WRONG, f"{INSIDE}Hi"],
    ),
    (
        "thinking", plan(JSON, [STRICT], "none", tag="think"), "",
        [ROME, THOUGHT + ROME],
        [THOUGHT, THOUGHT + CALL, CALL, "Hi", f"{THOUGHT}{{}}"],
    ),
    ("no known calls", plan(JSON, [STRICT], dialect="none", tag="think"), "", [THOUGHT + ROME], [CALL, THOUGHT + CALL]),
    ("in thoughts", plan(ANY_JSON, tag="think"), "<think>", [INSIDE + ROME, "</think>{}"], [ROME, "</think>[]"]),
    (
        "bare", plan(JSON, [STRICT, DEEP, TWICE, G], dialect="llama3_json", tag="think"), "",
        [ROME, NAMED_F, BARE, BARE_D, f"{BARE}; {BARE_D}", THOUGHT + BARE, f"{THOUGHT}{ROME}"],
        [
            "Hi", WRONG_BARE, WRONG_BARE.replace('"f"', '"d"'), BARE_D.replace("3", '"3"'), f"{ROME}; {BARE}",
            f"{BARE}; {ROME}", '{"name": "Romeo", "days": 3}', CALL, BARE.replace('"f"', '"h"'),
        ],
    ),
    (
        "bare, in thoughts", plan(JSON, [STRICT], dialect="llama3_json", tag="think"), "<think>\n",
        [INSIDE + ROME, INSIDE + BARE],
        [ROME, BARE, INSIDE + WRONG_BARE],
    ),
    (
        "bare, one call at most, any object", plan(ANY_JSON, [F], dialect="llama3_json", several=False), "",
        [BARE, "{}", '{"nam": 3}', '{"name": "x"}', '{"parameters": {"a": 3}, "b": []}'],
        [f"{BARE}; {BARE}", "3", "Hi"],
    ),
    (
        "a regex", plan({"regex": "[ab/]{2}"}, [STRICT], tag="think"), "",
        ["a/", f"{THOUGHT}ba", f"{THOUGHT}{CALL}", CALL],
        ["a", "abc", "\nab", f"{THOUGHT}a", WRONG, f"ab{CALL}"],
    ),
    (
        "a regex of everything", plan({"regex": "(?s:.*)"}, [STRICT], tag="think"), "",
        ["", "Hi", "<thin", "<tool_cal", CALL, f"{THOUGHT}Hi", THOUGHT + CALL],
        ["<think>hm", "\n<think>hm", WRONG, f"Hi {CALL}", THOUGHT + WRONG],
    ),
    (
        "a regex, in thoughts", plan({"regex": "(?i)yes"}, tag="think"), "<think>",
        [f"{INSIDE}YES", "</think>yes"],
        ["yes", f"{INSIDE}no", INSIDE],
    ),
    (
        "a regex, bare", plan({"regex": '\\{"n[a-z]*": .*\\}|Hi'}, [STRICT], dialect="llama3_json"), "",
        ["Hi", BARE, '{"nam": 3}', '{"none": 3}'],
        [WRONG_BARE, '{"name": 3}'],
    ),
    (
        "a choice", plan({"choice": ["no", "nope", "<b>"]}, [F], tag="think"), "",
        ["no", "nope", "<b>", f"{THOUGHT}nope", f"{THOUGHT}{CALL}"],
        ["nop", "\nno", f"{THOUGHT}nop", "Hi", THOUGHT],
    ),
    (
        "white space first", plan({"choice": [" a", "\nb"]}, [F], dialect="llama3_json", tag="think"), "",
        [" a", "\nb", f"{THOUGHT} a", "<think></think> a", BARE, THOUGHT + BARE],
        ["a", "  a", f"{THOUGHT}a"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "prompt", "good", "bad"), [case[1:] for case in FORMS], ids=[case[0] for case in FORMS]
)
def test_an_answer_is_a_call_or_of_the_form(
    compiler: GrammarCompiler, tokenizer: Tokenizer, asked: AnswerPlan, prompt: str, good: list[str], bad: list[str]
):
    form = asked.form_after(prompt)
    assert [text for text in good if not accepts(compiler, tokenizer, form, text)] == []
    assert [text for text in bad if accepts(compiler, tokenizer, form, text)] == []


@pytest.mark.parametrize("dialect", ["hermes", "llama3_json"])
def test_as_many_tools_as_there_may_be_compile_beside_a_form(compiler: GrammarCompiler, dialect: Dialect):
    tools = [
        {"type": "function", "function": {"name": f"f{i}", "parameters": SCHEMA, "strict": True}} for i in range(128)
    ]
    spec = GrammarSpec.of(**plan(JSON, tools, dialect=dialect, tag="think").form)
    assert spec is not None
    assert compiler.compile(spec).matcher().error is None


def test_what_it_lets_through_is_read_as_what_it_is():
    written: dict[Dialect, str] = {"hermes": CALL, "llama3_json": BARE}
    for dialect, call in written.items():
        asked = plan(JSON, [STRICT], dialect=dialect, tag="think")
        for prompt, thoughts in (("", THOUGHT), ("<think>\n", INSIDE)):
            parser = asked.parser(prompt)
            assert [*parser.push(thoughts + ROME), *parser.finish()][-1] == Content(ROME)
            parser = asked.parser(prompt)
            pieces = [*parser.push(thoughts + call), *parser.finish()]
            assert pieces[0] == Reasoning("Maybe <tool_call>, maybe not.")
            assert pieces[-1] == ToolCallArguments(0, '{"a": 3}')


# ----------------------------------------------------------------- over HTTP


@pytest.fixture(scope="module")
def thinking_server() -> Iterator[RunningServer]:
    """Its model is said to think in tags and to call in others."""
    loaded = load_engine("demo", EngineConfig(device="cpu", max_rows=4))
    with running_server(loaded, tool_parser="hermes", reasoning_parser="think") as server:
        yield server


@pytest.fixture
def opening_server(thinking_server: RunningServer) -> Iterator[RunningServer]:
    """Its prompts open the tag of thoughts."""
    loaded = thinking_server.engine.loaded
    opened = ChatTemplate("{{ messages[0].content }}{% if add_generation_prompt %}<think>\n{% endif %}")
    thinking_server.engine._llm.loaded = replace(loaded, chat_template=opened)  # pyright: ignore[reportPrivateUsage]
    try:
        yield thinking_server
    finally:
        thinking_server.engine._llm.loaded = loaded  # pyright: ignore[reportPrivateUsage]


CHAT_TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}
FLAT_TOOL = {"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}
CHAT_FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
FLAT_FORMAT = {"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}}


def unlikely(server: RunningServer, *texts: str, character: str) -> dict[str, float]:
    """A logit_bias against all tokens with this character that these texts can be spelled with."""
    words = server.engine.loaded.tokenizer
    assert words is not None
    parts = {text[begin:end] for text in texts for begin in range(len(text)) for end in range(begin + 1, len(text) + 1)}
    return {str(token): -100 for token in range(V) if character in (part := words.decode([token])) and part in parts}


def completed(server: RunningServer, body: dict[str, Any], *, stream: bool) -> tuple[str, list[tuple[str, str]]]:
    """Content, and name and arguments of the calls, of a chat."""
    chat: Any = {
        "model": server.context.model_names[0],
        "messages": [{"role": "user", "content": "Which city?"}],
        "tools": [CHAT_TOOL],
        "response_format": CHAT_FORMAT,
        "parallel_tool_calls": False,
        "max_tokens": 200,
        **body,
    }
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        if stream:
            with client.chat.completions.stream(**chat) as events:
                message = events.get_final_completion().choices[0].message
        else:
            message = client.chat.completions.create(**chat).choices[0].message
    return message.content or "", [(each.function.name, each.function.arguments) for each in message.tool_calls or ()]


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_with_tools_and_a_schema_may_be_answered_by_either(thinking_server: RunningServer, stream: bool):
    no_tags = unlikely(thinking_server, "<think>", "<tool_call>", character="<")
    content, calls = completed(thinking_server, {"logit_bias": no_tags, "seed": 1}, stream=stream)
    jsonschema.validate(json.loads(content), CITY)
    assert calls == []
    neither = unlikely(thinking_server, '{"name', character="{") | unlikely(thinking_server, "<think>", character="h")
    content, [(name, arguments)] = completed(thinking_server, {"logit_bias": neither, "seed": 1}, stream=stream)
    assert (content, name) == ("", "f")
    jsonschema.validate(json.loads(arguments), SCHEMA)


def test_so_may_a_response(thinking_server: RunningServer):
    body = {"input": "Which city?", "tools": [FLAT_TOOL], "text": FLAT_FORMAT, "max_output_tokens": 200, "seed": 1}
    no_tags = unlikely(thinking_server, "<think>", "<tool_call>", character="<")
    neither = unlikely(thinking_server, '{"name', character="{") | unlikely(thinking_server, "<think>", character="h")
    (message,) = responded(thinking_server, {**body, "logit_bias": no_tags})
    jsonschema.validate(json.loads(message["content"][0]["text"]), CITY)
    call, *_ = responded(thinking_server, {**body, "logit_bias": neither, "parallel_tool_calls": False})
    assert (call["type"], call["name"]) == ("function_call", "f")
    jsonschema.validate(json.loads(call["arguments"]), SCHEMA)


def responded(server: RunningServer, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = httpx.post(f"{server.url}/v1/responses", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["output"]


@pytest.mark.parametrize("tools", [False, True])
def test_a_prompt_that_opens_the_tag_leaves_the_model_its_thoughts(opening_server: RunningServer, tools: bool):
    body: dict[str, Any] = {"max_tokens": 8, "seed": 1, "messages": [{"role": "user", "content": "Which city?"}]}
    body |= {"response_format": CHAT_FORMAT} | ({"tools": [CHAT_TOOL]} if tools else {})
    answer = httpx.post(f"{opening_server.url}/v1/chat/completions", json=body, timeout=60).json()
    message = answer["choices"][0]["message"]
    assert not message["content"]
    assert message["reasoning_content"]
    assert "{" not in message["reasoning_content"]
    body = {"input": "Which city?", "text": FLAT_FORMAT, "max_output_tokens": 8, "seed": 1}
    (thoughts,) = responded(opening_server, body | ({"tools": [FLAT_TOOL]} if tools else {}))
    assert thoughts["type"] == "reasoning"
    assert "{" not in thoughts["content"][0]["text"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"tools": [CHAT_TOOL], "tool_choice": "required", "response_format": CHAT_FORMAT}, "response_format"),
        ({"grammar": 'start: "a"'}, "grammar: thoughts or calls may come as well"),
        ({"json_schema": {"title": "a" * MAX_GRAMMAR}}, "json_schema is too long where"),
        ({"json_schema": {"type": "nothing"}, "tools": [CHAT_TOOL]}, "can not be compiled"),
        ({"regex": "("}, "can not be compiled"),
        ({"response_format": CHAT_FORMAT, "tools": [CHAT_TOOL], "stop": "a"}, "stop does not go together"),
    ],
)
def test_what_can_not_be_both_gets_400(thinking_server: RunningServer, body: dict[str, Any], said: str):
    for path, prompt in (
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("responses", {"input": "a"}),
    ):
        if path == "responses" and "tools" in body:
            body = {**body, "tools": [FLAT_TOOL]}
        answer = httpx.post(f"{thinking_server.url}/v1/{path}", json={**prompt, **body}, timeout=60)
        assert answer.status_code == 400, answer.text
        assert said in answer.json()["error"]["message"]
