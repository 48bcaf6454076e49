"""Running out of memory passes, on every device: it is told once, what hangs on it is skipped, and work goes on."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from gapless.device import Device, Event, Stream, has_cuda, open_device
from gapless.device.cpu import CpuDevice
from gapless.device.faults import as_out_of_memory
from gapless.device.sim.device import SimDevice
from gapless.device.sim.order import RandomOrder
from gapless.errors import OutOfMemoryError

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")])


@pytest.fixture(params=["cpu", "sim", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    makers: dict[str, Callable[[], Device]] = {
        "cpu": CpuDevice,
        "sim": lambda: SimDevice(RandomOrder(0)),
        "cuda": lambda: open_device("cuda"),
    }
    device = makers[request.param]()
    yield device
    device.close()


def fail() -> None:
    raise OutOfMemoryError("too little memory")


def add(seen: list[str], what: str) -> Callable[[], None]:
    return lambda: seen.append(what)


def recorded(device: Device, stream: Stream) -> Event:
    event = device.event()
    stream.record(event)
    return event


def fails(event: Event) -> bool:
    try:
        event.synchronize()
    except OutOfMemoryError:
        return True
    return False


def test_what_is_queued_behind_it_is_skipped_until_the_device_recovers(device: Device):
    stream, seen = device.stream("a"), list[str]()
    before = recorded(device, stream)
    stream.enqueue(fail)
    stream.enqueue(add(seen, "skipped"))
    first = recorded(device, stream)
    stream.enqueue(add(seen, "skipped too"))
    second = recorded(device, stream)
    assert [fails(event) for event in (before, first, second)] == [False, True, True]
    device.recover()
    stream.enqueue(add(seen, "ran"))
    assert not fails(recorded(device, stream))
    assert seen == ["ran"]


def test_an_event_that_is_recorded_again_forgets_it(device: Device):
    stream, event = device.stream("a"), device.event()
    stream.enqueue(fail)
    stream.record(event)
    assert fails(event)
    device.recover()
    stream.record(event)
    assert not fails(event)


def test_it_goes_on_to_whoever_waits_for_a_stream_that_waited(device: Device):
    streams, seen = [device.stream(name) for name in "abc"], list[str]()
    told: list[bool] = []
    for turn in ("failed", "ran"):
        events: list[Event] = []
        for place, stream in enumerate(streams):
            if place:
                stream.wait(events[-1])
            stream.enqueue(fail if turn == "failed" and not place else add(seen, f"{turn} {place}"))
            events.append(recorded(device, stream))
        told += [fails(event) for event in events]
        device.recover()
    assert told == [True] * 3 + [False] * 3
    assert sorted(seen) == ["ran 0", "ran 1", "ran 2"]


def test_it_does_not_hide_an_error_that_stays(device: Device):
    first, second = device.stream("a"), device.stream("b")

    def break_down() -> None:
        raise ArithmeticError("a kernel went wrong")

    first.enqueue(break_down)
    broken = recorded(device, first)
    second.enqueue(fail)
    second.wait(broken)
    for _ in range(3):
        second.enqueue(fail)
        with pytest.raises(ArithmeticError, match="went wrong"):
            recorded(device, second).synchronize()
        device.recover()


def test_at_start_up_it_is_raised(device: Device):
    stream, seen = device.stream("a"), list[str]()
    with pytest.raises(OutOfMemoryError, match="too little memory"):
        device.run_now(fail, stream)
    device.run_now(add(seen, "ran"), stream)
    assert seen == ["ran"]


def allocate_too_much() -> None:
    torch.empty(2**55, dtype=torch.uint8, device="cuda" if has_cuda() else "cpu")


def raise_memory_error() -> None:
    raise MemoryError


def raise_as_libraries_do() -> None:
    raise RuntimeError("CUDA error: out of memory")


@pytest.mark.parametrize("shortage", [allocate_too_much, raise_memory_error, raise_as_libraries_do])
def test_whoever_raises_it_in_whatever_way_it_is_the_same_error(device: Device, shortage: Callable[[], None]):
    stream = device.stream("a")
    stream.enqueue(shortage)
    with pytest.raises(OutOfMemoryError, match=r"memory|MemoryError"):
        recorded(device, stream).synchronize()


@pytest.mark.parametrize(
    "error", [RuntimeError("a kernel went wrong"), ValueError("out of memory"), KeyboardInterrupt()]
)
def test_other_errors_are_not_taken_for_it(error: BaseException):
    assert as_out_of_memory(error) is None


def test_it_keeps_no_tensor_alive(device: Device):
    stream, held = device.stream("a"), list[weakref.ref[torch.Tensor]]()

    def fail_with_tensors() -> None:
        activations = torch.zeros(100)
        held.append(weakref.ref(activations))
        try:
            fail()
        except OutOfMemoryError as error:
            raise MemoryError("while another error was handled") from error

    collecting = gc.isenabled()
    gc.disable()
    try:
        stream.enqueue(fail_with_tensors)
        event = recorded(device, stream)
        with pytest.raises(OutOfMemoryError) as caught:
            event.synchronize()
        assert caught.value.__context__ is None
        assert held[0]() is None
    finally:
        if collecting:
            gc.enable()
