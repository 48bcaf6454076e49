"""What a caller asks for: sampling parameters and requests, checked when they are made."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from gapless.errors import EmptyPromptError, InvalidRequestError

MAX_STOP_TOKEN_IDS = 64
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_SEED = 2**64
MAX_PRIORITY = 1000
PRIORITY_ARRIVALS = 1000
"""A request may overtake so many earlier ones for each step of priority; so no later one overtakes for ever."""


class StopTexts(Protocol):
    """A request's stop strings, as the tokenizer that reads them made them: see text/stops.py."""

    @property
    def candidates(self) -> NDArray[np.bool_]:
        """bool[V]: the tokens that can be the last of a stop string's."""
        ...

    def completes(self, token_ids: NDArray[np.int32]) -> int | None:
        """Which of them the text of these tokens has since its last one, or None. Looks at the end only."""
        ...


class FinishReason(Enum):
    """Why a request ended. The values are the field's words, as clients expect them."""

    STOP = "stop"  # an end-of-sequence or stop token was sampled, or a stop string completed
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
    stop            the request ends as soon as its text has one of these strings (1 to 16 of them, each of 1 to 256
                    characters; a single one may be given as it is). The text ends before it.
    include_stop_str_in_output  the text ends with it.
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
    stop: Sequence[str] = ()  # a string is one, too; a tuple of strings once it is checked
    include_stop_str_in_output: bool = False
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
        for name in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name} must be true or false, not {getattr(self, name)!r}")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
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
    stops       of params.stop, None if there are none.
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
    stops: StopTexts | None = None

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


def _stop_strings(value: object) -> tuple[str, ...]:
    strings: object = (value,) if isinstance(value, str) else value
    if strings is None:
        return ()
    if not isinstance(strings, Sequence):
        raise InvalidRequestError(f"stop must be a string or a list of strings, not {value!r}")
    found = tuple(cast("Sequence[object]", strings))
    if len(found) > MAX_STOPS:
        raise InvalidRequestError(f"at most {MAX_STOPS} stop strings, not {len(found)}")
    for each in found:
        if not isinstance(each, str) or not 0 < len(each) <= MAX_STOP_LENGTH:
            raise InvalidRequestError(f"a stop string has 1 to {MAX_STOP_LENGTH} characters, not {each!r:.300}")
    return cast("tuple[str, ...]", found)


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
