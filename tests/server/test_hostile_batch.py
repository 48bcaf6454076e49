"""Batch files on a full disk, and lines that only some stacks can read."""

from __future__ import annotations

import json
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gapless.errors import InputFileError
from gapless.server.batch import MAX_DEPTH, _write, read_batch  # pyright: ignore[reportPrivateUsage]


@contextmanager
def files_of_at_most(size: int) -> Generator[None]:
    """A disk that has room for no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_that_does_not_fit_leaves_nothing_that_the_next_one_is_added_to(tmp_path: Path):
    path = tmp_path / "out"
    with path.open("ab", buffering=0) as file:
        _write(file, {"custom_id": "first"})
        with files_of_at_most(40), pytest.raises(OSError, match="out"):
            _write(file, {"custom_id": "second", "text": "x" * 100})
        _write(file, {"custom_id": "third"})
    assert [json.loads(line)["custom_id"] for line in path.read_text().splitlines()] == ["first", "third"]


def nested(path: Path, levels: int) -> Path:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "PLACE"}}
    deep = "[" * (levels - 2) + "]" * (levels - 2)
    path.write_text(json.dumps(line).replace('"PLACE"', deep))
    return path


def test_a_line_is_nested_too_deep_whoever_reads_it(tmp_path: Path):
    """json's own limit is that of the stack, which is higher where the file is checked than where it is answered."""
    assert len(list(read_batch(nested(tmp_path / "deep", MAX_DEPTH)))) == 1
    for levels in (MAX_DEPTH + 1, 900, 100_000):
        with pytest.raises(InputFileError, match=r"^line 1 of .*: it is (nested deeper than|not JSON)"):
            list(read_batch(nested(tmp_path / "deeper", levels)))
