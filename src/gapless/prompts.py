"""The forms in which a prompt may be given, and how each becomes token ids."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

from gapless.errors import InvalidRequestError
from gapless.params import MAX_BAD_WORD_TOKENS, SamplingParams
from gapless.request import MAX_PRIORITY, StopTexts
from gapless.sampling.features import MAX_BAD_WORDS, MAX_BANS
from gapless.text.chat import ChatTemplate
from gapless.text.messages import Message
from gapless.text.tokenizer import Tokenizer


class PromptOptions(TypedDict, total=False):
    """What may stand beside a prompt.

    priority    -1000 to 1000, 0 by default: the lower, the earlier a waiting request is served. A step counts as
                1,000 arrivals, so a request is overtaken by a bounded number of later ones.
    cache_salt  only requests with the same text here share KV blocks: one for each tenant keeps tenants apart.
    """

    priority: int
    cache_salt: str


class TextPrompt(PromptOptions):
    """Text as it is, without a chat template."""

    prompt: str


class TokensPrompt(PromptOptions):
    """Token ids as they are."""

    prompt_token_ids: Sequence[int]


class ChatPrompt(PromptOptions):
    """A conversation that the model's chat template turns into text."""

    messages: Sequence[Message]


Prompt = str | Sequence[int] | NDArray[np.integer[Any]] | TextPrompt | TokensPrompt | ChatPrompt
_KEYS = ("prompt", "prompt_token_ids", "messages")
_OPTIONS = ("priority", "cache_salt")
MAX_SALT_LENGTH = 256


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as token ids. `text` is what they come from, None where token ids were given."""

    text: str | None
    token_ids: Sequence[int] | NDArray[Any]
    priority: int = 0
    cache_salt: str = ""


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
    """Turns prompts into token ids. Both parts may be missing: then only token ids are taken."""

    def __init__(self, tokenizer: Tokenizer | None, chat_template: ChatTemplate | None) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template

    def encode(self, prompt: Prompt) -> Encoded:
        """Raises InvalidRequestError for a form that is not known, or one that this model can not take."""
        if isinstance(prompt, str):
            return Encoded(prompt, self._tokens_of(prompt))
        if not isinstance(prompt, Mapping):
            return Encoded(None, prompt)
        given = cast("Mapping[str, Any]", prompt)
        keys = [key for key in given if key not in _OPTIONS]
        if len(keys) != 1 or keys[0] not in _KEYS:
            raise InvalidRequestError(
                f"a prompt has exactly one of {', '.join(_KEYS)}, beside {' and '.join(_OPTIONS)}, not {_names(given)}"
            )
        text, token_ids = self._encode(keys[0], given[keys[0]])
        return Encoded(text, token_ids, _priority(given.get("priority", 0)), _salt(given.get("cache_salt", "")))

    def _encode(self, key: str, value: Any) -> tuple[str | None, Sequence[int] | NDArray[Any]]:
        if key == "messages":
            return self._chat(value)
        if key == "prompt_token_ids":
            return None, value
        if not isinstance(value, str):
            raise InvalidRequestError(f"prompt must be a string, not {type(value).__name__}")
        return value, self._tokens_of(value)

    def stops(self, params: SamplingParams) -> StopTexts | None:
        """What finds params.stop. Raises InvalidRequestError if this model has no tokenizer, or for what is no text."""
        if not params.stop:
            return None
        if self.tokenizer is None:
            raise InvalidRequestError("this model was loaded without a tokenizer: there is no text to find `stop` in")
        return self.tokenizer.stop_strings(tuple(params.stop))

    def echo(self, encoded: Encoded, params: SamplingParams) -> str:
        """What the text of the answer begins with. Raises InvalidRequestError if this model has no tokenizer."""
        if not params.echo:
            return ""
        if self.tokenizer is None:
            raise InvalidRequestError("this model was loaded without a tokenizer: there is no text to echo")
        return self.tokenizer.decode(list(encoded.token_ids)) if encoded.text is None else encoded.text

    def bad_words(self, params: SamplingParams, ends: Collection[int]) -> list[tuple[int, ...]]:
        """The token sequences of params.bad_words: a text as it is tokenised at the beginning and after a space.

        ends  token ids that take up room beside those of one token.

        Raises InvalidRequestError if they are too many or too long, or this model has no tokenizer.
        """
        found: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            if not isinstance(word, str):
                found[tuple(word)] = None
                continue
            for text in (word, f" {word}"):
                ids = tuple(self._tokens_of(text, add_special_tokens=False))
                if not 0 < len(ids) <= MAX_BAD_WORD_TOKENS:
                    raise InvalidRequestError(
                        f"a bad word has 1 to {MAX_BAD_WORD_TOKENS} tokens; {text!r:.99} has {len(ids)}"
                    )
                found[ids] = None
        single = {*ends, *(ids[0] for ids in found if len(ids) == 1)}
        several = sum(len(ids) > 1 for ids in found)
        if several > MAX_BAD_WORDS or len(single) > MAX_BANS:
            raise InvalidRequestError(
                f"bad_words may come to {MAX_BAD_WORDS} sequences of several tokens and {MAX_BANS} single tokens, "
                f"counting those that min_tokens holds back; here they are {several} and {len(single)}"
            )
        return list(found)

    def _tokens_of(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if self.tokenizer is None:
            raise InvalidRequestError("this model was loaded without a tokenizer: give prompt_token_ids")
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _chat(self, messages: Any) -> tuple[str, list[int]]:
        if self.tokenizer is None or self.chat_template is None:
            raise InvalidRequestError("this model was loaded without a tokenizer: give prompt_token_ids")
        return self.chat_template.encode(self.tokenizer, messages)


def _priority(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -MAX_PRIORITY <= value <= MAX_PRIORITY:
        raise InvalidRequestError(f"priority must be an integer from {-MAX_PRIORITY} to {MAX_PRIORITY}, not {value!r}")
    return value


def _salt(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_SALT_LENGTH:
        raise InvalidRequestError(
            f"cache_salt must be a text of at most {MAX_SALT_LENGTH} characters, not {value!r:.99}"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError("cache_salt has half of a surrogate pair and is not valid Unicode") from None
    return value


def _names(given: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, given)) or "an empty object"
