"""The happens-before checker: what it reports, and what it leaves alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gapless.device.base import Access, Note
from gapless.device.sim import Race, RandomOrder, SimDevice
from gapless.device.sim.races import OutOfRangeError
from gapless.device.sim.streams import SimStream
from gapless.errors import InternalError

SEEDS = range(30)


@dataclass
class Bench:
    """Two streams, an event and two buffers."""

    device: SimDevice
    first: SimStream
    second: SimStream
    table: torch.Tensor
    pinned: torch.Tensor

    def work(self, stream: SimStream, step: int, *, write: bool, rows: Sequence[int] | None = (0,)) -> None:
        """Queue something that uses rows of the table, or all of it as a whole."""
        access = Access("table", self.table, None if rows is None else np.asarray(rows), write)
        stream.enqueue(lambda: None, Note("work", step, "", lambda: [access]))

    def copy(self, stream: SimStream, step: int) -> None:
        """Queue something that reads the pinned buffer."""
        access = Access("inputs", self.pinned, None, False)
        stream.enqueue(lambda: None, Note("copy in", step, "A", lambda: [access]))


def bench(seed: int = 0, *, audit: bool = False) -> Bench:
    device = SimDevice(RandomOrder(seed), audit=audit)
    first, second = device.stream("first"), device.stream("second")
    return Bench(device, first, second, torch.zeros(4), device.pinned(4, "inputs"))


def races(use: Callable[[Bench], None]) -> list[list[Race]]:
    """What is reported with each of several orders."""
    found: list[list[Race]] = []
    for seed in SEEDS:
        b = bench(seed)
        use(b)
        b.device.close()
        found.append(b.device.checker.races)
    return found


def test_a_write_and_a_read_that_no_event_orders_are_a_race_in_every_order():
    def use(b: Bench) -> None:
        b.work(b.first, 3, write=True)
        b.work(b.second, 4, write=False)

    for found in races(use):
        assert len(found) == 1
        assert found[0].buffer == "table"
        assert found[0].unit == 0
        assert {found[0].first.what, found[0].second.what} == {"work 3", "work 4"}
        assert found[0].first.where.startswith("test_races.py:")


def test_the_missing_event_is_that_of_the_work_that_was_queued_first_in_whatever_order_they_ran():
    def use(b: Bench) -> None:
        for stream, step in ((b.first, 0), (b.second, 1)):
            b.work(stream, step, write=True)
            stream.record(b.device.event(f"{stream.name}_done"))

    found = [race for each in races(use) for race in each]
    assert {race.first.thread for race in found} == {"first", "second"}
    assert {race.missing for race in found} == {"second must wait for first_done on first"}


def test_an_event_between_them_orders_them():
    def use(b: Bench) -> None:
        ready = b.device.event("ready")
        b.work(b.first, 0, write=True)
        b.first.record(ready)
        b.second.wait(ready)
        b.work(b.second, 0, write=True)

    assert races(use) == [[] for _ in SEEDS]


def test_an_event_that_was_recorded_too_early_does_not():
    def use(b: Bench) -> None:
        ready = b.device.event("ready")
        b.first.record(ready)
        b.work(b.first, 0, write=True)
        b.second.wait(ready)
        b.work(b.second, 0, write=False)

    assert all(races(use))


def test_order_passes_through_a_third_party():
    def through_the_host(b: Bench) -> None:
        ready = b.device.event("ready")
        b.work(b.first, 0, write=True)
        b.first.record(ready)
        ready.synchronize()
        b.work(b.second, 0, write=True)

    def through_a_stream(b: Bench) -> None:
        third = b.device.stream("third")
        one, two = b.device.event("one"), b.device.event("two")
        b.work(b.first, 0, write=True)
        b.first.record(one)
        third.wait(one)
        third.record(two)
        b.second.wait(two)
        b.work(b.second, 0, write=True)

    for use in (through_the_host, through_a_stream):
        assert races(use) == [[] for _ in SEEDS]


def test_reads_and_other_rows_do_not_race():
    def use(b: Bench) -> None:
        b.work(b.first, 0, write=False)
        b.work(b.second, 0, write=False)
        b.work(b.first, 1, write=True, rows=[1, 2])
        b.work(b.second, 1, write=True, rows=[3])

    assert races(use) == [[] for _ in SEEDS]


def test_a_write_after_a_read_that_was_not_waited_for_is_a_race():
    def use(b: Bench) -> None:
        b.work(b.first, 0, write=False, rows=[0, 1, 2])
        b.work(b.second, 0, write=True, rows=[2, 3])

    for found in races(use):
        assert [each.unit for each in found] == [2]


@pytest.mark.parametrize(("first", "second"), [(None, (2,)), ((2,), None)])
@pytest.mark.parametrize(("first_writes", "second_writes"), [(True, True), (True, False), (False, True)])
def test_a_use_of_the_whole_races_with_a_use_of_one_row(
    first: Sequence[int] | None, second: Sequence[int] | None, first_writes: bool, second_writes: bool
):
    def use(b: Bench) -> None:
        b.work(b.first, 0, write=first_writes, rows=first)
        b.work(b.second, 0, write=second_writes, rows=second)

    for [race] in races(use):
        assert race.unit in (-1, 2)
        assert (race.first.write, race.second.write) != (False, False)


def test_uses_of_the_whole_and_of_rows_that_an_event_orders_do_not_race():
    def use(b: Bench) -> None:
        for step, (rows, then) in enumerate([(None, (1,)), ((2,), None), (None, None), ((3,), (3,))]):
            ready, done = b.device.event("ready"), b.device.event("done")
            b.work(b.first, step, write=True, rows=rows)
            b.first.record(ready)
            b.second.wait(ready)
            b.work(b.second, step, write=True, rows=then)
            b.second.record(done)
            b.first.wait(done)
        b.work(b.first, 9, write=False, rows=None)
        b.work(b.second, 9, write=False, rows=[1])

    assert races(use) == [[] for _ in SEEDS]


def test_a_row_is_compared_with_what_was_done_to_the_whole_before_other_rows():
    def use(b: Bench) -> None:
        b.work(b.first, 0, write=True, rows=None)
        b.work(b.first, 1, write=True, rows=[0])
        b.work(b.second, 2, write=False, rows=[3])

    for [race] in races(use):
        assert {race.first.what, race.second.what} == {"work 0", "work 2"}


def test_a_view_of_a_part_of_a_known_buffer_is_refused():
    b = bench()
    b.device.poison(b.table, "table")
    for part in (b.table[1:], b.table[:2], b.table[1:3], b.table.view(2, 2)):
        with pytest.raises(InternalError, match="part overlaps table"):
            b.device.poison(part, "part")
    with pytest.raises(InternalError, match="part is not contiguous"):
        b.device.poison(torch.zeros(4, 4)[:, 1], "part")


def test_another_view_of_the_same_memory_is_the_same_buffer():
    def use(b: Bench) -> None:
        b.work(b.first, 0, write=True)
        b.table = b.table[:]
        b.work(b.second, 0, write=False)

    assert [len(found) for found in races(use)] == [1 for _ in SEEDS]


def test_memory_of_a_buffer_that_is_gone_is_not_another_buffers_later():
    device, addresses = SimDevice(RandomOrder(0)), set[int]()
    for _ in range(20):
        table = torch.zeros(64)
        addresses.add(table.data_ptr())
        device.poison(table, "table")
    assert len(addresses) == 20


def refill(view: NDArray[np.int32]) -> None:
    view[0] = 2


def test_rewriting_pinned_memory_that_a_queued_copy_reads_tells_sites_steps_and_the_event_to_wait_for():
    for seed in SEEDS:
        b = bench(seed)
        view, copied = b.device.host_view(b.pinned), b.device.event("h2d_done A")
        view[0] = 1
        b.copy(b.first, 7)
        b.first.record(copied)
        b.device.moment("planned", 8)
        refill(view)  # the fault
        copied.synchronize()
        [race] = b.device.checker.races
        assert race.buffer == "inputs"
        uses = {each.thread: each for each in (race.first, race.second)}
        assert uses["first"].what == "copy in 7 A"
        assert uses["host"].what == "step 8, after planned"
        for each, callee in ((uses["first"], "copy"), (uses["host"], "refill")):
            assert re.match(rf"test_races.py:\d+ {callee} < test_races.py:\d+ test_rewriting_\w+$", each.where)
        assert "host must wait for h2d_done A on first" in str(race)


def test_the_hosts_uses_tell_the_step_that_it_queued_or_waited_for_last():
    b = bench(3)
    view, collected = b.device.host_view(b.pinned), b.device.event("d2h_done A")

    def what() -> str:
        """Of a read by the host, as a race with a write that nothing orders tells it."""
        access = Access("inputs", b.pinned, None, True)
        b.second.enqueue(lambda: None, Note("spoil", -1, "", lambda: [access]))
        view.tolist()
        b.device.run_now(lambda: None, b.second)
        race = b.device.checker.races[-1]
        return next(each.what for each in (race.first, race.second) if each.thread == "host")

    assert what() == "before any step"
    b.work(b.first, 4, write=False)
    b.first.record(collected)
    assert what() == "step 4, after work"
    b.work(b.first, 5, write=False)
    collected.synchronize()
    assert what() == "step 4, after d2h_done A"


def test_waiting_for_the_copy_before_rewriting_is_right():
    for seed in SEEDS:
        b = bench(seed)
        view, copied = b.device.host_view(b.pinned), b.device.event("h2d_done A")
        for step in range(3):
            view[0] = step
            b.copy(b.first, step)
            b.first.record(copied)
            copied.synchronize()
        assert b.device.checker.races == []


def test_the_host_must_not_read_what_a_stream_may_still_write():
    b = bench()
    view = b.device.host_view(b.pinned)
    access = Access("inputs", b.pinned, None, True)
    b.first.enqueue(lambda: None, Note("copy out", 0, "A", lambda: [access]))
    assert view[:2].tolist() == [0, 0]
    b.device.close()
    assert len(b.device.checker.races) == 1


def test_a_replay_is_booked_with_what_was_captured():
    b = bench()
    graph = b.device.capture(lambda: None, b.first, lambda: [Access("table", b.table, np.asarray([1]), True)])
    b.first.enqueue(graph.replay, Note("replay", 5, "A"))
    b.work(b.second, 6, write=True, rows=[1])
    b.device.close()
    [race] = b.device.checker.races
    assert {race.first.what, race.second.what} == {"replay 5 A", "work 6"}


def test_work_of_a_step_that_declares_nothing_is_refused_unless_it_is_the_replay_of_a_graph_that_does():
    b = bench()
    declares = b.device.capture(lambda: None, b.first, list)
    declares_not = b.device.capture(lambda: None, b.first)
    b.first.enqueue(declares.replay, Note("replay", 0, "A"))
    for work in (declares_not.replay, lambda: declares.replay()):
        with pytest.raises(InternalError, match="replay of step 1 does not declare what it touches"):
            b.first.enqueue(work, Note("replay", 1, "A"))


@pytest.mark.parametrize("row", [-1, 4])
def test_a_row_that_the_buffer_does_not_have_is_told_as_what_it_is(row: int):
    b = bench()
    b.work(b.first, 3, write=True, rows=[0, row])
    b.first.record(done := b.device.event("done"))
    with pytest.raises(OutOfRangeError, match=rf"work 3 declares table \[{row}\], of 4"):
        done.synchronize()


def test_poison_is_a_write_and_ruins_what_was_there():
    b = bench()
    b.work(b.first, 0, write=False, rows=[1])
    b.device.poison(b.table, "table", np.asarray([1]))
    b.device.close()
    assert b.table.isnan().tolist() == [False, True, False, False]
    assert len(b.device.checker.races) == 1


# ------------------------------------------------------------------ the audit of declarations


def run_audited(write: Sequence[int], read: Sequence[int], work: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """Run work that declares these rows of a table holding 1, 2, 3, 4."""
    b = bench(audit=True)
    b.table.copy_(torch.arange(1.0, 5.0))
    uses = [
        Access("table", b.table, np.asarray(write, dtype=np.int64), True),
        Access("table", b.table, np.asarray(read, dtype=np.int64), False),
    ]
    done = b.device.event("done")
    b.first.enqueue(lambda: work(b.table), Note("work", 0, "", lambda: uses))
    b.first.record(done)
    done.synchronize()
    return b.table


def test_the_audit_finds_a_write_that_was_not_declared():
    def writes_row_two(table: torch.Tensor) -> None:
        table[2] = 0.0

    assert run_audited([2], [], writes_row_two).tolist() == [1.0, 2.0, 0.0, 4.0]
    for write in ([], [1]):
        with pytest.raises(InternalError, match="wrote to table without declaring it"):
            run_audited(write, [2], writes_row_two)


@pytest.mark.parametrize("replayed", [False, True])
def test_the_audit_holds_work_that_declares_an_empty_list_to_that(replayed: bool):
    b = bench(audit=True)
    b.work(b.first, 0, write=True)
    graph = b.device.capture(lambda: void(b.table.fill_(0.0)), b.first, list)
    if replayed:
        b.first.enqueue(graph.replay, Note("replay", 1, ""))
    else:
        b.first.enqueue(lambda: void(b.table.fill_(0.0)), Note("work", 1, "", list))
    b.first.record(done := b.device.event("done"))
    with pytest.raises(InternalError, match="wrote to table without declaring it"):
        done.synchronize()


def test_the_audit_hides_what_was_not_declared_for_reading():
    def copies_row_three(table: torch.Tensor) -> None:
        table[0] = table[3]

    assert run_audited([0], [3], copies_row_three).tolist() == [4.0, 2.0, 3.0, 4.0]
    assert run_audited([0], [2], copies_row_three)[0].isnan()


def test_the_audit_hides_what_nobody_has_declared_yet():
    b, seen = bench(audit=True), list[float]()
    b.device.audit_too("table", b.table)

    def reads() -> None:
        seen.extend((b.table[0].item(), b.pinned[0].item()))

    b.first.enqueue(reads, Note("work", 0, "", list))
    b.device.close()
    assert np.isnan(seen[0])
    assert seen[1] != 0
    assert not b.table.any()


def void(_: object) -> None:
    pass
