"""Waiting for another thread or process without a signal from it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

DEADLINE_SECONDS = 60.0


def eventually(holds: Callable[[], bool]) -> None:
    """Return once it holds; fail if it does not for a long time."""
    deadline, pause = time.monotonic() + DEADLINE_SECONDS, threading.Event()
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        pause.wait(0.001)
