"""What becomes of an engine's process that can not be started, or is not wanted any more."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import subprocess
import weakref
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gapless.async_llm import AsyncLLM
from gapless.config import EngineConfig
from gapless.errors import EngineDeadError
from gapless.grammar.vocabulary import Vocabulary
from gapless.outputs import RequestOutput
from gapless.params import SamplingParams
from gapless.server import supervisor
from gapless.server.context import UnavailableError
from gapless.server.supervisor import Supervisor, start_message
from gapless.text import stops
from server.test_security import folder_of

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


@pytest.mark.slow
def test_nothing_of_an_engine_that_died_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Though somebody waited for each of 50 answers when it did."""
    monkeypatch.setattr(supervisor, "BACK_OFF_SECONDS", 0.0)
    config = EngineConfig(device="cpu", num_blocks=64, max_rows=8)
    folder = str(folder_of(tmp_path / "model"))
    start = start_message(folder, config, load="random", shape=None, tokenizer=None, timeline=10)

    async def wait_for(llm: AsyncLLM) -> None:
        with pytest.raises(EngineDeadError):
            async for _ in llm.generate([1, 2, 3], SamplingParams(max_tokens=500, ignore_eos=True)):
                pass

    async def main() -> bool:
        found = Supervisor(start)
        running = asyncio.create_task(found.run())
        while found.state != "ready":
            await asyncio.sleep(0.01)
        first, pid = weakref.ref(found.llm), found.pid
        waiting = [asyncio.create_task(wait_for(found.llm)) for _ in range(50)]
        await asyncio.sleep(0.2)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await asyncio.gather(*waiting)
        while found.state != "ready":
            await asyncio.sleep(0.01)
        assert found.pid != pid
        await asyncio.sleep(0.2)
        del waiting
        gc.collect()
        kept = first() is not None
        await found.close()
        await running
        return kept

    assert not asyncio.run(main())


def test_the_vocabulary_is_read_before_the_engine_is_ready(monkeypatch: pytest.MonkeyPatch):
    """So that the first request with a stop string or a form does not hold up everybody else."""
    config = EngineConfig(device="cpu", num_blocks=64, max_rows=8, max_model_len=128)
    start = start_message("demo", config, load="auto", shape=None, tokenizer=None, timeline=0)

    def late(*_: object) -> None:
        raise AssertionError("the vocabulary is read for a request")

    async def main() -> list[str]:
        found = Supervisor(start)
        running = asyncio.create_task(found.run())
        while found.state == "starting":
            await asyncio.sleep(0.01)
        monkeypatch.setattr(stops, "token_texts", late)
        monkeypatch.setattr(Vocabulary, "of", late)
        params = SamplingParams(max_tokens=3, stop=["zzz"]), SamplingParams(max_tokens=3, regex="[ab]{2}")
        texts = [(await one_answer(found.llm, each)).outputs[0].text for each in params]
        await found.close()
        await running
        return texts

    assert re.fullmatch("[ab]{2}", asyncio.run(main())[1])


async def one_answer(llm: AsyncLLM, params: SamplingParams) -> RequestOutput:
    return [each async for each in llm.generate("Once", params, output_kind="final")][-1]


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
