"""Slots A, B, …: each owns the buffers and events of one step in flight and is refilled only after its own d2h_done."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from gapless.device.base import Device
from gapless.errors import InternalError
from gapless.plan import Ints


class Slot:
    """Pinned host buffers, device buffers and events of one step.

    host_in / device_in    int32[capacity], packed inputs as engine/layout.py lays them out
    device_out / host_out  int32[max_rows], sampled tokens in entry order
    """

    def __init__(self, index: int, device: Device, capacity: int, max_rows: int) -> None:
        self.index = index
        self.host_in = device.pinned(capacity, f"host in {self.letter}")
        self.host_out = device.pinned(max_rows, f"host out {self.letter}")
        self.packed: NDArray[np.int32] = device.host_view(self.host_in)
        self._sampled: NDArray[np.int32] = device.host_view(self.host_out)
        self.device_in = torch.zeros(capacity, dtype=torch.int32, device=device.torch_device)
        self.device_out = torch.zeros(max_rows, dtype=torch.int32, device=device.torch_device)
        self.h2d_done = device.event(f"h2d_done {self.letter}")
        self.compute_begin = device.event(f"compute_begin {self.letter}", timed=True)
        self.compute_done = device.event(f"compute_done {self.letter}", timed=True)
        self.d2h_done = device.event(f"d2h_done {self.letter}")
        self.num_samples = 0
        self.in_flight = False

    @property
    def letter(self) -> str:
        return chr(ord("A") + self.index)

    def collect(self) -> Ints:
        """Wait for the step and return its sampled tokens: the only place where the host waits.

        Raises OutOfMemoryError if the step failed for want of memory, and what else its work raised.
        """
        self.d2h_done.synchronize()
        return self._sampled[: self.num_samples].copy()


class SlotRing:
    """lookahead + 1 slots, handed out in turn."""

    def __init__(self, device: Device, count: int, capacity: int, max_rows: int) -> None:
        self.slots = [Slot(index, device, capacity, max_rows) for index in range(count)]
        self.busy_seconds = 0.0
        self._next = 0

    def acquire(self) -> Slot:
        """The next slot, free to be filled."""
        slot = self.slots[self._next]
        if slot.in_flight:
            raise InternalError(f"slot {slot.letter} is wanted for a new step while its last one is in flight")
        self._next = (self._next + 1) % len(self.slots)
        slot.in_flight = True
        return slot

    def collect(self, slot: Slot) -> Ints:
        """Wait for the slot's step, book its compute time, free the slot and return the sampled tokens.

        Raises what Slot.collect raises. The slot is free then, too: nothing of its step is queued any more.
        """
        slot.in_flight = False
        sampled = slot.collect()
        self.busy_seconds += slot.compute_done.seconds_since(slot.compute_begin)
        return sampled

    def check_integrity(self, steps_in_flight: int) -> None:
        """Raise InternalError unless exactly the slots of the steps in flight are lent out."""
        if sum(slot.in_flight for slot in self.slots) != steps_in_flight:
            raise InternalError("the slots lent out are not those of the steps in flight")
