"""What a caller asks for, as the scheduler takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gapless.errors import EmptyPromptError, InvalidRequestError
from gapless.params import SamplingParams

MAX_PRIORITY = 1000
PRIORITY_ARRIVALS = 1000
"""A request may overtake so many earlier ones for each step of priority; so no later one overtakes for ever."""
NO_LINE: Final = np.zeros(0, dtype=np.int32)
NO_ARGUMENTS: Final = np.zeros(0, dtype=np.float32)


class StopTexts(Protocol):
    """A request's stop strings, as the tokenizer that reads them made them: see text/stops.py."""

    @property
    def candidates(self) -> NDArray[np.bool_]:
        """bool[V]: the tokens that can be the last of a stop string's."""
        ...

    def completes(self, token_ids: NDArray[np.int32]) -> int | None:
        """Which of them the text of these tokens has since its last one, or None. Looks at the end only."""
        ...


class TokenMasks(Protocol):
    """Which tokens may come next in one sequence, as a grammar or a function of the caller says: see masks.py."""

    @property
    def error(self) -> str | None:
        """Why it can not go on. Set in a fill, by what the caller wrote or by a limit."""
        ...

    def accept(self, token_id: int) -> None:
        """The sequence has this token."""
        ...

    def fill(self, mask_W: NDArray[np.int32]) -> None:
        """Set bit t % 32 of word t // 32 for each token t that may come next, and no other."""
        ...


@runtime_checkable
class ManyMasks(Protocol):
    """TokenMasks that take many sequences at a time."""

    @staticmethod
    def fill_many(accepts: Sequence[tuple[Any, int]], fills: Sequence[tuple[Any, int]], mask_MW: Any) -> None:
        """accept() for each of the first, in their order, then fill() with its line of mask_MW for each of these."""
        ...


class Form(Protocol):
    """A form that answers must have: of a request, shared by its sequences."""

    def start(self) -> TokenMasks:
        """For a sequence that has no token of its answer yet."""
        ...


class FinishReason(Enum):
    """Why a request ended. The values are the field's words, as clients expect them."""

    STOP = "stop"  # an end-of-sequence or stop token was sampled, or a stop string completed
    LENGTH = "length"  # max_tokens or the context limit was reached
    CANCELLED = "cancelled"
    ERROR = "error"  # of this request alone: its form could not be followed any more


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
    leader      the request whose prompt this one shares and waits for, as one of n; -1 for none.
    line        what it asks of its logits, as the device's tables take it (sampling/records.py); empty for a plain one.
    counts      whether the device counts its tokens: of every token that it has or skips, for `line`'s sake.
    form        the form of its answer, None for any.
    arguments   float32, for each of the engine's logits processors; NaN where the request does not use it.
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
    leader: int = -1
    line: NDArray[np.int32] = field(default_factory=lambda: NO_LINE)
    counts: bool = False
    form: Form | None = None
    arguments: NDArray[np.float32] = field(default_factory=lambda: NO_ARGUMENTS)

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
