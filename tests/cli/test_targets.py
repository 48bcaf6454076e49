"""Files to be written are tried before there is anything to lose, and an error of the disk names its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.conftest import Ran
from gapless.cli.targets import check_target
from gapless.errors import ConfigError

Gapless = Callable[..., Ran]
FULL = Path("/dev/full")


@pytest.mark.parametrize("content", [None, "", "earlier results\n"])
def test_a_file_that_can_be_written_is_left_as_it_is(tmp_path: Path, content: str | None):
    path = tmp_path / "file"
    if content is not None:
        path.write_text(content)
    check_target(path, "trace")
    assert (path.read_text() if path.exists() else None) == content


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_folder_in_which_no_file_can_be_made_is_refused_before_a_model_is_loaded(gapless: Gapless):
    with pytest.raises(ConfigError, match="the trace /proc/file may not be written: "):
        check_target(Path("/proc/file"), "trace")
    for option in ("--output", "--trace"):
        ran = gapless("generate", "--model", "./no-model", option, "/proc/file", "abc")
        assert ran.status == 2
        assert "/proc/file may not be written" in ran.err


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize("option", ["--output", "--trace"])
def test_a_full_disk_names_the_file(gapless: Gapless, options: list[str], tmp_path: Path, option: str):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "abc", "max_tokens": 1}) + "\n")
    ran = gapless("generate", *options, "--input", str(source), option, str(FULL))
    assert ran.status == 1
    assert ran.err == "gapless: error: [Errno 28] No space left on device: '/dev/full'\n"
