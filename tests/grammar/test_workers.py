"""Grammars that would never compile: each ends a process, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from frontend.tiny import tiny_engine
from gapless import LLM, SamplingParams
from gapless.errors import EngineDeadError, InvalidRequestError
from gapless.grammar.build import STACK
from gapless.grammar.compiler import MAX_JOBS, GrammarCompiler, source_of
from gapless.grammar.spec import GrammarSpec
from gapless.grammar.workers import WorkerError, Workers
from gapless.text.tokenizer import Tokenizer
from support.grammars import STOPS, V, allowed

LONG = 600.0  # seconds that no test waits for
HOSTILE = {"allOf": [{"type": "integer", "multipleOf": 9973}, {"type": "integer", "multipleOf": 9967}]}


def hostile(number: int = 0) -> GrammarSpec:
    """No limit of the library ends its search for a number that both divide."""
    spec = GrammarSpec.of(json_schema={"title": str(number), **HOSTILE})
    assert spec is not None
    return spec


def good() -> GrammarSpec:
    return GrammarSpec("regex", "ab|cd")


def children() -> list[int]:
    """Of this process, those included that have ended and nobody has waited for."""
    found: list[int] = []
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError):  # a thread that ended since
            found += map(int, path.read_text().split())
    return found


@pytest.fixture
def tokens(compiler: GrammarCompiler) -> bytes:
    return compiler.read_vocabulary().packed


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers(LONG)
    yield workers
    workers.close()


def test_hostile_grammars_in_a_row_leave_room_for_a_good_one(smollm: Tokenizer):
    compiler = GrammarCompiler(smollm, V, STOPS, seconds=0.5)
    for number in range(MAX_JOBS + 1):
        with pytest.raises(InvalidRequestError, match=r"longer than 0\.5 s to compile; make it smaller"):
            compiler.compile(hostile(number))
    assert allowed(compiler.compile(good()).matcher())
    compiler.close()


def test_hostile_grammars_at_the_same_time_keep_a_good_one_waiting_and_no_more(smollm: Tokenizer):
    compiler = GrammarCompiler(smollm, V, STOPS, seconds=2.0)
    with ThreadPoolExecutor(MAX_JOBS) as pool:
        asked = [pool.submit(compiler.compile, hostile(number)) for number in range(MAX_JOBS)]
        assert compiler.compile(good()).matcher().error is None
        for each in asked:
            with pytest.raises(InvalidRequestError, match="longer than 2 s"):
                each.result()
    compiler.close()


def test_a_worker_that_was_ended_is_replaced_before_the_next_grammar(tokens: bytes):
    workers = Workers(0.5)
    before = children()
    with pytest.raises(WorkerError) as caught:
        workers.check(tokens, source_of(hostile()))
    assert caught.value.late
    fresh = set(children()) - set(before)
    assert len(fresh) == 1
    assert workers.check(tokens, source_of(good())) == ""
    assert set(children()) - set(before) == fresh
    workers.close()


def test_a_grammar_that_takes_too_much_memory_is_told_apart(tokens: bytes):
    workers = Workers(LONG, STACK + (200 << 20))
    with pytest.raises(WorkerError) as caught:
        workers.check(tokens, source_of(hostile()))
    assert caught.value.killed
    assert not caught.value.late
    assert workers.check(tokens, source_of(good())) == ""
    workers.close()


def test_an_alarm_that_this_process_ignores_ends_a_worker(tokens: bytes):
    workers, before = Workers(0.5), signal.signal(signal.SIGALRM, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    try:
        with pytest.raises(WorkerError) as caught:
            workers.check(tokens, source_of(hostile()))
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        workers.close()
    assert caught.value.late


def test_a_worker_that_somebody_has_killed_is_replaced(workers: Workers, tokens: bytes):
    before = set(children())
    assert workers.check(tokens, source_of(good())) == ""
    [worker] = set(children()) - before
    os.kill(worker, signal.SIGKILL)
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
    assert workers.check(tokens, source_of(good())) == ""


def test_a_worker_that_has_answered_has_all_the_time_it_likes(tokens: bytes):
    quick, before = Workers(0.3), set(children())
    assert quick.check(tokens, source_of(good())) == ""
    [worker] = set(children()) - before
    slow = Workers(1.0)
    with pytest.raises(WorkerError):
        slow.check(tokens, source_of(hostile()))
    assert os.waitid(os.P_PID, worker, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    quick.close()
    slow.close()


def test_close_ends_what_is_being_compiled_and_leaves_no_process(smollm: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    compiler, begun, before = GrammarCompiler(smollm, V, STOPS, seconds=LONG), threading.Event(), children()
    check = Workers.check

    def watched(workers: Workers, tokens: bytes, source: str) -> str:
        begun.set()
        return check(workers, tokens, source)

    compiler.compile(good())
    monkeypatch.setattr(Workers, "check", watched)
    assert len(children()) == len(before) + 1
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(compiler.compile, hostile())
        begun.wait()
        compiler.close()
        with pytest.raises(EngineDeadError):
            asked.result()
    assert children() == before
    with pytest.raises(EngineDeadError):
        compiler.compile(GrammarSpec("regex", "new"))
    assert children() == before


def test_a_compiler_that_nobody_has_leaves_no_process(smollm: Tokenizer):
    before = children()
    compiler = GrammarCompiler(smollm, V, STOPS)
    assert children() == before
    compiler.compile(good())
    assert len(children()) == len(before) + 1
    del compiler
    assert children() == before


SCRIPT = """
import os, signal, sys, threading
from gapless.grammar.build import pack_tokens
from gapless.grammar.workers import Workers

print("begins")
workers, tokens = Workers(600.0), pack_tokens([bytes([i]) for i in range(256)] + [b""], 256, [])
assert workers.check(tokens, sys.argv[2]) == ""
print("has compiled", flush=True)
send = os.killpg if sys.argv[1] == "INT" else os.kill  # a terminal sends Ctrl-C to the whole group
threading.Timer(0.5, send, [os.getpid(), getattr(signal, "SIG" + sys.argv[1])]).start()
try:
    workers.check(tokens, sys.argv[3])
finally:
    print("ends", flush=True)
"""


@pytest.mark.parametrize(("how", "last"), [("INT", "ends"), ("TERM", "has compiled"), ("KILL", "has compiled")])
def test_a_worker_ends_with_its_process_however_that_ends(tmp_path: Path, how: str, last: str):
    """The worker has this pipe for its errors, so the pipe's end is the worker's."""
    script = tmp_path / "caller.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), how, source_of(good()), source_of(hostile())]
    done = subprocess.run(command, capture_output=True, start_new_session=True, timeout=60, check=False)
    assert done.returncode == -getattr(signal, f"SIG{how}")
    lines = done.stdout.decode().split("\n")[:-1]
    assert lines[-1] == last
    assert lines.count("begins") == 1  # a worker does not run its caller's script
    errors = done.stderr.decode()
    assert errors.count("KeyboardInterrupt") == 1 if how == "INT" else not errors


def test_other_requests_go_on_while_a_grammar_compiles(monkeypatch: pytest.MonkeyPatch):
    begun, check = threading.Event(), Workers.check

    def watched(workers: Workers, tokens: bytes, source: str) -> str:
        begun.set()
        return check(workers, tokens, source)

    monkeypatch.setattr(Workers, "check", watched)
    monkeypatch.setattr(GrammarCompiler.__init__, "__kwdefaults__", {"seconds": LONG, "cached": 64})
    before = children()
    with LLM.from_loaded(tiny_engine()) as llm, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(llm.generate, [[1, 2]], SamplingParams(json_schema=HOSTILE))
        begun.wait()
        [other] = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=20, ignore_eos=True))
        assert len(other.outputs[0].token_ids) == 20
        assert not asked.done()
        llm.loaded.forms.close()
        with pytest.raises(EngineDeadError):
            asked.result()
    assert children() == before
