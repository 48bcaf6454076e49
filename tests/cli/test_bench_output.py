"""What a measurement shows while it runs, and its tables."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gapless.cli.table import print_table


def test_a_table_is_right_aligned_without_the_columns_that_nobody_knows(capsys: pytest.CaptureFixture[str]):
    print_table(["a", "long\nname", "none", "some"], [["1.5", "2", "-", "-"], ["10.25", "3", "-", "4"]])
    assert capsys.readouterr().out.splitlines() == [
        "      long     ",
        "    a name some",
        "  1.5    2    -",
        "10.25    3    4",
    ]


@pytest.mark.parametrize(
    ("command", "runs"),
    [
        (["decode", "--requests", "2", "--new-tokens", "4"], ["lookahead 0, run 1 of 2", "lookahead 1, run 2 of 2"]),
        (["prefill", "--prompt-len", "8", "--tokens", "16"], ["prompts of 8, run 1 of 2", "prompts of 8, run 2 of 2"]),
        (
            ["mixed", "--requests", "2", "--rate", "inf", "--max-prompt-len", "8", "--max-new-tokens", "4"],
            ["lookahead 0, run 1 of 2", "lookahead 1, run 2 of 2"],
        ),
    ],
)
def test_a_terminal_shows_what_is_measured_before_it_is_and_then_each_run(
    model: Path, command: list[str], runs: list[str]
):
    ours, theirs = pty.openpty()
    options = ["--shape", str(model / "config.json"), "--device", "cpu", "--repeat", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gapless", "bench", *command, *options], stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    finally:
        process.wait(timeout=60)
        os.close(ours)
    lines = seen.decode().splitlines()
    assert process.returncode == 0, lines
    assert re.match("gapless: loading .* [.]{3}", lines[0])
    assert lines[1].startswith(f"{command[0]}: ")
    assert lines[2].startswith("gapless: warm-up")
    places = [lines.index(f"gapless: {run}") for run in runs]
    assert places == sorted(places)
    assert max(places) < next(place for place, line in enumerate(lines) if line.startswith("$ gapless bench"))
    assert max(len(line) for line in lines if "seconds" in line or "TTFT p50" in line) <= 80
