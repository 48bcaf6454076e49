"""What became of a step: the tokens that are known now, and the requests that ended."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gapless.plan import Ints
from gapless.request import FinishReason


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a request. `generated` counts the tokens that were emitted for it, `cached` those of its prompt whose
    KV was found in the prefix cache. `stop`: which of its stop strings ended it, None if none did."""

    request_id: int
    reason: FinishReason
    generated: int
    cached: int = 0
    stop: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Committed:
    """What became known in one step: token i belongs to request i. A request's end comes after its last token."""

    request_ids: NDArray[np.int64]
    tokens: Ints
    finished: tuple[Finished, ...] = field(default=())

    @classmethod
    def without_tokens(cls, finished: tuple[Finished, ...]) -> Committed:
        """Ends alone."""
        return cls(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32), finished)
