"""What becomes of an engine's process that can not be started, or is not wanted any more."""

from __future__ import annotations

import asyncio
import subprocess
from typing import Any

import pytest

from gapless.config import EngineConfig
from gapless.errors import EngineDeadError
from gapless.server import supervisor
from gapless.server.supervisor import Supervisor, start_message

START = start_message("none", EngineConfig(), load="auto", shape=None, tokenizer=None, timeline=0)


def test_a_process_that_can_not_be_started_is_the_end_and_said(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    dead: list[bool] = []

    async def main() -> Supervisor:
        found = Supervisor(START, on_dead=lambda: dead.append(True))
        await found.run()
        return found

    found = asyncio.run(main())
    assert (found.state, dead) == ("dead", [True])
    assert isinstance(found.error, EngineDeadError)
    assert "Too many open files" in str(found.error)


def test_one_that_is_closed_between_two_lives_starts_no_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "BACK_OFF_SECONDS", 0.05)
    dead: list[bool] = []
    lives: list[bool] = []

    async def main() -> None:
        found = Supervisor(START, on_dead=lambda: dead.append(True))

        async def live_once() -> bool:
            lives.append(True)
            return True

        found._live_once = live_once  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        running = asyncio.create_task(found.run())
        while found.state != "restarting":
            await asyncio.sleep(0)
        await found.close()
        await running

    asyncio.run(main())
    assert lives == [True]
    assert not dead
