"""What became of a step: the tokens that are known now, and the requests that ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapless.plan import Ints
from gapless.request import FinishReason


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a request. `generated` counts the tokens that were emitted for it, `cached` those of its prompt whose
    KV was found in the prefix cache. `stop`: which of its stop strings ended it, None if none did. `error`: what is
    wrong with a request that ended by one."""

    request_id: int
    reason: FinishReason
    generated: int
    cached: int = 0
    stop: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LogprobLines:
    """Log probabilities of L tokens: K places each, the token first, then the likeliest. See sampling/logprobs.py."""

    ids_LK: Ints
    logprobs_LK: NDArray[np.float32]
    ranks_L: Ints

    def at(self, lines: slice | NDArray[Any]) -> LogprobLines:
        """Some of the lines."""
        return LogprobLines(self.ids_LK[lines], self.logprobs_LK[lines], self.ranks_L[lines])


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """What a step brought to the host: a token for each entry that samples, and log probabilities if it had some."""

    tokens: Ints
    logprobs: LogprobLines | None = None
    scores: LogprobLines | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PromptLogprobs:
    """Of the tokens of one prompt, from position `begin` on."""

    request_id: int
    begin: int
    lines: LogprobLines


@dataclass(frozen=True, slots=True, eq=False)
class Committed:
    """What became known in one step: token i belongs to request i. A request's end comes after its last token.

    logprobs  line i is of token i, None where no request of the step asked for them
    prompts   pieces of the prompts' log probabilities, in order for each request
    restarted requests whose tokens so far are void: they begin again
    """

    request_ids: NDArray[np.int64]
    tokens: Ints
    finished: tuple[Finished, ...] = ()
    logprobs: LogprobLines | None = None
    prompts: tuple[PromptLogprobs, ...] = ()
    restarted: tuple[int, ...] = ()

    @classmethod
    def without_tokens(cls, finished: tuple[Finished, ...]) -> Committed:
        """Ends alone."""
        return cls(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32), finished)
