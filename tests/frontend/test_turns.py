"""Threads that share an LLM take turns in the order in which they came, and nobody waits in silence."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest

from frontend.tiny import answer, tiny_engine
from gapless import LLM, SamplingParams, turns
from gapless.errors import InvalidRequestError
from gapless.turns import TurnLine
from support.waiting import eventually

GREEDY = SamplingParams(temperature=0, max_tokens=20)
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
PROMPTS = [[1 + i % 40, 2, 3 + i % 7] for i in range(8)]


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM.from_loaded(tiny_engine(lookahead=1)) as llm:
        yield llm


def waiting(llm: LLM) -> int:
    """Calls that have or want the turn."""
    return len(llm._turns)  # pyright: ignore[reportPrivateUsage]


def ask(llm: LLM, place: int, order: list[int]) -> None:
    """Books its place while it has the turn."""
    token_ids: list[int] = []
    for delta in llm.stream(PROMPTS[place], GREEDY):
        if not token_ids:
            order.append(place)
        token_ids += delta.token_ids
    assert token_ids == answer(PROMPTS[place], 20)


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_turns_come_in_the_order_of_the_calls(llm: LLM):
    order: list[int] = []
    stream = llm.stream(PROMPTS[0], LONG)
    next(stream)
    threads: list[threading.Thread] = []
    for place in range(8):
        threads.append(started(lambda place=place: ask(llm, place, order)))
        eventually(lambda place=place: waiting(llm) == place + 2)
    stream.close()
    for thread in threads:
        thread.join(30)
    assert order == list(range(8))


def test_a_thread_that_calls_again_at_once_comes_after_those_who_wait(llm: LLM):
    order: list[int] = []
    for _ in range(10):
        stream = llm.stream(PROMPTS[0], LONG)
        next(stream)
        patient = started(lambda: ask(llm, 1, order))
        eventually(lambda: waiting(llm) == 2)
        stream.close()
        ask(llm, 2, order)
        patient.join(30)
    assert order == [1, 2] * 10


def test_a_stream_may_be_closed_by_another_thread(llm: LLM):
    stream = llm.stream(PROMPTS[0], LONG)
    next(stream)
    started(stream.close).join(30)
    assert waiting(llm) == 0
    llm.generate(PROMPTS[1], GREEDY)


def test_a_stream_that_another_thread_reads_on_is_that_thread_s_to_finish(llm: LLM):
    stream = llm.stream(PROMPTS[:1], GREEDY)
    next(stream)
    ends: list[object] = []

    def read_on_and_ask() -> None:
        next(stream)
        try:
            llm.generate(PROMPTS[1], GREEDY)
        except InvalidRequestError as error:
            ends.append(str(error))
        eventually(lambda: waiting(llm) == 2)
        ends.extend(stream)

    reader = started(read_on_and_ask)
    eventually(lambda: bool(ends))
    assert llm.generate([PROMPTS[2]], GREEDY)[0].outputs[0].token_ids == answer(PROMPTS[2], 20)
    reader.join(30)
    assert "unfinished stream" in str(ends[0])


def test_a_dropped_stream_gives_its_turn_up(llm: LLM):
    stream = llm.stream(PROMPTS[0], LONG)
    next(stream)
    del stream
    assert llm.generate([PROMPTS[1]], GREEDY)[0].outputs[0].token_ids == answer(PROMPTS[1], 20)


def test_whoever_is_interrupted_in_the_line_leaves_it():
    line = TurnLine()

    def interrupt() -> None:
        raise KeyboardInterrupt

    def wait_in_vain() -> None:
        with pytest.raises(KeyboardInterrupt), line.turn(interrupt):
            pass

    with line.turn(lambda: None):
        started(wait_in_vain).join(30)
        assert len(line) == 1
    assert len(line) == 0


def test_the_turn_passes_at_once_though_the_next_in_line_was_not_the_first_to_fall_asleep(
    monkeypatch: pytest.MonkeyPatch,
):
    line, order, asleep = TurnLine(), list[int](), list[int]()
    monkeypatch.setattr(turns, "LOOK_SECONDS", 0.001)

    def wait(place: int) -> None:
        def look() -> None:
            if place == 3:  # the last in line falls asleep first, the others after their next look
                monkeypatch.setattr(turns, "LOOK_SECONDS", 3600.0)
            if turns.LOOK_SECONDS == 3600.0:
                asleep.append(place)

        with line.turn(look):
            order.append(place)

    with line.turn(lambda: None):
        for place in (1, 2, 3):
            threading.Thread(target=wait, args=(place,), daemon=True).start()
            eventually(lambda place=place: len(line) == place + 1)
        eventually(lambda: len(asleep) == 3)
        assert asleep[0] == 3
    eventually(lambda: order == [1, 2, 3])


@pytest.mark.parametrize("left_unread", [True, False])
def test_a_call_that_waits_for_a_stream_nobody_reads_says_so(left_unread: bool, caplog: pytest.LogCaptureFixture):
    line, looks = TurnLine(unread_seconds=0.0), threading.Semaphore(0)

    def wait() -> None:
        with line.turn(looks.release):
            pass

    with caplog.at_level(logging.WARNING, "gapless"), line.turn(lambda: None) as turn:
        waiter = threading.Thread(target=wait, name="who-waits")
        if left_unread:
            with turn.away():
                waiter.start()
                assert all(looks.acquire(timeout=30) for _ in range(3))
        else:
            waiter.start()
            assert all(looks.acquire(timeout=30) for _ in range(3))
    waiter.join(30)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == left_unread
    assert all("who-waits" in each and threading.current_thread().name in each for each in said)
