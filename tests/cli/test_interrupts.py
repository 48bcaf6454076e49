"""Ctrl-C ends every command with one line and status 130, from the first import on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WHILE_IMPORTING = """
import os, signal, sys
from importlib.abc import MetaPathFinder

class Interrupts(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
from gapless.cli.main import main
main(["env"])
"""

WHERE_NO_EXCEPTION_LEAVES = """
import signal, sys
from gapless.cli import main as entry

class Last:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def fill(before=entry._fill_closed_streams):
    before()
    Last()
    signal.pause()  # until the interrupt comes again

entry._fill_closed_streams = fill
entry.main(["env"])
"""

INTERRUPTS_ITSELF = """
import os, signal, sys, threading
from gapless.cli.main import main

def watch():
    looks = threading.Event()
    while not any(each.name == 'gapless-engine' for each in threading.enumerate()):
        looks.wait(0.01)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=watch, daemon=True).start()
main(sys.argv[1:])
"""


def run(script: str, *argv: str) -> tuple[int, str]:
    """Exit status and stderr."""
    command = [sys.executable, "-c", script, *argv]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("module", ["typer", "numpy", "gapless.cli.bench"])
def test_while_the_program_is_imported(module: str):
    assert run(WHILE_IMPORTING.format(module=module)) == (130, "gapless: interrupted\n")


def test_in_a_finaliser():
    assert run(WHERE_NO_EXCEPTION_LEAVES) == (130, "gapless: interrupted\n")


def test_in_an_answer_to_a_prompt(options: list[str]):
    argv = ["generate", *options, "--ignore-eos", "--max-tokens", "60000", "abc"]
    assert run(INTERRUPTS_ITSELF, *argv) == (130, "gapless: interrupted\n")


def test_in_a_measurement(model: Path):
    argv = ["bench", "decode", "--shape", str(model / "config.json"), "--device", "cpu", "--requests", "2"]
    assert run(INTERRUPTS_ITSELF, *argv, "--new-tokens", "60000") == (130, "gapless: interrupted\n")
