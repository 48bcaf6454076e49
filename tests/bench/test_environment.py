"""What a figure is quoted with."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gapless.bench.environment import GPU_FACTS, commit, environment, parse_gpu_facts, quoted_with


def test_a_file_outside_of_git_has_no_commit(tmp_path: Path):
    assert commit(tmp_path / "file.py") is None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_changed_file_is_told_from_the_commit_and_an_untracked_one_has_none(tmp_path: Path):
    def git(*argv: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *argv], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    file = tmp_path / "file.py"
    file.write_text("1")
    git("add", "file.py")
    git("commit", "-q", "--no-verify", "-m", "one")
    found = commit(file)
    assert found is not None
    assert git("rev-parse", "HEAD").startswith(found)
    file.write_text("2")
    assert commit(file) == found + "-dirty"
    (tmp_path / "other.py").write_text("")
    assert commit(tmp_path / "other.py") is None


def test_the_facts_of_nvidia_smi_have_names():
    facts = parse_gpu_facts("1980 MHz, 2619 MHz, 1980 MHz, 700.00 W, 580.159.04\n")
    assert list(facts) == list(GPU_FACTS)
    assert facts["clocks.mem"] == "2619 MHz"
    assert facts["driver_version"] == "580.159.04"


def test_a_figure_is_quoted_with_device_versions_and_command():
    facts = environment("the device", torch.device("cpu"))
    device, command = quoted_with(facts).splitlines()
    assert device.startswith("the device, ")
    assert f"torch {torch.__version__}" in device
    assert command == "$ " + facts["command"]
