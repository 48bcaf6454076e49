"""`gapless serve` as a process of its own, for the time of a `with`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

KEY = "a-key-for-clients"
START_SECONDS = 120.0
END_SECONDS = 60.0
_LISTENING = re.compile(r"listening at (http://\S+);")


class ServingError(Exception):
    """The server did not start, or did not end as it should."""


@contextmanager
def serving(*argv: str) -> Generator[str]:
    """The URL of a server that is ready, on a free port and with KEY. SIGTERM ends it, and its status must be 0."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        command = [sys.executable, "-c", "from gapless.cli.main import main; main()", "serve", "--port", "0"]
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, "--api-key", KEY, *argv],
                stdin=subprocess.DEVNULL,
                stderr=file,
                env={"OMP_NUM_THREADS": "2", **os.environ},
            )
        try:
            yield _url(process, log)
            process.send_signal(signal.SIGTERM)
            status = process.wait(END_SECONDS)
        finally:
            process.kill()
            process.wait()
        if status != 0:
            raise ServingError(f"the server ended with status {status}:\n{_end_of(log)}")


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        found = _LISTENING.search(log.read_text())
        if found and _is_ready(found[1]):
            return found[1]
        time.sleep(0.1)
    raise ServingError(f"the server did not start:\n{_end_of(log)}")


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.HTTPError, OSError):
        return False


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-20:])
