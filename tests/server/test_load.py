"""A short form of scripts/load.py: clients of all kinds at once, and an engine that is killed among them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "load.py"
SERVER = ["--", "--max-rows", "8", "--num-blocks", "48"]


@pytest.mark.slow
def test_under_load_and_a_kill_nothing_hangs_is_mixed_up_or_kept():
    """`failures` has what is wrong: hangs, foreign markers, statuses, broken streams, what is not given back,
    counters that differ from what the clients saw, and whatever the server logged as a defect."""
    options = ["--tiny", "--clients", "24", "--minutes", "0.17", "--seed", "1", "--health-seconds", "60"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options, *SERVER], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["failures"] == []
    assert done.returncode == 0
    [kill] = report["kills"]
    assert kill["ready_after"] > 0
    assert report["errors_around_kills"]["within_a_stream"] > 0
    assert sum(report["finish_reasons"].values()) > 50
    assert report["left_by_clients"] > 5
    assert sum(report["statuses"].get(status, 0) for status in ("400", "401", "404", "413", "415")) > 10
    assert report["requests"]["slow reader"] > 0
