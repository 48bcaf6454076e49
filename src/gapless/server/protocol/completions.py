"""/v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, cast

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import AfterValidator, Field, WithJsonSchema

from gapless.errors import InvalidRequestError
from gapless.params import MAX_ID, MAX_LOGPROBS, SamplingParams
from gapless.server.protocol.answers import PromptLogprobsBody, UsageBody
from gapless.server.protocol.sampling import SamplingFields, make_params

MAX_PROMPTS = 256
DEFAULT_MAX_TOKENS = 16


def check_prompts(value: object) -> object:
    """A text, token ids, or a list of one kind of them. Looked at by hand: pydantic would collect an error for each
    of a million elements."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("a text, a list of token ids, or a list of texts or of lists of token ids is needed")
    several = cast("list[object]", value)
    if not several:
        raise ValueError("the list is empty")
    kinds = {type(each) for each in several}
    if kinds == {int}:
        return several
    if kinds not in ({str}, {list}):
        raise ValueError("a list has texts, or token ids, or lists of token ids, and only one kind of them")
    if len(several) > MAX_PROMPTS:
        raise ValueError(f"there are {len(several)} prompts, the limit is {MAX_PROMPTS}")
    return several


Prompts = Annotated[
    Any,
    AfterValidator(check_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": MAX_PROMPTS},
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                    "minItems": 1,
                    "maxItems": MAX_PROMPTS,
                },
            ]
        }
    ),
]


class CompletionRequest(SamplingFields):
    """Texts, or token ids, to go on with."""

    model: str | None = None
    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, le=MAX_ID)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """One or more."""
        given = self.prompt
        if isinstance(given, str) or type(given[0]) is int:
            return [given]
        return given

    @property
    def scores_only(self) -> bool:
        """No tokens are asked for. One is made, since the engine makes no fewer, and left out."""
        return self.max_tokens == 0

    def params(self) -> SamplingParams:
        """Raises InvalidRequestError."""
        if self.suffix:
            raise InvalidRequestError("suffix is not supported")
        arguments = self.sampling_arguments()
        if self.echo:
            arguments["echo"] = True
            if self.logprobs is not None:
                arguments["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        limit = DEFAULT_MAX_TOKENS if self.max_tokens is None else max(self.max_tokens, 1)
        return make_params({**arguments, "max_tokens": limit, "logprobs": self.logprobs})


# ----------------------------------------------------------------- answers


class CompletionLogprobs(msgspec.Struct):
    """By token: its text, its log probability, those of the likeliest ones, and where in the text it begins."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """One continuation. Its index is n times the prompt's place and its own among n; in chunks text is what is new."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobsBody = UNSET


class Completion(msgspec.Struct):
    """The answer."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody
    object: str = "text_completion"
