"""What every answer is made of."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from gapless.outputs import Usage


class CachedTokens(msgspec.Struct):
    """cached_tokens: of the prompt, whose KV was found in the prefix cache."""

    cached_tokens: int


class UsageBody(msgspec.Struct):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens

    @classmethod
    def of(cls, usage: Usage) -> UsageBody:
        total = usage.prompt_tokens + usage.completion_tokens
        return cls(usage.prompt_tokens, usage.completion_tokens, total, CachedTokens(usage.cached_tokens))


class PromptLogprob(msgspec.Struct):
    """Of one token at one place of the prompt. decoded_token: its text."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobsBody = list[dict[str, PromptLogprob] | None] | None | UnsetType
"""By token id; None for the first token, which nothing comes before."""


class ModelCard(msgspec.Struct):
    """A model that can be asked."""

    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = "gapless"


class ModelList(msgspec.Struct):
    """All names that a request may give as `model`."""

    data: list[ModelCard]
    object: str = "list"


class Health(msgspec.Struct):
    """status: ok, stalled or dead; of /ready: ready, starting, draining. engine: its state."""

    status: str
    engine: str


class Version(msgspec.Struct):
    """Of the server."""

    version: str


class Tokens(msgspec.Struct):
    """A text as the model reads it. token_strs: what each of the tokens adds to a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class Text(msgspec.Struct):
    """The text of tokens."""

    prompt: str
