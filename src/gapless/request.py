"""What a caller asks for: sampling parameters and requests, checked when they are made."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapless.errors import EmptyPromptError, InvalidRequestError

MAX_STOP_TOKEN_IDS = 64
MAX_SEED = 2**64
MAX_PRIORITY = 1000
PRIORITY_ARRIVALS = 1000
"""A request may overtake so many earlier ones for each step of priority; so no later one overtakes for ever."""


class FinishReason(Enum):
    """Why a request ended. The values are the field's words, as clients expect them."""

    STOP = "stop"  # an end-of-sequence or stop token was sampled
    LENGTH = "length"  # max_tokens or the context limit was reached
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    temperature     0 is greedy; otherwise logits are divided by it.
    top_k           keep the k most likely tokens; 0 keeps all.
    top_p           keep the smallest set of most likely tokens whose probability reaches top_p (0 < top_p <= 1).
    min_p           drop tokens less likely than min_p times the likeliest one (0 <= min_p <= 1).
    seed            fixes the random numbers of this request: they depend on (seed, position) and nothing else.
                    None: derived from the engine's seed and the order of arrival.
    max_tokens      the most new tokens; None: up to the context limit.
    stop_token_ids  these token ids end the request as end-of-sequence does, even under ignore_eos.
    ignore_eos      do not stop at the model's end-of-sequence tokens.

    Filters apply in the order temperature, top_k, top_p, min_p. Tokens that tie with the last one kept are kept.
    Raises InvalidRequestError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 256
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_integer("top_k", self.top_k, 0, 2**31 - 1)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, MAX_SEED - 1)
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequestError(f"ignore_eos must be true or false, not {self.ignore_eos!r}")
        if isinstance(self.stop_token_ids, str) or not isinstance(self.stop_token_ids, Sequence):
            raise InvalidRequestError(f"stop_token_ids must be a list of token ids, not {self.stop_token_ids!r}")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(f"at most {MAX_STOP_TOKEN_IDS} stop_token_ids, not {len(self.stop_token_ids)}")
        for token in self.stop_token_ids:
            _check_integer("stop_token_ids", token, 0, 2**31 - 1)
        # numpy's numbers are welcome, but not their arithmetic
        for name in ("temperature", "top_p", "min_p"):
            object.__setattr__(self, name, float(getattr(self, name)))
        for name in ("top_k", "seed", "max_tokens"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else int(value))
        object.__setattr__(self, "stop_token_ids", tuple(int(token) for token in self.stop_token_ids))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One request as the scheduler takes it.

    request_id  unique over the life of the engine; also the order of arrival.
    prompt      int32[P], P >= 1, not to be written to afterwards.
    max_length  the most tokens, prompt included, that this request may reach; P < max_length.
    stop_ids    int32[S], all token ids that end it.
    seed        the resolved 64-bit seed.
    priority    the lower, the earlier it is served.
    salt        only requests with the same one share KV blocks.
    digests     of the prompt's full KV blocks, see prefix.py; none without a prefix cache.
    """

    request_id: int
    prompt: NDArray[np.int32]
    params: SamplingParams
    max_length: int
    stop_ids: NDArray[np.int32]
    seed: int
    priority: int = 0
    salt: bytes = b""
    digests: tuple[bytes, ...] = ()

    @property
    def rank(self) -> int:
        """The order of service: no two requests have the same, the lowest comes first.

        A step of priority counts as PRIORITY_ARRIVALS arrivals, so whoever waits gains on all that come later.
        """
        arrival = self.request_id + self.priority * PRIORITY_ARRIVALS
        return arrival * (2 * MAX_PRIORITY + 1) + self.priority + MAX_PRIORITY


def prompt_array(token_ids: Sequence[int] | NDArray[Any], vocab_size: int) -> NDArray[np.int32]:
    """Token ids as int32[P]. Raises EmptyPromptError or InvalidRequestError."""
    try:
        wide = np.asarray(token_ids)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequestError(f"a prompt must be a flat list of token ids: {error}") from None
    if wide.size == 0:
        raise EmptyPromptError("the prompt is empty; it needs at least one token")
    if wide.ndim != 1 or wide.dtype.kind not in "iu":
        raise InvalidRequestError("a prompt must be a flat list of integer token ids")
    low, high = int(wide.min()), int(wide.max())
    if low < 0 or high >= vocab_size:
        raise InvalidRequestError(
            f"token id {low if low < 0 else high} is outside the vocabulary (0 to {vocab_size - 1})"
        )
    return np.array(wide, dtype=np.int32)


def _check_number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise InvalidRequestError(f"{name} must be a finite number, not {value!r}")
    number = float(value)
    if number < low or number > high or (open_low and number == low):
        bracket = "above" if open_low else "at least"
        raise InvalidRequestError(f"{name} must be {bracket} {low:g} and at most {high:g}, not {value!r}")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InvalidRequestError(f"{name} must be an integer, not {value!r}")
    if value < low or value > high:
        raise InvalidRequestError(f"{name} must be between {low} and {high}, not {value}")
