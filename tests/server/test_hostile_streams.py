"""Where tokens begin in a text of broken characters, and streams against whole answers, at random."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from frontend.tiny import tiny_engine, tiny_tokenizer
from gapless.outputs import TokenLogprob
from gapless.server.protocol.completions import CompletionLogprobs
from gapless.server.token_texts import Offsets, TokenTexts
from support.server import RunningServer, running_server

TOKENS = [b"a", b"\xe2", b"\x82", b"\xac", b"\xc3", b"\xa9", b"\xf0", b"\x9f", b"\x98", b"\x80", b"\xff", b"z"]


def offsets_of(token_ids: list[int]) -> list[int]:
    found = CompletionLogprobs([], [], [], [])
    lines = [TokenLogprob(token, 0.0, 1, ()) for token in token_ids]
    Offsets(TokenTexts(tiny_tokenizer())).add(found, token_ids, lines, 0)
    return found.text_offset


def test_a_token_behind_half_a_character_begins_behind_its_replacement():
    tokenizer = tiny_tokenizer()
    ids = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    rng = random.Random(1)
    for _ in range(200):
        spelled = [rng.choice(TOKENS) for _ in range(rng.randint(1, 9))]
        token_ids = [ids[each] for each in spelled]
        text = tokenizer.decode(token_ids)
        before = [b"".join(spelled[:place]) for place in range(len(spelled))]
        expected = [  # what stands before it, but for a character that it goes on with
            len(each.decode(errors="replace")) - _goes_on(each, b"".join(spelled[place:]))
            for place, each in enumerate(before)
        ]
        assert offsets_of(token_ids) == expected, (spelled, text)


def _goes_on(before: bytes, behind: bytes) -> bool:
    apart = before.decode(errors="replace") + behind.decode(errors="replace")
    return apart != (before + behind).decode(errors="replace")


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(tiny_engine(lookahead=1)) as found:
        yield found


def completions_at_random(rng: random.Random) -> dict[str, Any]:
    body: dict[str, Any] = {
        "prompt": rng.choice(["ab é€😀", [1, 2, 34], ["a", "xyz"]]),
        "max_tokens": rng.choice([0, 1, 5, 12]),
        "temperature": rng.choice([0, 3]),
        "seed": rng.randint(0, 9),
        "n": rng.randint(1, 3),
        "ignore_eos": rng.random() < 0.5,
        "echo": rng.random() < 0.4,
        "logprobs": rng.choice([None, 0, 3]),
        "stop": rng.choice([None, "a", ["cd", "é"], "\ufffd"]),
        "include_stop_str_in_output": rng.random() < 0.3,
        "return_token_ids": rng.random() < 0.3,
    }
    if body["max_tokens"] and rng.random() < 0.3:
        body["min_tokens"] = rng.randint(0, body["max_tokens"])
    return body


def joined(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The choices of one answer, or of many chunks, as they are at the end."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for each in chunk["choices"]:
            choice = found.setdefault(each["index"], {"text": "", "ids": [], "logprobs": {}, "finish_reason": None})
            assert choice["finish_reason"] is None  # nothing comes behind the end
            choice["text"] += each["text"]
            choice["ids"] += each.get("token_ids", [])
            choice["finish_reason"] = each["finish_reason"]
            choice["stop_reason"] = each.get("stop_reason")
            for name, values in (each["logprobs"] or {}).items():
                choice["logprobs"].setdefault(name, []).extend(values)
    return found


def test_the_chunks_of_a_stream_add_up_to_the_whole_answer(server: RunningServer):
    rng = random.Random(2)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for _ in range(12):
            body = completions_at_random(rng)
            whole = client.post("/v1/completions", json=body).json()
            streamed = client.post(
                "/v1/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}}
            )
            *events, done = [line[6:] for line in streamed.text.split("\n") if line.startswith("data: ")]
            chunks = [json.loads(event) for event in events]
            assert done == "[DONE]"
            assert joined(chunks) == joined([whole]), body
            for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
                assert chunks[-1]["usage"][name] == whole["usage"][name], body
            for choice in joined([whole]).values():
                offsets = choice["logprobs"].get("text_offset", [])
                assert offsets == sorted(offsets), body
