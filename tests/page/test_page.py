"""The page in Chromium, before `gapless serve` with the demo model and an API key: drive.mjs does it.

Needs node, Chromium (CHROMIUM, else /usr/bin/chromium) and playwright-core, in PAGE_TOOLS/node_modules: `make page`
brings it. With axe-core beside it the page is checked for people who see or point badly, too. PAGE_SHOTS names a folder
for screenshots.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.waiting import eventually

SCRIPT = Path(__file__).with_name("drive.mjs")
CHECKS = re.findall(r'^  async "(.*)"\(\) \{$', SCRIPT.read_text(), re.M)
KEY = "sesame"
SECONDS = 560.0
Results = dict[str, str | None]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tools() -> Path:
    found = Path(os.environ.get("PAGE_TOOLS", "."))
    chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not (found / "node_modules/playwright-core").is_dir():
        pytest.skip("PAGE_TOOLS names no folder with playwright-core in node_modules: see `make page`")
    if not Path(chromium).exists():
        pytest.skip(f"there is no Chromium at {chromium}")
    return found


@pytest.fixture(scope="module")
def server(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Its address and its process."""
    log = tmp_path_factory.mktemp("page") / "server.log"
    command = [sys.executable, "-c", "from gapless.cli.main import main; main()", "serve", "--port", "0"]
    with log.open("w") as output:
        process = subprocess.Popen([*command, "--api-key", KEY, "--max-rows", "16"], stdout=output, stderr=output)

    def found() -> str | None:
        address = re.search(r"listening at (http://\S+);", log.read_text())
        return address[1] if address else None

    try:
        eventually(lambda: found() is not None or process.poll() is not None)
        address = found()
        assert address is not None, log.read_text()
        eventually(lambda: httpx.get(f"{address}/ready").status_code == 200)
        yield address, process.pid
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def results(tools: Path, server: tuple[str, int]) -> Results:
    """Of each check: None, or what went wrong."""
    shots = os.environ.get("PAGE_SHOTS", "")
    command = ["node", str(SCRIPT), server[0], str(server[1]), KEY, str(tools.resolve()), shots]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("check", CHECKS)
def test_page(results: Results, check: str):
    assert results[check] is None, results[check]
