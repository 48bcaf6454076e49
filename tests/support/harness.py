"""Steps a real loop by hand, so that a test can act between any two steps and check the books after each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch

from gapless.config import EngineConfig
from gapless.device.base import Device
from gapless.device.cpu import CpuDevice
from gapless.engine.admission import Admission, ModelFacts
from gapless.engine.build import build_loop
from gapless.models.base import Model
from gapless.outcome import Committed, Finished
from gapless.params import SamplingParams
from gapless.request import FinishReason, Request
from gapless.rows import RowState
from gapless.sampling import make_sampler
from support.hash_model import HashModel


class Harness:
    """A loop, on the cpu device unless another is given, with everything it published, per request."""

    def __init__(self, config: EngineConfig, model: Model | None = None, device: Device | None = None) -> None:
        device = device or CpuDevice()
        self.model = model or HashModel(device=device.torch_device)
        sampler = make_sampler(device.torch_device)
        self.loop, limits = build_loop(self.model, config, device, sampler, torch.float32)
        self.loop.publish = self._publish
        self.scheduler = self.loop.scheduler
        self.admission = Admission(limits, ModelFacts(self.model.vocab_size, self.model.eos_token_ids), config.seed)
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.finished: dict[int, Finished] = {}
        self.ranks: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.close()

    def add(self, prompt: Sequence[int], params: SamplingParams, *, priority: int = 0, salt: str = "") -> Request:
        request = self.admission.make_request(prompt, params, priority=priority, cache_salt=salt)
        self.scheduler.add(request)
        self.ranks[request.request_id] = request.rank
        return request

    def cancel(self, request_id: int) -> None:
        self.scheduler.cancel(request_id)
        self._book_ends(self.scheduler.take_finished())

    def step(self) -> None:
        """One turn of the loop, which admits in order of rank and never preempts the first in it."""
        table, rowless, rank = self.scheduler.rows, self.scheduler.requests_without_row(), self.ranks.__getitem__
        oldest = int(np.where(table.state == RowState.RUNNING, table.rank, 2**62).argmin())
        was_running, failed = table.state[oldest] == RowState.RUNNING, self.scheduler.stats.failed_steps
        self.loop.step()
        self.loop.check_integrity()
        assert not (was_running and table.state[oldest] == RowState.PREEMPTED), "the oldest was preempted"
        left = self.scheduler.requests_without_row()
        admitted = rowless - left - set(self.finished)
        left |= set(table.request_id[table.state == RowState.PREEMPTED].tolist())
        if self.scheduler.stats.failed_steps == failed:  # or requests lost their rows after others were admitted
            in_turn = not admitted or not left or max(map(rank, admitted)) < min(map(rank, left))
            assert in_turn, "admitted out of turn"

    def run(self, max_steps: int = 10_000) -> None:
        """Step until nothing is left; every count must be back where it began."""
        steps = 0
        while self.loop.has_work:
            self.step()
            steps += 1
            assert steps < max_steps, "the engine makes no progress"
        self.loop.check_integrity()
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_usable
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0

    def reason(self, request: Request) -> FinishReason:
        return self.finished[request.request_id].reason

    def _publish(self, committed: Committed) -> None:
        for request_id, token in zip(committed.request_ids.tolist(), committed.tokens.tolist(), strict=True):
            assert request_id not in self.finished, "a token after the end"
            self.tokens[request_id].append(token)
        self._book_ends(committed.finished)

    def _book_ends(self, finished: Sequence[Finished]) -> None:
        for end in finished:
            assert end.request_id not in self.finished, "ended twice"
            assert end.generated == len(self.tokens[end.request_id])
            self.finished[end.request_id] = end
