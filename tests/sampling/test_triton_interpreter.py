"""The Triton sampler's own arithmetic, without a GPU: interpreted in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_interpreted_kernels_choose_the_reference_tokens():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpreted_sampler.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "agreed on" in done.stdout
