"""Masks are filled on a thread of their own, in the slot's buffer, each in the line that its entry names."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from gapless.device.cpu import CpuDevice
from gapless.engine.masking import NO_MASK, Masking
from gapless.engine.slots import Slot, SlotSizes
from gapless.errors import InternalError

WORDS = 3


@dataclass(eq=False)
class Summing:
    """Allows the token that is the sum of what it was told."""

    told: list[int] = field(default_factory=list[int])
    error: str | None = None
    thread: str = ""

    def accept(self, token_id: int) -> None:
        self.told.append(token_id)

    def fill(self, mask_W: NDArray[np.int32]) -> None:
        self.thread = threading.current_thread().name
        mask_W[:] = 0
        mask_W[sum(self.told) // 32] = 1 << sum(self.told) % 32


class Failing(Summing):
    def fill(self, mask_W: NDArray[np.int32]) -> None:
        mask_W[:] = -1
        self.error = "it can not go on"


class Broken(Summing):
    def fill(self, mask_W: NDArray[np.int32]) -> None:
        raise ZeroDivisionError


class Together(Summing):
    """Takes many at a time."""

    calls = 0

    @staticmethod
    def fill_many(
        accepts: Sequence[tuple[Together, int]], fills: Sequence[tuple[Together, int]], mask_MW: NDArray[np.int32]
    ) -> None:
        Together.calls += 1
        for masks, token in accepts:
            masks.accept(token)
        for masks, line in fills:
            masks.fill(mask_MW[line])


@pytest.fixture
def masking() -> Iterator[Masking]:
    masking = Masking()
    yield masking
    masking.close()


@pytest.fixture
def slot() -> Slot:
    slot = Slot(0, CpuDevice(), SlotSizes(inputs=1, samples=6, mask_words=WORDS))
    slot.masks[:] = 77
    return slot


def mask_of(slot: Slot, samples: int, line: int) -> list[int]:
    """The tokens that a line allows."""
    begin = samples + line * WORDS
    bits = np.unpackbits(slot.masks[begin : begin + WORDS].view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def test_tokens_come_before_masks_and_each_entry_gets_its_own(masking: Masking, slot: Slot):
    one, other, many, silent = Summing(), Summing(), Together(), Summing()
    Together.calls = 0
    accepted = [(one, 5), (many, 40), (one, 30), (silent, 1), (many, 10)]
    masking.begin(accepted, [(3, 11, one), (0, 12, many), (1, 13, other)], slot, 5)
    numbers, failures = masking.wait()
    assert (numbers, failures) == (5 + 3 * WORDS, [])
    assert slot.masks[:5].tolist() == [1, 2, NO_MASK, 0, NO_MASK]
    assert [mask_of(slot, 5, line) for line in range(3)] == [[35], [50], [0]]
    assert (slot.masks[numbers:] == 77).all()
    assert silent.told == [1]
    assert Together.calls == 1
    assert one.thread.startswith("gapless-masks")


def test_a_step_may_need_no_mask(masking: Masking, slot: Slot):
    masking.begin([], [], slot, 4)
    assert masking.wait() == (4, [])
    assert (slot.masks[:4] == NO_MASK).all()


def test_what_fails_allows_nothing_and_is_named(masking: Masking, slot: Slot):
    masking.begin([], [(0, 21, Failing()), (1, 22, Summing())], slot, 2)
    assert masking.wait()[1] == [(21, "it can not go on")]
    assert [mask_of(slot, 2, line) for line in range(2)] == [[], [0]]


def test_an_error_of_ours_comes_out_of_wait(masking: Masking, slot: Slot):
    masking.begin([], [(0, 1, Broken())], slot, 2)
    with pytest.raises(ZeroDivisionError):
        masking.wait()
    masking.begin([], [(0, 1, Summing())], slot, 2)
    masking.wait()


def test_begin_returns_before_the_work_is_done(masking: Masking, slot: Slot):
    go = threading.Event()

    class Slow(Summing):
        def fill(self, mask_W: NDArray[np.int32]) -> None:
            go.wait()
            super().fill(mask_W)

    masking.begin([], [(0, 1, Slow())], slot, 2)
    go.set()
    masking.wait()


def test_wrong_use_is_an_internal_error(masking: Masking, slot: Slot):
    with pytest.raises(InternalError, match="no masks to wait for"):
        masking.wait()
    masking.begin([], [], slot, 2)
    with pytest.raises(InternalError, match="nobody has waited"):
        masking.begin([], [], slot, 2)
    masking.wait()
