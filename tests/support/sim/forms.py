"""What a request of a schedule can bring: a form of its answer, sequences that end it, and a logits processor.

All of it is plain Python, and small enough to say at once what may come next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapless.logits_processor import ProcessedStep
from gapless.sampling.features import WORD_BITS, mask_words
from support.hash_model import VOCAB
from support.sim.findings import Broken

_PRIME = 2_147_483_629
_STEEPNESS = 5


@dataclass(frozen=True, slots=True)
class HashForm:
    """A form in which a hash of the whole answer so far says which tokens may come next, about a third of them.

    So a token that it was told twice, never or of another answer changes all that may follow.

    ends   after so many tokens only `stops` may follow; -1: never.
    fails  after so many tokens it can not be followed any more; -1: never.
    """

    key: int
    ends: int
    fails: int
    stops: tuple[int, ...]

    def start(self) -> HashMasks:
        return HashMasks(self)

    def allowed(self, tokens: Sequence[int]) -> set[int]:
        """What may come after these tokens of an answer."""
        if self.stops and 0 <= self.ends <= len(tokens):
            return set(self.stops)
        state = self.key
        for token in tokens:
            state = (state * 69_069 + token + 1) % _PRIME
        return {token for token in range(VOCAB) if (state ^ (token * 40_503)) * 2_654_435 % _PRIME % 3 == 0} | {
            state % VOCAB
        }


class HashMasks:
    """Of one answer. Refuses what it did not allow: nobody may have sampled it."""

    def __init__(self, form: HashForm) -> None:
        self.error: str | None = None
        self._form = form
        self._tokens: list[int] = []

    def accept(self, token_id: int) -> None:
        if self._tokens and self._tokens[-1] in self._form.stops:
            raise Broken("tokens", f"a form was told of token {token_id} after the end of its answer {self._tokens}")
        if token_id not in self._form.allowed(self._tokens):
            raise Broken("tokens", f"a form was told of token {token_id}, which may not come after {self._tokens}")
        self._tokens.append(token_id)

    def fill(self, mask_W: NDArray[np.int32]) -> None:
        if len(self._tokens) == self._form.fails:
            self.error = f"nothing may come after {self._form.fails} tokens"
        words = np.zeros(mask_words(VOCAB), dtype=np.uint32)
        for token in self._form.allowed(self._tokens):
            words[token // WORD_BITS] |= np.uint32(1 << token % WORD_BITS)
        mask_W[:] = words.view(np.int32)


@dataclass(frozen=True, slots=True)
class Endings:
    """Implements request.StopTexts with sequences of tokens in place of texts."""

    sequences: tuple[tuple[int, ...], ...]

    @property
    def candidates(self) -> NDArray[np.bool_]:
        found = np.zeros(VOCAB, dtype=np.bool_)
        found[[sequence[-1] for sequence in self.sequences]] = True
        return found

    def completes(self, token_ids: NDArray[np.int32]) -> int | None:
        tail = tuple(token_ids.tolist())
        return next((i for i, each in enumerate(self.sequences) if tail[-len(each) :] == each), None)


class Tilt:
    """A logits processor: adds the argument times 0 to 4, by token, position and last token."""

    name = "tilt"

    def __call__(self, logits_EV: Tensor, step: ProcessedStep) -> Tensor:
        tokens_V = torch.arange(logits_EV.shape[1])
        steps_EV = (tokens_V + step.positions_E[:, None] + step.last_tokens_E[:, None]) % _STEEPNESS
        return logits_EV + step.arguments_E[:, None] * steps_EV.float()

    @staticmethod
    def of(scores_V: NDArray[np.float32], argument: float, position: int, last: int) -> NDArray[np.float32]:
        """The same for one answer, as the rig computes it."""
        steps_V = np.asarray([(token + position + last) % _STEEPNESS for token in range(VOCAB)], dtype=np.float32)
        return np.add(scores_V, np.float32(argument) * steps_V, dtype=np.float32)
