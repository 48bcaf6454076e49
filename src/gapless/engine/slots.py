"""Slots A, B, …: each owns the buffers and events of one step in flight and is refilled only after its own d2h_done."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray

from gapless.device.base import Device
from gapless.errors import InternalError
from gapless.outcome import LogprobLines, Sampled
from gapless.plan import Ints
from gapless.sampling.logprobs import LINE_NUMBERS, PLACES


@dataclass(frozen=True, slots=True)
class SlotSizes:
    """How much of each a step can need.

    inputs      int32 numbers of packed inputs
    samples     tokens that are sampled
    scores      tokens of prompts whose log probabilities are asked for
    mask_words  of a mask over the vocabulary
    """

    inputs: int
    samples: int
    scores: int = 0
    mask_words: int = 0


class Slot:
    """Pinned host buffers, device buffers and events of one step. int32 all of them.

    host_in / device_in        packed inputs as engine/layout.py lays them out
    device_out / host_out      sampled tokens in entry order
    device_lines / host_lines  log probabilities of the sampled tokens, then of prompts: see sampling/logprobs.py
    host_masks / device_masks  a mask's line for each sample, -1 for none; then the masks
    """

    def __init__(self, index: int, device: Device, sizes: SlotSizes) -> None:
        self.index = index
        self.letter = chr(ord("A") + index)
        self.sizes = sizes
        self.host_in = device.pinned(sizes.inputs, f"host in {self.letter}")
        self.host_out = device.pinned(sizes.samples, f"host out {self.letter}")
        self.host_lines = device.pinned(LINE_NUMBERS * (sizes.samples + sizes.scores), f"host lines {self.letter}")
        self.host_masks = device.pinned(sizes.samples * (1 + sizes.mask_words), f"host masks {self.letter}")
        self.packed: NDArray[np.int32] = device.host_view(self.host_in)
        self.masks: NDArray[np.int32] = device.host_view(self.host_masks)
        self._sampled: NDArray[np.int32] = device.host_view(self.host_out)
        self._lines: NDArray[np.int32] = device.host_view(self.host_lines)
        self.device_in, self.device_out, self.device_lines, self.device_masks = (
            torch.zeros_like(host, device=device.torch_device, pin_memory=False)
            for host in (self.host_in, self.host_out, self.host_lines, self.host_masks)
        )
        self.h2d_done = device.event(f"h2d_done {self.letter}")
        self.masks_done = device.event(f"masks_done {self.letter}")
        self.compute_begin = device.event(f"compute_begin {self.letter}", timed=True)
        self.forward_done = device.event(f"forward_done {self.letter}", timed=True)
        self.sample_begin = device.event(f"sample_begin {self.letter}", timed=True)
        self.compute_done = device.event(f"compute_done {self.letter}", timed=True)
        self.d2h_done = device.event(f"d2h_done {self.letter}")
        self.brings = Brings(0, 0, 0)
        self.waited = False
        self.in_flight = False

    def score_lines(self, count: int) -> slice:
        """Where the log probabilities of so many tokens of prompts are in the lines' buffers."""
        begin = LINE_NUMBERS * self.sizes.samples
        return slice(begin, begin + LINE_NUMBERS * count)

    def collect(self) -> Sampled:
        """Wait for the step and return what it brought: the only place where the host waits.

        Raises OutOfMemoryError if the step failed for want of memory, and what else its work raised.
        """
        self.d2h_done.synchronize()
        brings = self.brings
        logprobs = scores = None
        if brings.logprobs:
            logprobs = _lines_of(self._lines[: LINE_NUMBERS * brings.logprobs]).at(slice(brings.samples))
        if brings.scores:
            scores = _lines_of(self._lines[self.score_lines(brings.scores)])
        return Sampled(self._sampled[: brings.samples].copy(), logprobs, scores)

    def busy_seconds(self) -> float:
        """How long its compute stage ran, without the time between its halves if the second had to wait."""
        seconds = self.compute_done.seconds_since(self.compute_begin)
        return seconds - self.sample_begin.seconds_since(self.forward_done) if self.waited else seconds


@dataclass(frozen=True, slots=True)
class Brings:
    """What a step brings to the host: sampled tokens, lines of log probabilities of these (padding included, 0 if they
    are not asked for), and lines of prompts."""

    samples: int
    logprobs: int
    scores: int


def _lines_of(packed: Ints) -> LogprobLines:
    """A copy of lines that are packed as sampling/logprobs.py says."""
    lines = packed.size // LINE_NUMBERS
    ids, logprobs, ranks = np.split(packed.copy(), [PLACES * lines, 2 * PLACES * lines])
    return LogprobLines(ids.reshape(lines, PLACES), logprobs.view(np.float32).reshape(lines, PLACES), ranks)


class SlotRing:
    """lookahead + 1 slots, handed out in turn."""

    def __init__(self, device: Device, count: int, sizes: SlotSizes) -> None:
        self.slots = [Slot(index, device, sizes) for index in range(count)]
        self.busy_seconds = 0.0
        self.wait_seconds = 0.0  # that the host waited for the device
        self._next = 0

    def acquire(self) -> Slot:
        """The next slot, free to be filled."""
        slot = self.slots[self._next]
        if slot.in_flight:
            raise InternalError(f"slot {slot.letter} is wanted for a new step while its last one is in flight")
        self._next = (self._next + 1) % len(self.slots)
        slot.in_flight = True
        return slot

    def collect(self, slot: Slot) -> Sampled:
        """Wait for the slot's step, book its compute time, free the slot and return what the step brought.

        Raises what Slot.collect raises. The slot is free then, too: nothing of its step is queued any more.
        """
        slot.in_flight = False
        begin = perf_counter()
        sampled = slot.collect()
        self.wait_seconds += perf_counter() - begin
        self.busy_seconds += slot.busy_seconds()
        return sampled

    def check_integrity(self, steps_in_flight: int) -> None:
        """Raise InternalError unless exactly the slots of the steps in flight are lent out."""
        if sum(slot.in_flight for slot in self.slots) != steps_in_flight:
            raise InternalError("the slots lent out are not those of the steps in flight")
