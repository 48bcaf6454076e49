"""Pause, and work between steps: what runs stands still, and goes on, ends first, is recomputed or begins again."""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.test_mixed_features import Wandering
from gapless.attention.base import AttentionBatch, LayerKV
from gapless.config import EngineConfig
from gapless.device.cpu import CpuDevice
from gapless.engine.admission import Admission, ModelFacts
from gapless.engine.build import build_engine, build_loop
from gapless.engine.core import Engine, EngineFailure, InFlight
from gapless.engine.loop import Loop
from gapless.errors import ConfigError, EngineDeadError
from gapless.outcome import Committed
from gapless.params import SamplingParams
from gapless.request import FinishReason, Request
from gapless.sampling import make_sampler
from support.hash_model import HashModel, prefix_hash, scores
from support.scarce import ScarceModel

LENGTH = 100
CONFIG = EngineConfig(lookahead=1, max_rows=3, max_batch_tokens=24, block_size=4, num_blocks=96, max_model_len=128)


class ChangingModel(HashModel):
    """A hash of all tokens, each moved by `shift`, which an update changes: KV from before is wrong after it."""

    shift = 0

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        time.sleep(0.001)
        return super().forward(tokens_T + self.shift, kv, batch)


def expected(prompt: Sequence[int], count: int, shift: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        hashed = prefix_hash([token + shift for token in tokens])
        tokens.append(int(scores(torch.tensor([hashed]))[0].argmax()))
    return tokens[len(prompt) :]


class Run:
    """An engine, the requests that were given to it, and what came out."""

    def __init__(self) -> None:
        device = CpuDevice(captures_graphs=True)
        self.model = ChangingModel()
        self.engine: Engine = build_engine(self.model, CONFIG, device, make_sampler(device.torch_device), torch.float32)
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.reasons: dict[int, FinishReason] = {}
        self.restarted: list[int] = []
        self.requests: list[Request] = []

    def submit(self, count: int, new_tokens: int = LENGTH) -> list[Request]:
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        first = len(self.requests)
        made = [self.engine.admission.make_request([n % 7] * (n % 5 + 3), params) for n in range(first, first + count)]
        self.requests += made
        self.engine.submit(made)
        return made

    def read(self, *, wait: bool = True) -> bool:
        record = self.engine.next_output(wait=wait)
        if record is None:
            return False
        if isinstance(record, EngineFailure):
            raise record.error
        for request_id in record.restarted:
            self.tokens[request_id].clear()
        self.restarted += record.restarted
        for request_id, token in zip(record.request_ids.tolist(), record.tokens.tolist(), strict=True):
            self.tokens[request_id].append(token)
        self.reasons.update({end.request_id: end.reason for end in record.finished})
        return True

    def read_until_begun(self, tokens: int = 3) -> None:
        while sum(map(len, self.tokens.values())) < tokens:
            self.read()

    def read_all(self) -> None:
        while len(self.reasons) < len(self.requests):
            self.read()

    def read_what_is_there(self) -> int:
        while self.read(wait=False):
            pass
        return sum(map(len, self.tokens.values()))

    def change(self, shift: int, in_flight: InFlight) -> None:
        def work(_: Loop) -> None:
            self.model.shift = shift

        self.engine.between_steps(work, in_flight=in_flight)


@pytest.fixture
def run() -> Iterator[Run]:
    run = Run()
    yield run
    run.engine.close()


def test_a_pause_lets_nothing_run_and_changes_no_token(run: Run):
    run.submit(5)
    run.read_until_begun()
    run.engine.pause()
    assert run.engine.paused
    there = run.read_what_is_there()
    assert 0 < there < 5 * LENGTH
    late = run.submit(1)
    time.sleep(0.1)
    assert run.read_what_is_there() == there
    assert run.engine.stats().seconds_since_progress == 0.0  # nobody takes it for a stall
    run.engine.resume()
    run.read_all()
    for request in [*run.requests, *late]:
        assert run.tokens[request.request_id] == expected(request.prompt.tolist(), LENGTH, 0)


def test_a_request_can_be_cancelled_during_a_pause(run: Run):
    first, second = run.submit(2)
    run.read_until_begun()
    run.engine.pause()
    run.engine.cancel([first.request_id])
    while first.request_id not in run.reasons:
        run.read()
    assert run.reasons[first.request_id] is FinishReason.CANCELLED
    run.engine.resume()
    run.read_all()
    assert run.tokens[second.request_id] == expected(second.prompt.tolist(), LENGTH, 0)


def test_an_engine_may_be_paused_before_it_has_work_and_closed_during_a_pause(run: Run):
    run.engine.pause()
    run.engine.pause()
    run.submit(1)
    time.sleep(0.05)
    assert run.read_what_is_there() == 0
    run.engine.close()
    with pytest.raises(EngineDeadError):
        run.engine.resume()


def test_what_has_begun_ends_with_the_old_model_and_the_rest_begins_with_the_new_one(run: Run):
    run.submit(6)  # three rows
    run.read_until_begun()
    run.change(5, "finish")
    run.read_what_is_there()
    ended = set(run.reasons)
    assert len(ended) >= 3
    run.read_all()
    olds = 0
    for request in run.requests:
        answer, prompt = run.tokens[request.request_id], request.prompt.tolist()
        old = answer == expected(prompt, LENGTH, 0)
        assert old == (request.request_id in ended)
        assert old or answer == expected(prompt, LENGTH, 5)
        olds += old
    assert 3 <= olds < 6
    assert not run.restarted


def test_what_has_begun_goes_on_with_the_new_model_after_the_tokens_it_has(run: Run):
    run.submit(4)
    run.read_until_begun(30)
    run.change(5, "continue")
    run.read_all()
    kept = 0
    for request in run.requests:
        answer, prompt = run.tokens[request.request_id], request.prompt.tolist()
        old = expected(prompt, LENGTH, 0)
        same = next((n for n, pair in enumerate(zip(answer, old, strict=True)) if pair[0] != pair[1]), LENGTH)
        kept += same
        assert any(
            answer == old[:cut] + expected(prompt + old[:cut], LENGTH - cut, 5)
            for cut in range(max(0, same - 3), same + 1)
        )
    assert kept >= 20
    assert not run.restarted


def test_what_has_begun_begins_again_with_the_new_model(run: Run):
    run.submit(4)
    run.read_until_begun()
    run.change(5, "restart")
    run.read_all()
    assert len(run.restarted) >= 1
    for request in run.requests:
        assert run.tokens[request.request_id] == expected(request.prompt.tolist(), LENGTH, 5)


def test_no_kv_of_the_old_model_is_shared_with_later_requests(run: Run):
    [first] = run.submit(1)
    run.read_all()
    run.change(5, "finish")
    again = run.engine.admission.make_request(first.prompt, first.params)
    run.requests.append(again)
    run.engine.submit([again])
    run.read_all()
    assert run.tokens[again.request_id] == expected(first.prompt.tolist(), LENGTH, 5)


def test_an_error_of_the_callers_leaves_the_engine_as_it_was(run: Run):
    def wrong(_: Loop) -> None:
        raise ConfigError("no such weight")

    [request] = run.submit(1)
    run.read_until_begun()
    with pytest.raises(ConfigError, match="no such weight"):
        run.engine.between_steps(wrong)
    run.read_all()
    assert run.tokens[request.request_id] == expected(request.prompt.tolist(), LENGTH, 0)


def test_any_other_error_ends_the_engine_and_whoever_waits(run: Run):
    def broken(_: Loop) -> None:
        time.sleep(0.1)
        raise ZeroDivisionError

    errors: list[BaseException] = []

    def second() -> None:
        try:
            run.engine.pause()
        except EngineDeadError as error:
            errors.append(error)

    waits = threading.Thread(target=lambda: (time.sleep(0.03), second()))
    waits.start()
    with pytest.raises(ZeroDivisionError):
        run.engine.between_steps(broken)
    waits.join(10)
    assert len(errors) == 1
    with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
        run.engine.pause()


def form_params(**given: Any) -> SamplingParams:
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 60, "ignore_eos": True, "allowed_tokens": len, **given}
    return SamplingParams(**asked)


@pytest.mark.parametrize("in_flight", ["continue", "restart"])
def test_forms_keep_up_with_what_was_sampled(run: Run, in_flight: InFlight):
    def make() -> Request:
        return run.engine.admission.make_request([3, 1, 4], form_params(), form=Wandering())

    undisturbed = make()
    run.requests.append(undisturbed)
    run.engine.submit([undisturbed])
    run.read_all()
    again = make()
    run.requests.append(again)
    run.engine.submit([again])
    for count in (5, 9, 23):
        while len(run.tokens[again.request_id]) < count:
            run.read()
        run.change(0, in_flight)
    run.read_all()
    assert run.tokens[again.request_id] == run.tokens[undisturbed.request_id]


def test_several_updates_that_let_requests_end_lose_none(run: Run):
    run.submit(8)
    run.read_until_begun()
    changes = [threading.Thread(target=run.change, args=(shift, "finish")) for shift in (5, 5, 5)]
    for change in changes:
        change.start()
    run.read_all()
    for change in changes:
        change.join(10)
    for request in run.requests:
        prompt = request.prompt.tolist()
        assert run.tokens[request.request_id] in (expected(prompt, LENGTH, 0), expected(prompt, LENGTH, 5))


def test_the_answers_of_one_prompt_are_of_one_model(run: Run):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, n=5)
    first = run.engine.admission.make_request([3, 1, 4, 1, 5, 9], params)
    run.requests += [first, *run.engine.admission.make_continuations(first)]
    run.engine.submit(run.requests)
    run.read_until_begun(1)
    run.change(5, "finish")
    run.read_all()
    assert [run.tokens[each.request_id] for each in run.requests] == [expected([3, 1, 4, 1, 5, 9], 40, 0)] * 5


def test_an_update_leaves_a_paused_engine_paused(run: Run):
    [request] = run.submit(1)
    run.read_until_begun()
    run.engine.pause()
    run.change(5, "continue")
    assert run.engine.paused
    run.engine.resume()
    run.read_all()
    assert len(run.tokens[request.request_id]) == LENGTH


def test_an_unknown_word_for_what_is_in_flight_is_refused(run: Run):
    with pytest.raises(ConfigError, match="in_flight must be finish, continue or restart, not 'Finish'"):
        run.engine.between_steps(lambda _: None, in_flight="Finish")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("at", range(1, 14))
def test_reading_what_is_in_flight_survives_a_shortage_before_masks(at: int):
    """The step before one that waits for masks runs out of memory while everything is read."""
    forwards = itertools.count(1)
    device = CpuDevice()
    model = ScarceModel(lambda _: next(forwards) == at)
    config = replace(CONFIG, lookahead=2)
    loop, limits = build_loop(model, config, device, make_sampler(device.torch_device), torch.float32)
    admission = Admission(limits, ModelFacts(model.vocab_size, model.eos_token_ids), 0)
    answers: dict[int, list[int]] = defaultdict(list)

    def publish(record: Committed) -> None:
        for owner, token in zip(record.request_ids.tolist(), record.tokens.tolist(), strict=True):
            answers[owner].append(token)

    loop.publish = publish
    for _ in range(2):
        loop.scheduler.add(admission.make_request([3, 1, 4], form_params(max_tokens=12), form=Wandering()))
    turns = 0
    while loop.has_work:
        loop.step()
        turns += 1
        if turns % 3 == 0:
            loop.drain()
    loop.close()
    assert answers[0] == answers[1]
    assert len(answers[0]) == 12
