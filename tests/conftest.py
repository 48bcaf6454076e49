"""What all tests share."""

from __future__ import annotations

import os
import signal

import pytest

from support.effort import THOROUGH
from support.interpreted import look_for_builtins_once

if os.environ.get("TRITON_INTERPRET") == "1":
    look_for_builtins_once()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not THOROUGH:
        rare = [item for item in items if item.get_closest_marker("thorough")]
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=rare)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Children of a process that ignores Ctrl-C, as a shell's background jobs do, ignore it too, and tests send it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
