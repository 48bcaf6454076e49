"""Who may enter: a request is checked against the vocabulary, the context limit and the whole KV cache."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapless.config import SchedulerLimits
from gapless.errors import InternalError, InvalidRequestError, PromptTooLongError, RequestTooLargeError
from gapless.prefix import chain_of
from gapless.request import Request, SamplingParams, StopTexts, prompt_array

_MASK_64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What admission needs to know of the model."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Admission:
    """Makes requests with unique, growing ids. Callable from any thread."""

    def __init__(self, limits: SchedulerLimits, model: ModelFacts, seed: int) -> None:
        self.limits = limits
        self.model = model
        self._seed = seed
        self._ids = count()
        self._lock = threading.Lock()

    def make_request(
        self,
        prompt_token_ids: Sequence[int] | NDArray[Any],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        stops: StopTexts | None = None,
    ) -> Request:
        """Check a request and give it an id. Nothing is queued. priority and cache_salt: see prompts.py.

        stops  what a tokenizer makes of params.stop, if there are any.

        Raises EmptyPromptError, PromptTooLongError, RequestTooLargeError or InvalidRequestError.
        """
        if bool(params.stop) != (stops is not None):
            raise InternalError("a request has stop strings, and nothing that finds them, or the other way round")
        prompt = prompt_array(prompt_token_ids, self.model.vocab_size)
        max_length = self._max_length(prompt.size, params.max_tokens)
        for token in params.stop_token_ids:
            if token >= self.model.vocab_size:
                raise InvalidRequestError(
                    f"stop token id {token} is outside the vocabulary (0 to {self.model.vocab_size - 1})"
                )
        stop = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self.model.eos_token_ids))
        with self._lock:
            request_id = next(self._ids)
        seed = params.seed if params.seed is not None else _mix(self._seed, request_id)
        salt = cache_salt.encode()
        return Request(
            request_id=request_id,
            prompt=prompt,
            params=params,
            max_length=max_length,
            stop_ids=np.asarray(sorted(stop), dtype=np.int32),
            seed=seed,
            priority=priority,
            salt=salt,
            digests=chain_of(prompt, self.limits.block_size, salt) if self.limits.prefix_cache else (),
            stops=stops,
        )

    def _max_length(self, prompt_size: int, max_tokens: int | None) -> int:
        limit = self.limits.max_model_len
        if prompt_size >= limit:
            raise PromptTooLongError(
                f"the prompt has {prompt_size} tokens; the context limit is {limit}, the answer included. "
                "Shorten the prompt, or raise the limit if the model and the KV cache allow it"
            )
        length = limit if max_tokens is None else min(limit, prompt_size + max_tokens)
        needed, usable = -(-(length - 1) // self.limits.block_size), self.limits.num_blocks - 1
        if needed > usable:
            raise RequestTooLargeError(
                f"the request may grow to {length} tokens and take {needed} KV blocks; the whole cache has {usable}. "
                "Ask for fewer tokens, shorten the prompt or give the KV cache more memory"
            )
        return length


def _mix(seed: int, request_id: int) -> int:
    """A 64-bit seed for a request that brought none (SplitMix64's finaliser over both numbers)."""
    z = (seed + (request_id + 1) * 0x9E3779B97F4A7C15) & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return z ^ (z >> 31)
