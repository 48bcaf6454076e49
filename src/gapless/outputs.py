"""What a caller gets back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishWord = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model found a token, before penalties, bias, masks, temperature and filters.

    logprob  natural logarithm; -inf where the model excludes it.
    rank     1 plus the number of likelier tokens.
    top      the likeliest tokens, as many as were asked for, each with its logprob; the first is the likeliest. The
             token itself is among them only if it is one of these.

    The text of any of the ids: Tokenizer.token_bytes().
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request took: its prompt, and what was generated in all continuations, stop tokens included.

    cached_tokens  of the prompt, whose KV was found in the prefix cache; known at the end.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One continuation.

    index          0 to n - 1.
    text           without special tokens; with echo it begins with the prompt's text.
    token_ids      all generated ids, a stop token included.
    finish_reason  None while it goes on.
    logprobs       one for each of token_ids; None unless asked for.
    stop_reason    the stop string or the id of stop_token_ids that ended it, else None.
    error          what is wrong, if finish_reason is "error": the form of the answer could not be followed any more.
    restarted      of a delta: what came before it is void, as a weight update began the answer again.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishWord | None
    logprobs: list[TokenLogprob] | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    restarted: bool = False


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The state of one request. `prompt` is its text, None where token ids were given.

    outputs          its n continuations; of a delta those that have something new.
    finished         when all of them are.
    prompt_logprobs  one for each token of the prompt, None for the first, which nothing comes before. None unless
                     asked for; in deltas in the first alone.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    usage: Usage
    prompt_logprobs: list[TokenLogprob | None] | None = None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What is new of one continuation in a stream. `index` is the prompt's place among those given.

    continuation  0 to n - 1.
    logprobs      of token_ids; None unless asked for.
    error         what is wrong, if finish_reason is "error".
    restarted     what came before it is void, as a weight update began the answer again.
    prompt_logprobs  those of RequestOutput, in a prompt's first delta alone; again in the first after a restart.

    The texts of a continuation add up to the text of its CompletionOutput, as do the token ids and logprobs. The last
    delta, and only it, has a finish_reason.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishWord | None
    continuation: int = 0
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None
    restarted: bool = False
    prompt_logprobs: list[TokenLogprob | None] | None = None
