"""Who may enter: a request is checked against the vocabulary, the context limit and the whole KV cache."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapless.config import SchedulerLimits
from gapless.errors import InternalError, InvalidRequestError, PromptTooLongError, RequestTooLargeError
from gapless.params import MAX_ID, SamplingParams
from gapless.prefix import chain_of
from gapless.request import NO_ARGUMENTS, NO_LINE, Form, Request, StopTexts, prompt_array
from gapless.sampling.records import RowFeatures

_MASK_64 = 2**64 - 1
_SHARED_BY_N = b"n\0"  # with the request's id, the salt of those that share blocks where nobody else does


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What admission needs to know of the model."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Admission:
    """Makes requests with unique, growing ids. Callable from any thread."""

    def __init__(self, limits: SchedulerLimits, model: ModelFacts, seed: int, processors: Sequence[str] = ()) -> None:
        """processors: the names of the engine's logits processors, in their order."""
        self.limits = limits
        self.processors = tuple(processors)
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
        bad_words: Sequence[Sequence[int]] = (),
        form: Form | None = None,
    ) -> Request:
        """Check a request and give it an id. Nothing is queued. priority and cache_salt: see prompts.py.

        stops      what a tokenizer makes of params.stop, if there are any.
        bad_words  the token sequences of params.bad_words.
        form       of the answer, if params ask for one.

        Raises EmptyPromptError, PromptTooLongError, RequestTooLargeError or InvalidRequestError.
        """
        if bool(params.stop) != (stops is not None) or params.has_form != (form is not None):
            raise InternalError("a request has stop strings or a form, and nothing that finds them, or the other way")
        prompt = prompt_array(prompt_token_ids, self.model.vocab_size)
        max_length = self._max_length(prompt.size, params.max_tokens)
        eos = () if params.ignore_eos else self.model.eos_token_ids
        stop_ids = sorted({*params.stop_token_ids, *eos})
        self._check_ids("stop_token_ids", params.stop_token_ids)
        arguments = self._arguments(params)
        line, counts = NO_LINE, False
        if not params.is_plain:
            features = self._features(prompt.size, params, stop_ids, bad_words)
            line, counts = features.line(self.model.vocab_size), features.counts
        with self._lock:
            request_id = next(self._ids)
        seed = params.seed if params.seed is not None else _mix(self._seed, request_id)
        salt = cache_salt.encode()
        shares = self.limits.prefix_cache
        if params.n > 1 and not shares:
            salt, shares = _SHARED_BY_N + request_id.to_bytes(8, "little"), True
        return Request(
            request_id=request_id,
            prompt=prompt,
            params=params,
            max_length=max_length,
            stop_ids=np.asarray(stop_ids, dtype=np.int32),
            seed=seed,
            priority=priority,
            salt=salt,
            digests=chain_of(prompt, self.limits.block_size, salt) if shares else (),
            stops=stops,
            line=line,
            counts=counts,
            form=form,
            arguments=arguments,
        )

    def _arguments(self, params: SamplingParams) -> NDArray[np.float32]:
        """For the engine's logits processors. Raises InvalidRequestError for one that it does not have."""
        names = self.processors
        for name in params.processor_args:
            if name not in names:
                known = f"there are {', '.join(names)}" if names else "this engine has none"
                raise InvalidRequestError(f"processor_args: there is no logits processor {name!r}; {known}")
        if not names:
            return NO_ARGUMENTS
        return np.asarray([params.processor_args.get(name, np.nan) for name in names], dtype=np.float32)

    def make_continuations(self, first: Request) -> list[Request]:
        """The n - 1 other continuations of its prompt, each with random numbers of its own. The first brings the
        prompt's log probabilities."""
        others: list[Request] = []
        params = replace(first.params, prompt_logprobs=None)
        for place in range(1, first.params.n):
            with self._lock:
                request_id = next(self._ids)
            seed = _mix(first.seed, place)
            others.append(replace(first, request_id=request_id, leader=first.request_id, seed=seed, params=params))
        return others

    def _features(
        self, prompt_size: int, params: SamplingParams, stop_ids: Sequence[int], bad_words: Sequence[Sequence[int]]
    ) -> RowFeatures:
        """What the request asks of its logits. Raises InvalidRequestError for unknown ids, or if nothing is left."""
        vocab = self.model.vocab_size
        self._check_ids("logit_bias", params.logit_bias)
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_ids("bad_words", [token for word in bad_words for token in word])
        early = [] if params.has_form else stop_ids  # a form may leave nothing but an end
        least = min(prompt_size + params.min_tokens, MAX_ID)
        bans = dict.fromkeys(early, least) if params.min_tokens else {}
        banned = {*bans, *(word[-1] for word in bad_words)}
        allowed = params.allowed_token_ids
        if banned.issuperset(allowed) if allowed is not None else len(banned) == vocab:
            raise InvalidRequestError(
                "bad_words and min_tokens may leave no token that could be sampled: allow more in allowed_token_ids"
            )
        return RowFeatures(
            prompt_len=prompt_size,
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            bias=params.logit_bias,
            bans=bans,
            bad_words=bad_words,
            allowed=params.allowed_token_ids,
            masked=params.has_form,
            processed=len(params.processor_args) > 0,
            num_logprobs=params.logprobs,
        )

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        """Raises InvalidRequestError for one that the model does not have."""
        vocab = self.model.vocab_size
        for token in ids:
            if token >= vocab:
                raise InvalidRequestError(f"{name}: token id {token} is outside the vocabulary (0 to {vocab - 1})")

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
