"""Short forms of scripts/load.py: clients of all kinds at once, and an engine that is killed among them; a crowd."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "load.py"
SERVER = ["--", "--max-rows", "8", "--num-blocks", "48"]


def run_load(*options: str) -> tuple[int, dict[str, Any]]:
    """The exit status and the report."""
    command = [sys.executable, str(SCRIPT), "--tiny", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
def test_under_load_and_a_kill_nothing_hangs_is_mixed_up_or_kept():
    """`failures` has what is wrong: hangs, foreign markers, statuses, broken streams, what is not given back,
    counters that differ from what the clients saw, and whatever the server logged as a defect."""
    status, report = run_load("--clients", "24", "--minutes", "0.17", "--seed", "1", "--health-seconds", "60", *SERVER)
    assert report["failures"] == []
    assert status == 0
    [kill] = report["kills"]
    assert kill["ready_after"] > 0
    assert report["errors_around_kills"]["within_a_stream"] > 0
    assert sum(report["finish_reasons"].values()) > 50
    assert report["left_by_clients"] > 5
    assert sum(report["statuses"].get(status, 0) for status in ("400", "401", "404", "413", "415")) > 10
    assert report["requests"]["slow reader"] > 0


@pytest.mark.slow
def test_a_crowd_of_streams_is_open_at_once_and_each_gets_its_answer():
    """So many tokens that none has ended before the last has begun."""
    options = ["--crowd", "200", "--crowd-tokens", "800", "--health-seconds", "60", "--", "--num-blocks", "12000"]
    status, report = run_load(*options)
    assert report["failures"] == []
    assert status == 0
    assert report["most_open"] == 200
    assert report["statuses"] == {"200": 200}
    assert report["finish_reasons"] == {"length": 200}
