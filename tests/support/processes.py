"""Child processes of a test, none of which outlives it."""

from __future__ import annotations

import subprocess
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import AnyStr


@contextmanager
def killed_after(process: subprocess.Popen[AnyStr]) -> Generator[subprocess.Popen[AnyStr]]:
    """The process; where the block ends it is killed, if it still runs, and its pipes are closed."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what was written and not read
                    pipe.close()


def lines_in(path: Path) -> int:
    """Whole lines of such a file."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def size_of(path: Path) -> int:
    """Bytes of a file that another process writes, 0 where there is none: it may be tried and taken away at first."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
