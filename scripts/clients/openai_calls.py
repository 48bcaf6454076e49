"""Calls of the `openai` package against a server with the demo model. GAPLESS_URL and GAPLESS_KEY say where."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel

MODEL = "SmolLM2-135M-Instruct"
URL, KEY = os.environ["GAPLESS_URL"], os.environ["GAPLESS_KEY"]
CAPITAL: Any = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
PAINT: Any = [{"role": "user", "content": "Paint the wall green."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
PAINTS: Any = {"type": "function", "function": {"name": "paint", "description": "Paint a wall.", "parameters": SCHEMA}}
WASHES: Any = {"type": "function", "function": {"name": "wash", "description": "Wash a wall.", "parameters": SCHEMA}}
AT_ONCE = 4  # calls
GREEDY: Any = {"model": MODEL, "temperature": 0, "max_tokens": 12}


class Wall(BaseModel):
    """What a form asks for."""

    colour: Literal["red", "green"]
    height: Literal[1, 2]


def models(client: openai.OpenAI) -> None:
    listed = [model.id for model in client.models.list()]
    assert MODEL in listed
    assert client.models.retrieve(MODEL).id == MODEL


def chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=CAPITAL, **GREEDY)
    [choice] = answer.choices
    assert "Paris" in (choice.message.content or "")
    assert choice.message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= GREEDY["max_tokens"]


def chat_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=CAPITAL, **GREEDY)
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(messages=CAPITAL, stream=True, stream_options=options, **GREEDY))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def chat_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(messages=CAPITAL, **GREEDY) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert stream.get_final_completion().choices[0].message.content == text
    assert "Paris" in text


def several_answers(client: openai.OpenAI) -> None:
    asked: Any = {**GREEDY, "temperature": 1.0, "n": 3, "seed": 7, "messages": CAPITAL}
    answer = client.chat.completions.create(**asked)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [choice.message.content for choice in client.chat.completions.create(**asked).choices]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=CAPITAL, logprobs=True, top_logprobs=3, **GREEDY)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content
    assert answer.usage is not None
    assert "".join(token.token for token in found.content) == answer.choices[0].message.content
    ends = answer.choices[0].finish_reason == "stop"  # with a token that is counted and has no text
    assert len(found.content) == answer.usage.completion_tokens - ends
    for token in found.content:
        assert token.top_logprobs[0].token == token.token  # greedy: the likeliest
        assert len(token.top_logprobs) == 3
        assert 0 >= token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob


def completions(client: openai.OpenAI) -> None:
    prompts = ["The capital of France is", "One, two, three,"]
    answer = client.completions.create(prompt=prompts, **GREEDY)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert "Paris" in answer.choices[0].text
    assert "four" in answer.choices[1].text
    streamed = ["", ""]
    for chunk in client.completions.create(prompt=prompts, stream=True, **GREEDY):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in answer.choices]
    stopped = client.completions.create(prompt=prompts[0], stop=["Paris"], **GREEDY)
    assert "Paris" not in stopped.choices[0].text
    assert stopped.choices[0].finish_reason == "stop"


def likelihoods(client: openai.OpenAI) -> None:
    text = "The capital of France is Paris"
    scored = client.completions.create(model=MODEL, prompt=text, echo=True, logprobs=1, max_tokens=0).choices[0]
    assert scored.text == text
    assert scored.logprobs is not None
    assert scored.logprobs.tokens is not None
    assert scored.logprobs.token_logprobs is not None
    assert "".join(scored.logprobs.tokens) == text
    assert scored.logprobs.token_logprobs[-1] > -2
    assert all(each < 0 for each in scored.logprobs.token_logprobs[1:])


def forms(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "wall", "schema": SCHEMA, "strict": True}}
    asked: Any = {**GREEDY, "messages": PAINT, "max_tokens": 40}
    answer = client.chat.completions.create(response_format=form, **asked)
    assert json.loads(answer.choices[0].message.content or "")["colour"] in ("red", "green")
    assert answer.choices[0].finish_reason == "stop"
    parsed = client.chat.completions.parse(response_format=Wall, **asked)
    wall = parsed.choices[0].message.parsed
    assert isinstance(wall, Wall)
    assert wall.colour in ("red", "green")
    assert json.loads(parsed.choices[0].message.content or "") == wall.model_dump()


def tools_forced(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "wash"}}
    for choice, names in (("required", {"paint", "wash"}), (named, {"wash"})):
        asked: Any = {**GREEDY, "messages": PAINT, "tools": [PAINTS, WASHES], "tool_choice": choice, "max_tokens": 64}
        answer = client.chat.completions.create(parallel_tool_calls=False, **asked)
        [call] = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.function.name in names
        assert json.loads(call.function.arguments)["colour"] in ("red", "green")
        chunks = client.chat.completions.create(parallel_tool_calls=False, stream=True, **asked)
        assert _streamed_calls(chunks) == [(call.function.name, call.function.arguments)]


def tools_by_choice(client: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        asked: Any = {**GREEDY, "messages": PAINT, "tools": [PAINTS], "tool_choice": choice}
        [whole] = client.chat.completions.create(**asked).choices
        calls = [(each.function.name, each.function.arguments) for each in whole.message.tool_calls or []]
        assert bool(calls) == (whole.finish_reason == "tool_calls")
        assert calls or whole.message.content
        assert not (calls and choice == "none")
        chunks = list(client.chat.completions.create(stream=True, **asked))
        assert _streamed_calls(chunks) == calls
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == (whole.message.content or "")


def tool_answers(client: openai.OpenAI) -> None:
    call: Any = {"id": "call_1", "type": "function", "function": {"name": "paint", "arguments": '{"colour": "green"}'}}
    turns: Any = [
        *PAINT,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]
    answer = client.chat.completions.create(messages=turns, tools=[PAINTS], **GREEDY)
    assert answer.choices[0].message.content


def _streamed_calls(chunks: Iterable[ChatCompletionChunk]) -> list[tuple[str, str]]:
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for chunk in chunks:
        for delta in (choice.delta for choice in chunk.choices):
            for call in delta.tool_calls or []:
                assert call.function is not None
                names.setdefault(call.index, call.function.name or "")
                arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
    return [(names[index], arguments[index]) for index in sorted(names)]


def responses(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": 12}
    question = "What is the capital of France? Answer in one word."
    answer = client.responses.create(input=question, **asked)
    assert "Paris" in answer.output_text
    assert answer.status in ("completed", "incomplete")
    events = list(client.responses.create(input=question, stream=True, **asked))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == answer.output_text
    assert events[0].type == "response.created"
    last: Any = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == answer.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


def responses_with_forms(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": 64, "input": "Paint the wall green."}
    form: Any = {"format": {"type": "json_schema", "name": "wall", "schema": SCHEMA, "strict": True}}
    assert json.loads(client.responses.create(text=form, **asked).output_text)["colour"] in ("red", "green")
    parsed = client.responses.parse(text_format=Wall, **asked).output_parsed
    assert isinstance(parsed, Wall)
    tool: Any = {"type": "function", "name": "paint", "parameters": SCHEMA, "strict": True}
    [call] = client.responses.create(tools=[tool], tool_choice="required", parallel_tool_calls=False, **asked).output
    assert call.type == "function_call"
    assert call.name == "paint"
    assert json.loads(call.arguments)["colour"] in ("red", "green")


def errors(client: openai.OpenAI) -> None:
    bad = _raised(openai.BadRequestError, lambda: client.chat.completions.create(messages=CAPITAL, model=MODEL, n=0))
    assert bad.status_code == 400
    assert bad.param == "n"
    long = _raised(openai.BadRequestError, lambda: client.completions.create(model=MODEL, prompt=[1] * 20_000))
    assert long.code == "context_length_exceeded"
    none = _raised(openai.NotFoundError, lambda: client.completions.create(model="another", prompt="a"))
    assert none.code == "model_not_found"
    other = client.with_options(api_key="another key")
    refused = _raised(openai.AuthenticationError, lambda: other.models.list())
    assert refused.code == "invalid_api_key"
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    wrong = _raised(
        openai.BadRequestError,
        lambda: client.chat.completions.create(messages=CAPITAL, response_format=form, model=MODEL),
    )
    assert wrong.status_code == 400


def _raised(kind: type[openai.APIStatusError], call: Callable[[], object]) -> openai.APIStatusError:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} was raised")


CALLS = (
    models,
    chat,
    chat_streamed,
    chat_stream_helper,
    several_answers,
    logprobs,
    completions,
    likelihoods,
    forms,
    tools_forced,
    tools_by_choice,
    tool_answers,
    responses,
    responses_with_forms,
    errors,
)


def main() -> None:
    """A failed call ends it with a traceback."""
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=120)
    with client, ThreadPoolExecutor(AT_ONCE) as threads:
        for done in [threads.submit(call, client) for call in CALLS]:
            done.result()
    print(", ".join(call.__name__.replace("_", " ") for call in CALLS))


if __name__ == "__main__":
    main()
