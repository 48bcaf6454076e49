"""/v1/responses with the openai client against the server on the demo model, and its parts without one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from frontend.tiny import TripModel, tiny_engine
from gapless.config import EngineConfig
from gapless.errors import InvalidRequestError
from gapless.loading import load_engine
from gapless.server.routes.responses_input import messages_of
from gapless.text.chat import ChatTemplate
from support.server import RunningServer, running_server

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 4}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
QUESTION = "Name a colour."


@pytest.fixture(scope="module")
def thinking_server() -> Iterator[RunningServer]:
    """Its model is said to think in tags and to call in others: a regex makes it."""
    loaded = load_engine("demo", EngineConfig(device="cpu", max_rows=4))
    with running_server(loaded, tool_parser="hermes", reasoning_parser="think") as server:
        yield server


@pytest.fixture(scope="module")
def model(demo_server: RunningServer) -> str:
    return demo_server.context.model_names[0]


def test_a_text_gets_a_message(client: openai.OpenAI, model: str):
    response = client.responses.create(
        model=model, input=QUESTION, instructions="Be short.", temperature=0, max_output_tokens=60, metadata={"a": "b"}
    )
    assert response.status == ("completed" if response.incomplete_details is None else "incomplete")
    assert response.output_text
    assert [item.type for item in response.output] == ["message"]
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert (response.instructions, response.metadata, response.to_dict()["store"]) == ("Be short.", {"a": "b"}, False)
    again = client.responses.create(
        model=model,
        input=[
            {"role": "developer", "content": [{"type": "input_text", "text": "Be short."}]},
            {"role": "user", "content": QUESTION},
        ],
        temperature=0,
        max_output_tokens=60,
    )
    assert again.output_text == response.output_text
    assert again.usage is not None
    assert again.usage.input_tokens_details.cached_tokens > 0


def test_events_add_up_to_the_answer_that_comes_whole(client: openai.OpenAI, model: str):
    options: Any = {"model": model, "input": QUESTION, "temperature": 0, "max_output_tokens": 12}
    whole: Any = client.responses.create(**options)
    events: list[Any] = list(client.responses.create(**options, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = [kind for kind in kinds if kind == "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed" if whole.status == "completed" else "response.incomplete",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == whole.output_text
    assert last.response.usage is not None


def test_an_answer_cut_by_its_limit_is_incomplete(client: openai.OpenAI, model: str):
    response = client.responses.create(model=model, input="Count to a hundred.", max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    (item,) = response.output
    assert item.type == "message"
    assert item.status == "incomplete"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_forced_call_streams_arguments_that_follow_the_schema(client: openai.OpenAI, model: str, choice: Any):
    with client.responses.stream(
        model=model,
        input="Weather in Rome for 3 days?",
        tools=[WEATHER],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_output_tokens=200,
    ) as stream:
        events: list[Any] = list(stream)
        final = stream.get_final_response()
    (item,) = final.output
    assert item.type == "function_call"
    assert item.name == "weather"
    jsonschema.validate(json.loads(item.arguments), PARAMETERS)
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == item.arguments
    assert len(pieces) > 1


def test_a_call_and_its_result_go_on(client: openai.OpenAI, model: str):
    response = client.responses.create(
        model=model,
        input=[
            {"role": "user", "content": "Weather in Rome?"},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Rome", "days": 1}'},
            {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        ],
        tools=[WEATHER],
        tool_choice="none",
        max_output_tokens=10,
    )
    assert [item.type for item in response.output] == ["message"]


def test_a_json_schema_gives_the_form_of_the_text(client: openai.OpenAI, model: str):
    response = client.responses.create(
        model=model,
        input="A city?",
        text={"format": {"type": "json_schema", "name": "city", "schema": PARAMETERS, "strict": True}},
        max_output_tokens=200,
    )
    jsonschema.validate(json.loads(response.output_text), PARAMETERS)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"]}, "top_logprobs"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"n": 2}, "n:"),
        ({"input": []}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "b", "arguments": "{"}]}, "input[0].arguments"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{**WEATHER, "parameters": {"type": "string"}}]}, "tools[0].parameters"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_object"}}, "regex": "a"}, "one form"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_it_can_not_do_is_refused_by_name(demo_server: RunningServer, body: dict[str, Any], said: str):
    answer = httpx.post(f"{demo_server.url}/v1/responses", json={"input": "a", **body})
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]


def test_an_unknown_model_is_not_found(demo_server: RunningServer):
    assert httpx.post(f"{demo_server.url}/v1/responses", json={"input": "a", "model": "x"}).status_code == 404


def test_items_become_messages():
    items: list[object] = [
        {"role": "system", "content": "Be kind."},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
        },
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": ""},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "x"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "done"}]},
        {"role": "developer", "content": "Now shout."},
    ]
    system, user, calls, result, done, later = messages_of(items, "Be short.")
    assert system == {"role": "system", "content": "Be short.\n\nBe kind."}
    assert user == {"role": "user", "content": "a\nb"}
    assert calls["reasoning_content"] == "hm"
    assert [call["function"]["name"] for call in calls["tool_calls"]] == ["f", "g"]
    assert result == {"role": "tool", "tool_call_id": "2", "content": "x", "name": "g"}
    assert done == {"role": "assistant", "content": "done"}
    assert later == {"role": "system", "content": "Now shout."}


def test_a_text_beside_instructions_is_the_users():
    assert messages_of("hi", None) == [{"role": "user", "content": "hi"}]
    assert [each["role"] for each in messages_of("hi", "x")] == ["system", "user"]
    with pytest.raises(InvalidRequestError, match=r"input\[0\]\.role"):
        messages_of([{"role": "king", "content": "a"}], None)


WRITTEN = """<think>
hm
</think>

So.
<tool_call>
{"name": "weather", "arguments": {"city": "Rome"}}
</tool_call>"""


def made_to_write(server: RunningServer, text: str, **options: Any) -> list[Any]:
    """The events of an answer that can be no other."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        name = server.context.model_names[0]
        body = {"regex": re.escape(text), **options}
        tools: Any = [{**WEATHER, "strict": False}]
        with client.responses.stream(model=name, input="a", tools=tools, extra_body=body) as stream:
            return list(stream)


def test_thoughts_text_and_calls_are_items_of_their_own(thinking_server: RunningServer):
    events = made_to_write(thinking_server, WRITTEN)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.completed"
    thoughts, message, call = last.response.output
    assert (thoughts.type, thoughts.content[0].text, thoughts.summary) == ("reasoning", "hm", [])
    assert (message.type, message.content[0].text) == ("message", "So.")
    assert (call.type, call.name, call.arguments) == ("function_call", "weather", '{"city": "Rome"}')
    assert last.response.usage.output_tokens_details.reasoning_tokens == 1
    done = [event for event in events if event.type == "response.output_item.done"]
    assert [event.output_index for event in done] == [0, 1, 2]
    assert [event.item.id for event in done] == [item.id for item in last.response.output]
    assert all(event.item.status == "completed" for event in done)
    kinds = [event.type for event in events]
    for kind in ("reasoning_text.delta", "reasoning_text.done", "output_text.done", "function_call_arguments.done"):
        assert f"response.{kind}" in kinds


def test_a_call_that_is_cut_is_incomplete(thinking_server: RunningServer):
    begin = 'So. <tool_call>{"name": "weather", "arguments": {"city": "'
    endless = re.escape(begin) + "[a-z]{400}"
    (*_, last) = made_to_write(thinking_server, "", regex=endless, max_output_tokens=len(begin))
    assert last.type == "response.incomplete"
    assert [item.status for item in last.response.output] == ["completed", "incomplete"]
    assert last.response.output[1].arguments.startswith('{"city": "')


def test_thoughts_of_a_prompt_that_opens_the_tag_come_before_a_forced_call(thinking_server: RunningServer):
    loaded = thinking_server.engine.loaded
    opened = ChatTemplate("{{ messages[0].content }}{% if add_generation_prompt %}<think>\n{% endif %}")
    thinking_server.engine._llm.loaded = replace(loaded, chat_template=opened)  # pyright: ignore[reportPrivateUsage]
    try:
        body = {"input": "a", "tools": [WEATHER], "tool_choice": "required", "max_output_tokens": 6, "seed": 3}
        answer = httpx.post(f"{thinking_server.url}/v1/responses", json=body, timeout=60).json()
    finally:
        thinking_server.engine._llm.loaded = loaded  # pyright: ignore[reportPrivateUsage]
    (thoughts,) = answer["output"]
    assert thoughts["type"] == "reasoning"
    assert "<tool_call>" not in thoughts["content"][0]["text"]
    assert answer["status"] == "incomplete"


@pytest.mark.parametrize("steps", [1, 6])
def test_an_engine_that_fails_along_the_way_ends_the_stream_with_failed(steps: int):
    model = TripModel()
    with running_server(tiny_engine(model)) as server:
        model.steps_left = steps
        answer = httpx.post(f"{server.url}/v1/responses", json={"input": "ab", "stream": True, "stop_token_ids": [0]})
    kinds = re.findall("event: (.*)", answer.text)
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.failed"
    last = json.loads(answer.text.strip().rpartition("data: ")[2])["response"]
    assert last["status"] == "failed"
    assert "tripped" not in answer.text
    assert all(item["status"] == "incomplete" for item in last["output"])


def test_the_answer_is_as_openapi_describes_it(demo_server: RunningServer):
    document = httpx.get(f"{demo_server.url}/openapi.json").json()
    operation = document["paths"]["/v1/responses"]["post"]
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    body = {"input": QUESTION, "tools": [WEATHER], "tool_choice": "required", "max_output_tokens": 12, "seed": 1}
    answer = httpx.post(f"{demo_server.url}/v1/responses", json=body, timeout=60)
    jsonschema.validate(answer.json(), {**schema, "components": document["components"]})
    assert operation["requestBody"]["content"]["application/json"]["schema"]
