"""OpenAI's own client against a real server over the demo model."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam, ChatCompletionToolParam
from openai.types.chat.chat_completion_chunk import ChoiceDeltaToolCall

from gapless import SamplingParams
from gapless.outputs import CompletionOutput, RequestOutput, Usage
from gapless.params import MAX_N
from gapless.server.answers import AnswerParser, Content, Reasoning, ToolCallArguments, ToolCallBegin
from gapless.server.protocol.chat import ChatRequest
from gapless.server.protocol.completions import CompletionRequest
from gapless.server.routes.chat_writer import ChatWriter, message_of
from gapless.server.routes.common import Head
from support.server import RunningServer

MODEL = "SmolLM2-135M-Instruct"
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say hello."}]
COLOUR: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "paint", "description": "Paint the wall.", "parameters": COLOUR},
}


def direct(server: RunningServer, prompt: Any, params: SamplingParams) -> RequestOutput:
    """What the engine says without HTTP."""

    async def last() -> RequestOutput:
        outputs = [each async for each in server.engine.llm.generate(prompt, params, output_kind="final")]
        return outputs[-1]

    return server.run(last)


def test_a_chat_gets_the_engines_answer_and_its_usage(demo_server: RunningServer, client: openai.OpenAI):
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, max_tokens=12)
    expected = direct(demo_server, {"messages": HELLO}, SamplingParams(temperature=0, max_tokens=12))
    (choice,) = answer.choices
    assert choice.message.content == expected.outputs[0].text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == expected.outputs[0].finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.model, answer.object) == (MODEL, "chat.completion")


def test_content_may_come_in_parts_and_a_developer_is_the_system(client: openai.OpenAI):
    asked: dict[str, Any] = {"model": MODEL, "max_completion_tokens": 1, "extra_body": {"return_token_ids": True}}
    plain = client.chat.completions.create(messages=[{"role": "system", "content": "Be brief."}, *HELLO], **asked)
    parts: list[ChatCompletionMessageParam] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Say hello."}]},
    ]
    split = client.chat.completions.create(messages=parts, **asked)
    assert split.model_dump()["prompt_token_ids"] == plain.model_dump()["prompt_token_ids"]


def test_chunks_add_up_to_the_whole_answer_with_usage_at_the_end(client: openai.OpenAI):
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, max_tokens=12)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [delta.role for delta in deltas if delta.role] == ["assistant"]
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}
    assert chunks[-1].choices == []
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 4


def test_usage_may_come_in_every_chunk(demo_server: RunningServer):
    body = {
        "prompt": "One two three",
        "stream": True,
        "max_tokens": 4,
        "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    lines = httpx.post(f"{demo_server.url}/v1/completions", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    usages = [json.loads(line.removeprefix("data: "))["usage"] for line in lines[:-2]]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert (counts[0] < 4, counts[-1]) == (True, 4)


def test_n_answers_are_those_of_the_engine(demo_server: RunningServer, client: openai.OpenAI):
    asked: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 8}
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, **asked)
    expected = direct(demo_server, {"messages": HELLO}, SamplingParams(**asked))
    assert [choice.message.content for choice in answer.choices] == [each.text for each in expected.outputs]
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, **asked):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [each.text for each in expected.outputs]
    assert len(set(texts)) == 3


def test_logprobs_of_a_chat_are_the_engines(demo_server: RunningServer, client: openai.OpenAI):
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    expected = direct(demo_server, {"messages": HELLO}, SamplingParams(temperature=0, max_tokens=6, logprobs=3))
    assert answer.choices[0].logprobs is not None
    found = answer.choices[0].logprobs.content
    assert found is not None
    assert expected.outputs[0].logprobs is not None
    for each, line in zip(found, expected.outputs[0].logprobs, strict=False):
        assert each.logprob == pytest.approx(line.logprob, abs=1e-4)
        assert [top.logprob for top in each.top_logprobs] == pytest.approx([top[1] for top in line.top], abs=1e-4)
        assert bytes(each.bytes or []).decode("utf-8", "replace") == each.token
    assert "".join(each.token for each in found) == answer.choices[0].message.content
    chunks = client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3, stream=True
    )
    streamed = [
        each.token
        for chunk in chunks
        if chunk.choices[0].logprobs is not None
        for each in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == [each.token for each in found]


def test_a_strict_schema_is_kept_and_so_are_the_other_forms(demo_server: RunningServer, client: openai.OpenAI):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=30,
        logprobs=True,
        response_format={"type": "json_schema", "json_schema": {"name": "paint", "strict": True, "schema": COLOUR}},
    )
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), COLOUR)
    assert answer.choices[0].logprobs is not None
    tokens = [each.token for each in answer.choices[0].logprobs.content or ()]
    assert "".join(tokens) == answer.choices[0].message.content, "the end token is no part of the message"
    for form in ({"regex": "[ab]{3}"}, {"structured_outputs": {"regex": "[ab]{3}"}}, {"choice": ["aba", "bab"]}):
        body = {"prompt": "x", "max_tokens": 12, **form}
        text = httpx.post(f"{demo_server.url}/v1/completions", json=body).json()["choices"][0]["text"]
        assert set(text) <= {"a", "b"}
        assert len(text) == 3
    two = {"prompt": "x", "regex": "a", "structured_outputs": {"choice": ["b"]}}
    assert httpx.post(f"{demo_server.url}/v1/completions", json=two).status_code == 400


def test_a_required_tool_is_called_with_arguments_of_its_schema(client: openai.OpenAI):
    chunks = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Paint it red."}],
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=96,
        temperature=0,
        stream=True,
    )
    parts = [part for chunk in chunks for part in _calls_in(chunk)]
    assert {part.index for part in parts} == {0}
    assert [part.function.name for part in parts if part.function and part.function.name] == ["paint"]
    arguments = "".join(part.function.arguments or "" for part in parts if part.function)
    jsonschema.validate(json.loads(arguments), COLOUR)


def _calls_in(chunk: ChatCompletionChunk) -> list[ChoiceDeltaToolCall]:
    (choice,) = chunk.choices
    assert choice.finish_reason in (None, "tool_calls")
    return choice.delta.tool_calls or []


def test_the_parts_of_an_answer_become_a_message():
    message = message_of(
        [
            Reasoning("a "),
            Reasoning("plan"),
            ToolCallBegin(0, "call_x", "paint"),
            ToolCallArguments(0, '{"a"'),
            ToolCallArguments(0, ": 1}"),
            ToolCallBegin(1, "call_y", "wash"),
            ToolCallArguments(1, "{}"),
        ]
    )
    assert (message.content, message.reasoning_content) == (None, "a plan")
    calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    assert calls == [("call_x", "paint", '{"a": 1}'), ("call_y", "wash", "{}")]
    assert message_of([]).content == ""
    assert message_of([Content("a"), Content("b")]).content == "ab"


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI):
    plain = client.completions.create(model=MODEL, prompt="One, two, three,", temperature=0, max_tokens=12)
    word = plain.choices[0].text.split(",")[1]
    cut = client.completions.create(model=MODEL, prompt="One, two, three,", temperature=0, max_tokens=12, stop=[word])
    assert cut.choices[0].text == plain.choices[0].text.split(word)[0]
    assert cut.choices[0].finish_reason == "stop"


def test_completions_of_many_prompts_are_numbered_by_prompt_and_continuation(client: openai.OpenAI):
    prompts = ["The sky is", "Grass is", "Snow is"]
    asked: dict[str, Any] = {"model": MODEL, "n": 2, "seed": 5, "max_tokens": 4}
    answer = client.completions.create(prompt=prompts, **asked)
    assert [choice.index for choice in answer.choices] == list(range(6))
    alone = client.completions.create(prompt=prompts[1], **asked)
    assert [choice.text for choice in answer.choices[2:4]] == [choice.text for choice in alone.choices]
    texts = [""] * 6
    for chunk in client.completions.create(prompt=prompts, stream=True, **asked):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]


def test_completions_have_sixteen_tokens_unless_more_are_asked_for(client: openai.OpenAI):
    answer = client.completions.create(model=MODEL, prompt="Once", extra_body={"ignore_eos": True, "unheard_of": 1})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scores_of_echoed_token_ids_are_the_engines(demo_server: RunningServer, client: openai.OpenAI, max_tokens: int):
    texts = ["The capital of France is Paris.", "Ça va très bien, où est-ce? 😀"]
    tokenizer = demo_server.engine.loaded.tokenizer
    assert tokenizer is not None
    prompts = [tokenizer.encode(text) for text in texts]
    answer = client.completions.create(
        model=MODEL, prompt=prompts, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0, seed=1234
    )
    for choice, ids, text in zip(answer.choices, prompts, texts, strict=True):
        expected = direct(demo_server, ids, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))
        found = choice.logprobs
        assert found is not None
        assert found.tokens is not None
        assert found.token_logprobs is not None
        assert found.top_logprobs is not None
        assert found.text_offset is not None
        assert len(found.tokens) == len(ids) + max_tokens
        assert found.token_logprobs[0] is None
        assert expected.prompt_logprobs is not None
        lines = [line for line in expected.prompt_logprobs if line is not None]
        assert found.token_logprobs[1 : len(ids)] == pytest.approx([line.logprob for line in lines], abs=1e-4)
        for token, top, line in zip(found.tokens[1:], found.top_logprobs[1:], lines, strict=False):
            assert (token == max(top, key=lambda name: top[name])) == (line.rank == 1)
        assert choice.text.startswith(text)
        assert (choice.text == text) == (max_tokens == 0)
        for (token, begin), (_, end) in pairwise(zip(found.tokens, found.text_offset, strict=True)):
            assert token.startswith("bytes:") or choice.text[begin:end] == token
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2 * max_tokens


def test_streamed_echo_with_logprobs_is_the_whole_one(client: openai.OpenAI):
    asked: dict[str, Any] = {"model": MODEL, "prompt": ["One", "Two"], "echo": True, "logprobs": 2, "max_tokens": 5}
    whole = client.completions.create(temperature=0, **asked)
    text, tokens, offsets = ["", ""], [[], []], [[], []]
    for chunk in client.completions.create(temperature=0, stream=True, **asked):
        choice = chunk.choices[0]
        text[choice.index] += choice.text
        if choice.logprobs is not None:
            tokens[choice.index] += choice.logprobs.tokens or []
            offsets[choice.index] += choice.logprobs.text_offset or []
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert text[choice.index] == choice.text
        assert tokens[choice.index] == choice.logprobs.tokens
        assert offsets[choice.index] == choice.logprobs.text_offset


def test_a_prompt_may_end_within_a_character(demo_server: RunningServer, client: openai.OpenAI):
    tokenizer = demo_server.engine.loaded.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("a 😀")[:-1]
    answer = client.completions.create(model=MODEL, prompt=ids, echo=True, logprobs=0, max_tokens=3, temperature=0)
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert (choice.logprobs.text_offset or [])[len(ids)] == len(tokenizer.decode(ids))


def test_what_the_parser_holds_back_comes_with_the_end():
    body = ChatRequest.model_validate_json('{"messages": [{"role": "user", "content": "x"}]}')
    writer = ChatWriter(Head("id", "model"), body, [AnswerParser("hermes")], None, None)  # pyright: ignore[reportArgumentType]

    def chunk(text: str, finish_reason: Literal["stop"] | None = None) -> str:
        part = CompletionOutput(0, text, [5], finish_reason)
        return writer.write(((0, RequestOutput("0", None, [1], [part], False, Usage(1, 1))),)).decode()

    assert '"content":"so"' in chunk("so <tool")
    assert '"content":" <tool"' in chunk("", "stop")


def test_models_are_listed_and_found_and_another_name_is_not(client: openai.OpenAI):
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).model_dump()["max_model_len"] == 8192
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert caught.value.code == "model_not_found"


def test_errors_have_openais_form_and_name_the_parameter(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=-1)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[5] * 9000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.post("/nothing", cast_to=object)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("completions", {"prompt": "x", "suffix": "y"}, "suffix"),
    ("completions", {"prompt": "x", "best_of": 3}, "best_of"),
    ("completions", {"prompt": [1, "x"]}, "prompt"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": [["x"]]}, "prompt"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}, "text"),
    ("chat/completions", {"messages": [{"content": "x"}]}, "role"),
    ("chat/completions", {"messages": []}, "messages"),
    ("chat/completions", {"messages": HELLO, "tool_choice": "maybe"}, "tool_choice"),
    ("chat/completions", {"messages": HELLO, "functions": [{"name": "f"}]}, "functions"),
    ("chat/completions", {"messages": HELLO, "modalities": ["text", "audio"]}, "modalities"),
    ("chat/completions", {"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template"),
    ("chat/completions", {"messages": HELLO, "chat_template_kwargs": {"evil": 1}}, "evil"),
    ("chat/completions", {"messages": HELLO, "chat_template_kwargs": {"add_generation_prompt": 1}}, "add_generation"),
    ("chat/completions", {"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
    ("chat/completions", {"messages": HELLO, "response_format": {"type": "json_schema"}}, "json_schema"),
]


@pytest.mark.parametrize(("path", "body", "word"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_supported_is_said_to_be_so(demo_server: RunningServer, path: str, body: dict[str, Any], word: str):
    answer = httpx.post(f"{demo_server.url}/v1/{path}", json=body)
    assert answer.status_code == 400
    assert word in answer.json()["error"]["message"]


def test_nulls_are_defaults(demo_server: RunningServer):
    nulls = {name: None for name in CompletionRequest.model_fields if name != "prompt"}
    answer = httpx.post(f"{demo_server.url}/v1/completions", json={**nulls, "prompt": "x", "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    nulls = {name: None for name in ChatRequest.model_fields if name != "messages"}
    answer = httpx.post(f"{demo_server.url}/v1/chat/completions", json={**nulls, "messages": HELLO, "max_tokens": 1})
    assert answer.status_code == 200, answer.text


def test_tokens_go_there_and_back(demo_server: RunningServer):
    found = httpx.post(f"{demo_server.url}/tokenize", json={"prompt": "Wörter 😀", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    back = httpx.post(f"{demo_server.url}/detokenize", json={"tokens": found["tokens"]}).json()
    assert back["prompt"] == "Wörter 😀"
    chat = httpx.post(f"{demo_server.url}/tokenize", json={"messages": HELLO}).json()
    expected = direct(demo_server, {"messages": HELLO}, SamplingParams(max_tokens=1))
    assert chat["tokens"] == expected.prompt_token_ids
    assert httpx.post(f"{demo_server.url}/detokenize", json={"tokens": [10**6]}).status_code == 400
    limit = demo_server.engine.loaded.engine.admission.limits.max_model_len
    most = [httpx.post(f"{demo_server.url}/detokenize", json={"tokens": [5] * count}) for count in (limit, limit + 1)]
    assert [each.status_code for each in most] == [200, 400]
    assert httpx.post(f"{demo_server.url}/tokenize", json={}).status_code == 400


def test_the_observer_sees_requests_tokens_and_their_ends(demo_server: RunningServer):
    body = {"prompt": "x", "max_tokens": 5, "ignore_eos": True, "stream": True, "n": 2}
    headers = {"x-request-id": "mine-1", "traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01"}
    answer = httpx.post(f"{demo_server.url}/v1/completions", json=body, headers=headers)
    assert answer.headers["x-request-id"] == "mine-1"
    assert '"id":"cmpl-mine-1"' in answer.text
    watch = demo_server.observer.watches[-1]
    assert (watch.request_id, watch.endpoint, watch.traceparent) == (
        "mine-1",
        "/v1/completions",
        headers["traceparent"],
    )
    assert watch.count == 10
    ((reason, usage),) = watch.ends
    assert reason == "length"
    assert usage is not None
    assert usage.completion_tokens == 10
    assert demo_server.context.open == 0


@pytest.mark.parametrize("stream", [True, False])
def test_the_observer_hears_when_the_tokens_of_each_answer_came(demo_server: RunningServer, stream: bool):
    begun = time.monotonic()
    body = {"prompt": ["a", "b"], "max_tokens": 6, "ignore_eos": True, "stream": stream, "n": 2}
    assert httpx.post(f"{demo_server.url}/v1/completions", json=body, timeout=60).status_code == 200
    told = demo_server.observer.watches[-1].heard
    answers = {of: [each for each in told if each.of == of] for of in (0, 1, MAX_N, MAX_N + 1)}
    assert sum(len(each) for each in answers.values()) == len(told)
    for each in answers.values():
        assert sum(heard.count for heard in each) == 6
        assert len({heard.first for heard in each}) == 1
        times = [begun, each[0].first, *(heard.last for heard in each), time.monotonic()]
        assert times == sorted(times)
        assert each[-1].last - each[0].first > 0
        assert stream or len(each) == 1


def test_the_schema_says_everything_it_refers_to(demo_server: RunningServer):
    text = httpx.get(f"{demo_server.url}/openapi.json").text
    schema = json.loads(text)
    known = schema["components"]["schemas"]
    assert "$defs" not in text
    for part in text.split('"#/components/schemas/')[1:]:
        assert part.split('"')[0] in known
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        assert "requestBody" in schema["paths"][path]["post"]
        assert {"200", "400", "401", "413", "415", "429", "503"} <= set(schema["paths"][path]["post"]["responses"])
    assert known["CompletionRequest"]["properties"]["temperature"]["anyOf"][0]["maximum"] == 100
