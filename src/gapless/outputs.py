"""What a caller gets back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishWord = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request took: its prompt, and what was generated, a stop token included.

    cached_tokens  of the prompt, whose KV was found in the prefix cache; known at the end.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One continuation.

    text           without special tokens.
    token_ids      all generated ids, a stop token included.
    finish_reason  None while it goes on.
    stop_reason    the stop string or the id of stop_token_ids that ended it, else None.
    logprobs       always None for now.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishWord | None
    logprobs: None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The state of one request. `prompt` is its text, None where token ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    usage: Usage


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What is new of one request in a stream. `index` is the prompt's place among those given.

    The texts of a request add up to the text of its RequestOutput, as do the token ids. The last delta, and only it,
    has a finish_reason.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishWord | None
