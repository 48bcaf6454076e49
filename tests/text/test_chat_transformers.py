"""Rendered chats are those of transformers, character by character."""

from __future__ import annotations

from typing import Any

import pytest

from gapless.errors import InvalidRequestError
from gapless.text.chat import ChatTemplate
from gapless.text.tokenizer import Tokenizer
from text.templates import ALL

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the <weather> & 'temperature' in a \"city\", ü",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "  Hi <there> & 'you'\n"}],
    "system": [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "日本 🎉"}],
    "turns": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb "},
        {"role": "user", "content": "c\n\nd"},
    ],
    "ends with assistant": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>x</think>b"}],
    "tools": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"t": 20}', "name": "weather"},
        {"role": "tool", "content": "again"},
        {"role": "user", "content": "thanks"},
    ],
    "out of order": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
}


def theirs(source: str, messages: list[dict[str, Any]], **given: Any) -> str | None:
    """What transformers renders, or None where the template refuses."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(conversations=[messages], chat_template=source, **given)
    except TemplateError:
        return None
    return rendered[0]


@pytest.mark.parametrize("template", ALL)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("given", [{}, {"enable_thinking": False, "date_string": "1 May"}], ids=["", "arguments"])
def test_templates_of_all_families_render_the_same(
    template: str, chat: str, tools: list[dict[str, Any]] | None, given: dict[str, Any]
):
    source, messages = ALL[template], CHATS[chat]
    for prompt in (True, False):
        expected = theirs(source, messages, tools=tools, add_generation_prompt=prompt, **SPECIAL, **given)
        ours = ChatTemplate(source, SPECIAL)
        if expected is None:
            with pytest.raises(InvalidRequestError, match="refuses this chat"):
                ours.render(messages, tools=tools, add_generation_prompt=prompt, **given)
        else:
            assert ours.render(messages, tools=tools, add_generation_prompt=prompt, **given) == expected


@pytest.mark.parametrize("chat", ["one", "system", "turns", "ends with assistant"])
@pytest.mark.parametrize("prompt", [True, False])
def test_smollm2_chats_render_and_encode_the_same(smollm: Tokenizer, chat: str, prompt: bool):
    template = ChatTemplate.of(smollm)
    expected = theirs(template.source or "", CHATS[chat], add_generation_prompt=prompt, **smollm.special_tokens)
    assert template.render(CHATS[chat], add_generation_prompt=prompt) == expected
    text, ids = template.encode(smollm, CHATS[chat], add_generation_prompt=prompt)
    assert text == expected
    assert ids == smollm.encode(text, add_special_tokens=False)
