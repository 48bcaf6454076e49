"""The examples of docs/clients.md, word for word but for the address and the key."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from support.server import RunningServer

PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()


def example(client: str) -> str:
    """The block behind **client**."""
    found = re.search(rf"\*\*{client}\*\*.*?\n```\w*\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def to(server: RunningServer, text: str) -> str:
    assert "http://127.0.0.1:8000" in text
    assert "SECRET" in text
    return text.replace("http://127.0.0.1:8000", server.url).replace("SECRET", "none")


def test_the_openai_client(demo_server: RunningServer, capsys: pytest.CaptureFixture[str]):
    code = to(demo_server, example("openai"))
    exec(compile(f"{code}\nstream.close()\nclient.close()", "docs/clients.md", "exec"), {})
    assert len(capsys.readouterr().out) > 20


def test_curl(demo_server: RunningServer):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = to(demo_server, example("curl"))
    done = subprocess.run(["bash", "-c", f"{command.rstrip()} -sS"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    events = [line for line in done.stdout.splitlines() if line]
    assert len(events) > 10
    assert all(line.startswith("data: ") for line in events)
    assert events[-1] == "data: [DONE]"
