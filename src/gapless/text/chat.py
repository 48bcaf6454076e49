"""Chats as prompts: a model's own template, rendered in a sandbox with a budget.

The template comes with the model, never with a request. It runs in minijinja, which has no access to Python, files or
modules; it gets copies of the data that it can not change, and fuel for a number of instructions that grows with the
number of messages. What fuel does not bound is memory: a hostile template can still exhaust it, so load models from
people you trust.
"""

from __future__ import annotations

import datetime
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from minijinja import Environment, TemplateError

from gapless.errors import InvalidRequestError
from gapless.text.messages import FrozenDict, Message, check_messages, check_tools, freeze, measure
from gapless.text.stand_ins import StandIns, all_texts
from gapless.text.tokenizer import Tokenizer

# What a request may pass on to the template besides messages and tools.
ALLOWED_ARGUMENTS = frozenset(
    {
        "builtin_tools",
        "custom_tools",
        "date_string",
        "documents",
        "enable_thinking",
        "reasoning_effort",
        "thinking",
        "tools_in_user_message",
    }
)
_FUEL = 200_000  # instructions; a plain template takes about 30 a message
_FUEL_PER_ITEM = 2_000
_NAME = "chat"
_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_PLAIN_TIME_FORM = re.compile(r"([^%]|%-?[A-Za-z]|%%)*")


class ChatTemplate:
    """A chat template. `source` None stands for a model without one: rendering then raises InvalidRequestError.

    special_tokens  what the template may write by name, such as bos_token. Safe to share between threads.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._free: list[Environment] = []  # each renders one chat at a time
        self._broken: str | None = None
        try:
            self._free.append(self._make())
        except TemplateError as error:
            self._broken = _reason(error)

    def _make(self) -> Environment:
        """Raises TemplateError."""
        environment = Environment(
            filters={"tojson": _tojson},
            globals={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
            trim_blocks=True,
            lstrip_blocks=True,
            debug=False,  # debug would put the chat's text into error messages
        )
        environment.add_template(_NAME, _GENERATION_TAG.sub(_plain_tag, self.source or ""))
        return environment

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template that lies beside a tokenizer."""
        return cls(tokenizer.chat_template, tokenizer.special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        **allowed: object,
    ) -> str:
        """The chat as one prompt text, the same as transformers' apply_chat_template(tokenize=False).

        messages               {"role", "content"} and what else OpenAI's chat messages have; see check_messages.
        add_generation_prompt  end with the opening of the assistant's turn.
        tools                  JSON schemas of functions.
        allowed                arguments of the template from ALLOWED_ARGUMENTS.

        A special token spelled out in a message can not be told from the template's own in the text: use encode().
        Raises InvalidRequestError: a message is malformed, the template refuses the chat or runs out of fuel, the
        argument is unknown, or the model has no template.
        """
        return self._run(_data(messages, tools, allowed), add_generation_prompt)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        **allowed: object,
    ) -> tuple[str, list[int]]:
        """The rendered chat and its token ids, among which special tokens are the template's own only.

        Special tokens spelled out in messages, tools or arguments go through the template as stand-ins and are put
        back once the text has been cut at the template's special tokens; each cut is then encoded as text. A chat
        without any takes the direct way. A template that looks into a message for a special token does not find it.
        Raises InvalidRequestError as render() does.
        """
        data = _data(messages, tools, allowed)
        stand_ins = StandIns(tokenizer.special_pattern, itertools.chain([self.source or ""], all_texts(data)))
        text = self._run(freeze(data, stand_ins.hide), add_generation_prompt)
        if not stand_ins.hidden:
            return text, tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = []
        position = 0
        for match in tokenizer.special_pattern.finditer(text):
            ids += _encode_text(tokenizer, stand_ins.restore(text[position : match.start()]))
            special = tokenizer.token_to_id(match[0])
            ids += [] if special is None else [special]
            position = match.end()
        ids += _encode_text(tokenizer, stand_ins.restore(text[position:]))
        return stand_ins.restore(text), ids

    def _run(self, data: Mapping[str, Any], add_generation_prompt: bool) -> str:
        if self.source is None:
            raise InvalidRequestError("this model has no chat template: send a prompt instead of messages")
        if self._broken is not None:
            raise InvalidRequestError(f"this model's chat template is not valid: {self._broken}")
        context = {**self._special_tokens, "documents": None, **data, "add_generation_prompt": add_generation_prompt}
        try:  # another thread may take the last one between a look and a pop
            environment = self._free.pop()
        except IndexError:
            environment = self._make()
        environment.fuel = _FUEL + _FUEL_PER_ITEM * (len(data["messages"]) + len(data["tools"] or ()))
        try:
            return environment.render_template(_NAME, **context)
        except (InvalidRequestError, KeyboardInterrupt, SystemExit):
            raise
        except TemplateError as error:
            if error.kind == "OutOfFuel":
                raise InvalidRequestError("the chat template took too many steps on this chat") from error
            raise InvalidRequestError(f"the chat template failed on this chat: {_reason(error)}") from error
        except BaseException as error:  # a panic inside of minijinja is no Exception
            raise InvalidRequestError(f"the chat template failed on this chat ({type(error).__name__})") from error
        finally:
            self._free.append(environment)


def _data(
    messages: Sequence[Message], tools: Sequence[Mapping[str, object]] | None, arguments: Mapping[str, object]
) -> FrozenDict:
    """What a request gives to the template, checked and read-only."""
    if unknown := sorted(arguments.keys() - ALLOWED_ARGUMENTS):
        known = ", ".join(sorted(ALLOWED_ARGUMENTS))
        raise InvalidRequestError(f"unknown chat template argument {unknown[0]!r}; known: {known}")
    data = {**arguments, "messages": check_messages(messages), "tools": check_tools(tools)}
    measure(data)
    return freeze(data, str)


def _encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, special_as_text=True) if text else []


def _plain_tag(match: re.Match[str]) -> str:
    """`{% generation %}` marks the assistant's part for training; here it is a block that is always taken."""
    return f"{{%{match[1]} {'endif' if match[2] else 'if true'} {match[3]}%}}"


def _reason(error: TemplateError) -> str:
    where = f" (line {error.line})" if error.line else ""
    return f"{error.detail or error.message.partition(chr(10))[0]}{where}"


def _raise_exception(message: object = "no reason given") -> NoReturn:
    raise InvalidRequestError(f"the chat template refuses this chat: {str(message)[:500]}")


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON the way transformers gives it to templates: not escaped for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise InvalidRequestError("the chat template asks tojson for an indent beyond 16")
    pair = None if separators is None else (separators[0], separators[1])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    if len(form) > 100 or not _PLAIN_TIME_FORM.fullmatch(form):
        raise InvalidRequestError("the chat template asks for the time in a form that is not supported")
    return datetime.datetime.now().strftime(form)
