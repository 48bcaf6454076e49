"""The cpu device keeps CUDA's promises, and only those."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from gapless.device import open_device
from gapless.device.cpu import CpuDevice
from gapless.errors import ConfigError, InternalError


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    device = CpuDevice()
    yield device
    device.close()


def test_work_on_one_stream_runs_in_order(device: CpuDevice):
    stream, event, seen = device.stream("a"), device.event(), list[int]()
    for number in range(100):
        stream.enqueue(lambda number=number: seen.append(number))
    stream.record(event)
    event.synchronize()
    assert seen == list(range(100))


def test_streams_run_side_by_side(device: CpuDevice):
    first, second, meet = device.stream("a"), device.stream("b"), threading.Barrier(3)
    first.enqueue(lambda: void(meet.wait(10)))
    second.enqueue(lambda: void(meet.wait(10)))
    assert meet.wait(10) in (0, 1, 2)  # passes only while both are running


def test_a_wait_holds_a_stream_until_the_event_has_fired(device: CpuDevice):
    first, second = device.stream("a"), device.stream("b")
    ready, done, gate, seen = device.event(), device.event(), threading.Event(), list[str]()
    first.enqueue(lambda: void(gate.wait(10)))
    first.enqueue(lambda: seen.append("first"))
    first.record(ready)
    second.wait(ready)
    second.enqueue(lambda: seen.append("second"))
    second.record(done)
    assert not ready.done()
    assert not done.done()
    gate.set()
    done.synchronize()
    assert seen == ["first", "second"]


def test_a_wait_before_any_record_is_no_wait(device: CpuDevice):
    stream, never, done = device.stream("a"), device.event(), device.event()
    stream.wait(never)
    stream.record(done)
    done.synchronize()
    never.synchronize()
    assert never.done()


def test_a_wait_refers_to_the_record_before_it_and_not_to_a_later_one(device: CpuDevice):
    first, second = device.stream("a"), device.stream("b")
    event, done, gate = device.event(), device.event(), threading.Event()
    first.record(event)
    second.wait(event)
    first.enqueue(lambda: void(gate.wait(10)))
    first.record(event)  # recorded again, not yet reached
    second.record(done)
    done.synchronize()
    assert not event.done()
    gate.set()
    event.synchronize()


def test_an_error_in_a_stream_surfaces_where_somebody_waits_for_it(device: CpuDevice):
    first, second = device.stream("a"), device.stream("b")
    ready, done, ran = device.event(), device.event(), list[int]()

    def fail() -> None:
        raise ZeroDivisionError("in a kernel")

    first.enqueue(fail)
    first.record(ready)
    second.wait(ready)
    second.enqueue(lambda: ran.append(1))
    second.record(done)
    with pytest.raises(ZeroDivisionError, match="in a kernel"):
        done.synchronize()
    assert ran == []


def test_timed_events_measure_the_work_between_them(device: CpuDevice):
    stream, begin, end, gate = device.stream("a"), device.event(timed=True), device.event(timed=True), threading.Event()
    stream.record(begin)
    stream.enqueue(lambda: void(gate.wait(10)))
    stream.record(end)
    begin.synchronize()
    assert not end.done()
    gate.set()
    end.synchronize()
    assert end.seconds_since(begin) > 0


def test_a_closed_stream_refuses_work(device: CpuDevice):
    stream = device.stream("a")
    device.close()
    with pytest.raises(InternalError, match="closed"):
        stream.enqueue(lambda: None)


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "", "mps", "cpu:0:1"])
def test_an_unknown_device_is_named_in_the_error(name: str):
    with pytest.raises(ConfigError, match="device must be"):
        open_device(name)


def void(_: object) -> None:
    """Drop a value, for lambdas that must return None."""
