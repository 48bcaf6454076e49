"""What becomes of an engine's process that can not be started, or is not wanted any more."""

from __future__ import annotations

import asyncio
import subprocess
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from gapless.config import EngineConfig
from gapless.errors import EngineDeadError
from gapless.server import supervisor
from gapless.server.context import UnavailableError
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


def test_what_a_dying_engine_says_of_itself_is_not_told_to_who_asks_how_it_stands():
    async def main() -> None:
        found = Supervisor(START)
        answer: Future[Any] = Future()

        def ask(*_: object) -> Future[Any]:
            return answer

        answer.set_exception(EngineDeadError("the engine failed: RuntimeError: /home/someone/x.py at 0x7f00"))
        found._engine = SimpleNamespace(ask=ask)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        for asked in (found.stats, lambda: found.timeline(1), lambda: found.set_lookahead(0)):
            with pytest.raises(UnavailableError, match=r"^the (model|engine)[a-z ]*$"):
                await asked()

    asyncio.run(main())
