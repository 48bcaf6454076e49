"""What went wrong on one stream, and whom it concerns, as base.py has it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gapless.errors import OutOfMemoryError

# What torch, CUDA and its libraries say where they raise a plain RuntimeError.
_SAYINGS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

# CUDA's and HIP's words for faults after which every later call of the process fails in the same way.
_LASTING = (
    "device-side assert",
    "illegal memory access",
    "illegal instruction",
    "illegal address",
    "misaligned address",
    "invalid program counter",
    "launch failure",
    "hardware stack error",
    "ECC error",
)


def ruins_process(error: BaseException) -> bool:
    """Whether this error means that the GPU is lost to the process, and not only to the engine that met it."""
    return isinstance(error, RuntimeError) and any(saying in str(error) for saying in _LASTING)


def as_out_of_memory(error: BaseException) -> OutOfMemoryError | None:
    """A fresh OutOfMemoryError if that is what this error means: one whose traceback keeps no tensor alive."""
    if isinstance(error, (OutOfMemoryError, MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(saying in str(error) for saying in _SAYINGS)
    ):
        return OutOfMemoryError(str(error) or type(error).__name__)
    return None


class Faults:
    """The error of one stream's work. A stream calls it in the order of its queue."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def run(self, work: Callable[[], None]) -> None:
        """Run a piece of work, or skip it after an error, and keep what it raises."""
        if self.error is None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the stream
                self.error = as_out_of_memory(error) or error

    def inherit(self, error: BaseException | None) -> None:
        """A wait for an event that told this error, if any. One that stays goes over one that passes."""
        if self.error is None or (error is not None and isinstance(self.error, OutOfMemoryError)):
            self.error = error

    def recover(self) -> None:
        """Forget having run out of memory."""
        if isinstance(self.error, OutOfMemoryError):
            self.error = None
