"""The forms in which a prompt may be given, and how each becomes token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

from gapless.errors import InvalidRequestError
from gapless.text.chat import ChatTemplate
from gapless.text.messages import Message
from gapless.text.tokenizer import Tokenizer


class TextPrompt(TypedDict):
    """Text as it is, without a chat template."""

    prompt: str


class TokensPrompt(TypedDict):
    """Token ids as they are."""

    prompt_token_ids: Sequence[int]


class ChatPrompt(TypedDict):
    """A conversation that the model's chat template turns into text."""

    messages: Sequence[Message]


Prompt = str | Sequence[int] | NDArray[np.integer[Any]] | TextPrompt | TokensPrompt | ChatPrompt
_KEYS = ("prompt", "prompt_token_ids", "messages")


def is_single(prompts: Prompt | Sequence[Prompt]) -> TypeGuard[Prompt]:
    """Whether this is one prompt and not several. An empty list is no prompts."""
    if isinstance(prompts, (str, Mapping)):
        return True
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1
    if not isinstance(prompts, Sequence):
        raise InvalidRequestError(f"a prompt is a text, token ids or a mapping, not {type(prompts).__name__}")
    return len(prompts) > 0 and all(isinstance(each, (int, np.integer)) for each in prompts)


class PromptEncoder:
    """Turns prompts into (text or None, token ids). Both parts may be missing: then only token ids are taken."""

    def __init__(self, tokenizer: Tokenizer | None, chat_template: ChatTemplate | None) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template

    def encode(self, prompt: Prompt) -> tuple[str | None, Sequence[int] | NDArray[Any]]:
        """Raises InvalidRequestError for a form that is not known, or one that this model can not take."""
        if isinstance(prompt, str):
            return prompt, self._tokens_of(prompt)
        if not isinstance(prompt, Mapping):
            return None, prompt
        given = cast("Mapping[str, Any]", prompt)
        if len(given) != 1 or next(iter(given)) not in _KEYS:
            raise InvalidRequestError(f"a prompt has exactly one of {', '.join(_KEYS)}, not {_names(given)}")
        ((key, value),) = given.items()
        if key == "messages":
            return self._chat(value)
        if key == "prompt_token_ids":
            return None, value
        if not isinstance(value, str):
            raise InvalidRequestError(f"prompt must be a string, not {type(value).__name__}")
        return value, self._tokens_of(value)

    def _tokens_of(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise InvalidRequestError("this model was loaded without a tokenizer: give prompt_token_ids")
        return self.tokenizer.encode(text)

    def _chat(self, messages: Any) -> tuple[str, list[int]]:
        if self.tokenizer is None or self.chat_template is None:
            raise InvalidRequestError("this model was loaded without a tokenizer: give prompt_token_ids")
        return self.chat_template.encode(self.tokenizer, messages)


def _names(given: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, given)) or "an empty object"
