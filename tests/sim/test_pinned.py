"""Pinned memory as the host sees it on the simulated device: every way to use it is booked or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gapless.device.base import Access, Note
from gapless.device.sim import RandomOrder, SimDevice
from gapless.errors import InternalError

View = NDArray[np.int32]
SIZE = 4


def add_in_place(view: View) -> None:
    view += np.arange(SIZE, dtype=np.int32)


def write_through_a_kept_slice(view: View) -> None:
    part = view[1:][:2]
    part[0] = 1


READS: dict[str, Callable[[View], object]] = {
    "an element": lambda view: view[1],
    "elements by index": lambda view: view[[1, 2]],
    "an element of a slice": lambda view: view[1:][0],
    "copy": lambda view: view.copy(),
    "copy of a slice": lambda view: view[:2].copy(),
    "tolist": lambda view: view.tolist(),
    "iteration": list,
    "asarray": np.asarray,
    "array": np.array,
    "an operator": lambda view: view + 1,
    "a comparison": lambda view: view == 0,
    "a ufunc": np.negative,
    "input of a ufunc with a plain output": lambda view: np.negative(view, out=np.zeros(SIZE, dtype=np.int32)),
    "assignment to a plain array": lambda view: np.zeros(SIZE).__setitem__(slice(None), view),
    "a tensor made of it": torch.tensor,
}
WRITES: dict[str, Callable[[View], object]] = {
    "an element": lambda view: view.__setitem__(1, 5),
    "a slice": lambda view: view.__setitem__(slice(1, 3), 5),
    "a kept slice": write_through_a_kept_slice,
    "a line of a reshape": lambda view: view.reshape(2, 2)[1].__setitem__(slice(None), 5),
    "all of it": lambda view: view.__setitem__(..., 5),
    "fill": lambda view: view.fill(5),
    "an operator in place": add_in_place,
    "output of a ufunc": lambda view: np.add(1, np.arange(SIZE, dtype=np.int32), out=view),
    "a slice as output of a ufunc": lambda view: np.negative(np.ones(2, dtype=np.int32), out=view[:2]),
}
REFUSED: dict[str, Callable[[View], object]] = {
    "view": lambda view: view.view(np.float32),
    "a reshape that copies": lambda view: view.reshape(2, 2)[:, ::-1].reshape(4),
    "sort": lambda view: view.sort(),
    "put": lambda view: view.put(0, 1),
    "data": lambda view: view.data,
    "ctypes": lambda view: view.ctypes,
    "copyto": lambda view: np.copyto(view, 1),
    "sum": np.sum,
    "concatenate": lambda view: np.concatenate([view, view]),
    "a ufunc that writes to its input": lambda view: np.add.at(view, [0], 1),
    "a plain view": lambda view: np.array(view, copy=False),
}


def races_with_a_copy(use: Callable[[View], object], *, copy_writes: bool) -> list[tuple[bool, bool]]:
    """(host reads, host writes) of the races between the host's use and a copy in flight."""
    device = SimDevice(RandomOrder(0))
    stream, pinned = device.stream("copies"), device.pinned(SIZE, "inputs")
    access = Access("inputs", pinned, None, copy_writes)
    stream.enqueue(lambda: None, Note("copy", 0, "A", lambda: [access]))
    use(device.host_view(pinned))
    device.close()
    uses = [each for race in device.checker.races for each in (race.first, race.second) if each.thread == "host"]
    return [(not each.write, each.write) for each in uses]


@pytest.mark.parametrize("name", READS)
def test_reading_is_booked(name: str):
    assert (True, False) in races_with_a_copy(READS[name], copy_writes=True)
    assert races_with_a_copy(READS[name], copy_writes=False) == []


@pytest.mark.parametrize("name", WRITES)
def test_writing_is_booked(name: str):
    assert (False, True) in races_with_a_copy(WRITES[name], copy_writes=False)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_booked_is_refused(name: str):
    device = SimDevice(RandomOrder(0))
    view = device.host_view(device.pinned(SIZE, "inputs"))
    with pytest.raises(InternalError, match="would not be booked"):
        REFUSED[name](view)


def test_taking_a_slice_is_no_use_yet():
    assert races_with_a_copy(lambda view: view[1:][:2], copy_writes=True) == []


def test_what_is_read_is_a_copy_that_can_not_be_written_by_mistake():
    device = SimDevice(RandomOrder(0))
    pinned = device.pinned(SIZE, "inputs")
    view: Any = device.host_view(pinned)
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(view)[0] = 1
    for mine in (view.copy(), np.array(view), view[[0, 1]], view + 0):
        mine[0] = 1
    assert pinned.tolist() == [0] * SIZE
    with pytest.raises(TypeError):
        memoryview(view)
    with pytest.raises(TypeError):
        torch.from_numpy(view)


def test_it_holds_what_a_plain_array_would():
    device = SimDevice(RandomOrder(0))
    pinned = device.pinned(SIZE, "inputs")
    for memory in (device.host_view(pinned), plain := np.zeros(SIZE, dtype=np.int32)):
        memory[:] = np.arange(SIZE)
        memory *= 3
        memory[1:3] += np.asarray([10, 20], dtype=np.int32)
        memory[[0, 3]] = memory[:2]
        np.subtract(memory, 1, out=memory, where=np.asarray([True, False, True, False]))
    assert pinned.tolist() == plain.tolist()
    view = device.host_view(pinned)
    assert (view.size, view.shape, view.dtype, len(view)) == (SIZE, (SIZE,), np.int32, SIZE)
