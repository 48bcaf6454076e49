"""Faults of the loop and of admission: the order of a step's phases, and what becomes of a caller's wishes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapless.engine.admission import Admission
from gapless.engine.loop import Loop
from gapless.engine.runner import Runner
from gapless.engine.slots import Slot, SlotRing
from gapless.outcome import Committed, Sampled
from gapless.params import SamplingParams
from gapless.plan import Plan
from gapless.request import Request
from gapless.scheduler import Scheduler
from support.sim.parts import RigScheduler


class _NewestFirst(deque[tuple[Plan, Slot]]):
    def popleft(self) -> tuple[Plan, Slot]:
        return self.pop()


class CollectsNewest(Loop):
    """Collects the newest step first."""

    def __init__(
        self,
        scheduler: Scheduler,
        slots: SlotRing,
        runner: Runner,
        publish: Callable[[Committed], None],
        lookahead: int,
    ) -> None:
        super().__init__(scheduler, slots, runner, publish, lookahead)
        self._in_flight = _NewestFirst()


class RunsTooFarAhead(Loop):
    """Starts one step more than there are slots."""

    def step(self) -> None:
        self.lookahead += 1
        try:
            super().step()
        finally:
            self.lookahead -= 1


class PublishesBeforeCommit(RigScheduler):
    """What came out of a step is published before it is known which of its rows have ended meanwhile."""

    def commit(self, plan: Plan, sampled: Sampled) -> Committed:
        request_ids = self.rows.request_id[plan.rows_E[plan.samples_E > 0]]
        committed = super().commit(plan, sampled)
        return replace(committed, request_ids=request_ids, tokens=sampled.tokens, logprobs=sampled.logprobs)


class PublishesEndsFirst(RigScheduler):
    """Tells the ends of a step before its tokens."""

    def commit(self, plan: Plan, sampled: Sampled) -> Committed:
        committed = super().commit(plan, sampled)
        self.rig.loop.publish(Committed.without_tokens(committed.finished))
        return replace(committed, finished=())


class OneTokenMore(Admission):
    """max_tokens is exceeded by one."""

    def _max_length(self, prompt_size: int, max_tokens: int | None) -> int:
        return min(self.limits.max_model_len, super()._max_length(prompt_size, max_tokens) + 1)


class OneTokenLess(Admission):
    """The context limit is missed by one."""

    def _max_length(self, prompt_size: int, max_tokens: int | None) -> int:
        length = super()._max_length(prompt_size, max_tokens)
        return max(prompt_size + 1, length - (length == self.limits.max_model_len))


class StopsShortOfContext(Admission):
    """A request without max_tokens gets one token less than the context has room for."""

    def _max_length(self, prompt_size: int, max_tokens: int | None) -> int:
        length = super()._max_length(prompt_size, max_tokens)
        return length if max_tokens is not None else max(prompt_size + 1, length - 1)


class AdmitsDifferently(Admission):
    """Makes another request than the one that was asked for."""

    def make_request(
        self, prompt_token_ids: Sequence[int] | NDArray[Any], params: SamplingParams, **options: Any
    ) -> Request:
        return self.change(super().make_request(prompt_token_ids, params, **options))

    def change(self, request: Request) -> Request:
        raise NotImplementedError


class OwnSeed(AdmitsDifferently):
    """The request's seed is made by the engine."""

    def change(self, request: Request) -> Request:
        return replace(request, seed=request.request_id)


class HalfSeed(AdmitsDifferently):
    """Half of the seed's bits are lost."""

    def change(self, request: Request) -> Request:
        return replace(request, seed=request.seed % 2**32)


class AlwaysStopsAtEos(AdmitsDifferently):
    """ignore_eos is not heeded."""

    def change(self, request: Request) -> Request:
        return replace(request, stop_ids=np.union1d(request.stop_ids, np.int32(0)).astype(np.int32))


class NeverStopsAtEos(AdmitsDifferently):
    """End-of-sequence is no stop token."""

    def change(self, request: Request) -> Request:
        own = np.asarray(request.params.stop_token_ids, dtype=np.int32)
        return replace(request, stop_ids=np.sort(own))


class LosesPrompt(AdmitsDifferently):
    """The first token of a prompt is lost."""

    def change(self, request: Request) -> Request:
        return replace(request, prompt=request.prompt[-max(1, request.prompt.size - 1) :])


class LosesOfFour(AdmitsDifferently):
    """A prompt of exactly four tokens loses the first."""

    def change(self, request: Request) -> Request:
        return replace(request, prompt=request.prompt[int(request.prompt.size == 4) :])
