"""What went wrong on one stream, and whom it concerns, as base.py has it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gapless.errors import OutOfMemoryError

# What torch, CUDA and its libraries say where they raise a plain RuntimeError.
_SAYINGS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def as_out_of_memory(error: BaseException) -> OutOfMemoryError | None:
    """A fresh OutOfMemoryError if that is what this error means: one whose traceback keeps no tensor alive."""
    if isinstance(error, (OutOfMemoryError, MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(saying in str(error) for saying in _SAYINGS)
    ):
        return OutOfMemoryError(str(error) or type(error).__name__)
    return None


class Faults:
    """The errors of one stream's work. A stream calls it in the order of its queue."""

    def __init__(self) -> None:
        self._fatal: BaseException | None = None
        self._passing: OutOfMemoryError | None = None  # of work that ran or was skipped; the next record carries it
        self._inherited: OutOfMemoryError | None = None  # for it the next work is skipped

    def run(self, work: Callable[[], None]) -> None:
        """Run a piece of work, or skip it after an error, and keep what it raises."""
        self._passing, self._inherited = self._passing or self._inherited, None
        if self._fatal is None and self._passing is None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the stream
                self._passing = as_out_of_memory(error)
                self._fatal = error if self._passing is None else None

    def carried(self) -> BaseException | None:
        """What a record that is reached now tells."""
        error = self._fatal or self._passing or self._inherited
        self._passing = None
        return error

    def inherit(self, error: BaseException | None) -> None:
        """A wait for an event that told this error, if any."""
        if isinstance(error, OutOfMemoryError):
            self._inherited = error
        else:
            self._fatal = self._fatal or error
