"""The simulated device: CUDA's rules, in any order that they allow."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest
import torch

from gapless.device.base import Access, Note
from gapless.device.sim import RandomOrder, SimDevice, TimedOrder
from gapless.errors import InternalError

SEEDS = range(300)
LAZY = 0.0


def device_of(seed: int = 0, eagerness: float | None = None) -> SimDevice:
    return SimDevice(RandomOrder(seed, eagerness))


def add(seen: list[str], name: str) -> Callable[[], None]:
    return lambda: seen.append(name)


def test_nothing_runs_before_the_order_picks_it():
    device, seen = device_of(eagerness=LAZY), list[str]()
    stream, done = device.stream("a"), device.event("done")
    for name in "xyz":
        stream.enqueue(add(seen, name))
    stream.record(done)
    assert seen == []
    assert not done.done()
    done.synchronize()
    assert seen == ["x", "y", "z"]
    assert done.done()


@pytest.mark.parametrize("seed", range(20))
def test_an_event_that_a_poll_finds_done_orders_the_host_behind_it(seed: int):
    device = device_of(seed)
    stream, done, pinned = device.stream("copies"), device.event("done"), device.pinned(1, "source")
    stream.enqueue(lambda: None, Note("copy in", 0, "A", lambda: [Access("source", pinned, None, False)]))
    stream.record(done)
    assert any(done.done() for _ in range(10))
    device.host_view(pinned)[0] = 1
    assert device.checker.races == []


def test_a_poll_that_finds_nothing_lets_the_device_do_one_piece_of_work():
    device, seen = device_of(eagerness=LAZY), list[str]()
    stream, done = device.stream("a"), device.event("done")
    for name in "xyz":
        stream.enqueue(add(seen, name))
    stream.record(done)
    assert [(done.done(), len(seen)) for _ in range(5)] == [(False, 1), (False, 2), (False, 3), (True, 3), (True, 3)]


def test_a_copy_reads_pinned_memory_when_it_runs_and_not_when_it_is_queued():
    device = device_of(eagerness=LAZY)
    stream, done = device.stream("copy"), device.event("done")
    pinned, target = device.pinned(1, "source"), torch.zeros(1, dtype=torch.int32)
    view = device.host_view(pinned)
    view[0] = 1
    stream.enqueue(lambda: void(target.copy_(pinned)))
    stream.record(done)
    view[0] = 2
    done.synchronize()
    assert target.item() == 2


def test_a_graph_reads_its_inputs_at_replay():
    device, value, seen = device_of(), [1], list[int]()
    stream, done = device.stream("compute"), device.event("done")
    graph = device.capture(lambda: seen.append(value[0]), stream)
    assert seen == []
    for value[0] in (2, 3):
        stream.enqueue(graph.replay)
        stream.record(done)
        done.synchronize()
    assert seen == [2, 3]


@pytest.mark.parametrize("wait_first", [True, False])
def test_a_wait_before_the_record_is_no_wait(wait_first: bool):
    orders: set[tuple[str, ...]] = set()
    for seed in SEEDS:
        device, seen = device_of(seed), list[str]()
        first, second, ready = device.stream("first"), device.stream("second"), device.event("ready")
        if wait_first:
            second.wait(ready)
        first.enqueue(add(seen, "first"))
        first.record(ready)
        if not wait_first:
            second.wait(ready)
        second.enqueue(add(seen, "second"))
        device.close()
        orders.add(tuple(seen))
    both = {("first", "second"), ("second", "first")}
    assert orders == (both if wait_first else {("first", "second")})


def test_a_wait_refers_to_the_latest_record_before_it():
    for seed in SEEDS:
        device, seen = device_of(seed), list[str]()
        first, second, ready = device.stream("first"), device.stream("second"), device.event("ready")
        first.enqueue(add(seen, "old"))
        first.record(ready)
        first.enqueue(add(seen, "new"))
        first.record(ready)
        second.wait(ready)
        second.enqueue(add(seen, "after"))
        first.record(ready)
        device.close()
        assert seen == ["old", "new", "after"]


def test_every_order_that_streams_and_events_allow_is_reached_and_no_other():
    """Streams a: a1 a2, b: b1 b2, with b2 after a1."""
    reached: set[tuple[str, ...]] = set()
    for seed in range(2000):
        device, seen = device_of(seed), list[str]()
        a, b, ready = device.stream("a"), device.stream("b"), device.event("a1 ran")
        a.enqueue(add(seen, "a1"))
        a.record(ready)
        b.enqueue(add(seen, "b1"))
        b.wait(ready)
        b.enqueue(add(seen, "b2"))
        a.enqueue(add(seen, "a2"))
        device.close()
        reached.add(tuple(seen))
    allowed = {
        order
        for order in permutations(["a1", "a2", "b1", "b2"])
        if order.index("a1") < order.index("a2") and order.index("b1") < order.index("b2") > order.index("a1")
    }
    assert reached == allowed


def test_a_seed_gives_the_same_run_every_time():
    def lines(seed: int) -> str:
        device = device_of(seed)
        streams = [device.stream(name) for name in "abc"]
        for number in range(30):
            streams[number % 3].enqueue(lambda: None, Note("work", number, "", list))
        device.close()
        return device.timeline.text()

    assert lines(5) == lines(5)
    assert len({lines(seed) for seed in range(20)}) > 10


def test_an_error_surfaces_in_every_later_event_of_its_stream_and_of_those_that_waited():
    device, seen = device_of(), list[str]()
    first, second = device.stream("first"), device.stream("second")
    before, ready, done = device.event("before"), device.event("ready"), device.event("done")

    def fail() -> None:
        raise ArithmeticError("a kernel went wrong")

    first.record(before)
    first.enqueue(fail)
    first.record(ready)
    second.wait(ready)
    second.enqueue(add(seen, "skipped"))
    second.record(done)
    before.synchronize()
    for event in (ready, done, done):
        with pytest.raises(ArithmeticError, match="went wrong"):
            event.synchronize()
    first.record(ready)
    with pytest.raises(ArithmeticError, match="went wrong"):
        ready.synchronize()
    assert seen == []


def test_a_host_that_waits_for_what_can_not_happen_is_told_so():
    device = device_of()
    first, second = device.stream("first"), device.stream("second")
    one, two = device.event("one"), device.event("two")
    first.record(one)
    device.close()
    with pytest.raises(InternalError, match="closed"):
        second.enqueue(lambda: None)
    with pytest.raises(InternalError, match="closed"):
        two.synchronize()


def test_work_of_a_step_must_declare_what_it_touches():
    stream = device_of().stream("a")
    with pytest.raises(InternalError, match="compute of step 3 does not declare"):
        stream.enqueue(lambda: None, Note("compute", 3, "A"))


def test_recovering_with_work_in_flight_is_refused():
    device = device_of(eagerness=LAZY)
    device.stream("a").enqueue(lambda: None)
    with pytest.raises(InternalError, match="in flight"):
        device.recover()


def test_virtual_time_follows_from_costs_and_events():
    """copy 1 s, compute 4 s, the host 2 s between steps: work waits for the host, for its stream and for events."""
    costs = {"copy": 1.0, "compute": 4.0}
    device = SimDevice(TimedOrder(), cost=lambda note: costs[note.name])
    copies, compute = device.stream("copies"), device.stream("compute")
    begin, end, copied = device.event("begin"), device.event("end"), device.event("copied")
    for step in range(2):
        device.spend("plan", 2.0, step)
        copies.enqueue(lambda: None, Note("copy", step, "", list))
        copies.record(copied)
        compute.wait(copied)
        compute.record(begin)
        compute.enqueue(lambda: None, Note("compute", step, "", list))
        compute.record(end)
    end.synchronize()
    assert [(span.label, span.begin, span.end) for span in device.timeline.spans if span.lane != "host"] == [
        ("copy 0", 2.0, 3.0),
        ("compute 0", 3.0, 7.0),
        ("copy 1", 4.0, 5.0),
        ("compute 1", 7.0, 11.0),
    ]
    assert device.now == 11.0
    assert device.waited == 7.0
    assert end.seconds_since(begin) == 4.0


def test_the_timeline_has_a_column_for_each_lane_and_a_chrome_trace():
    device = device_of(eagerness=1.0)
    copies, compute = device.stream("h2d"), device.stream("compute")
    copies.enqueue(lambda: None, Note("copy in", 0, "A", list))
    compute.enqueue(lambda: None, Note("compute", 0, "A", list))
    device.close()
    header, first, second = device.timeline.text().splitlines()
    assert header.split() == ["host", "h2d", "compute"]
    assert first.index("copy in 0 A") == header.index("h2d")
    assert second.index("compute 0 A") == header.index("compute")
    events = device.timeline.chrome_trace()["traceEvents"]
    assert [each["args"]["name"] for each in events if each["name"] == "thread_name"] == ["host", "h2d", "compute"]
    assert [(each["name"], each["tid"]) for each in events if each["ph"] == "X"] == [
        ("copy in 0 A", 2),
        ("compute 0 A", 3),
    ]


def void(_: object) -> None:
    pass
