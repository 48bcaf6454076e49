"""Files of requests and results: checked before a model is loaded, written a whole line at a time."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from gapless.cli.jobs import LineReader
from gapless.cli.setup import warn
from gapless.cli.signals import held_back
from gapless.errors import ConfigError, InputFileError
from gapless.outputs import RequestOutput

STANDARD = "-"
_BEGIN = b'{"index": '


@dataclass(frozen=True, slots=True)
class Kept:
    """What an output holds from an earlier run.

    indexes  lines of the input that are answered, with an error or without
    failed   how many of them with an error
    size     bytes up to the end of the last whole line
    """

    indexes: set[int] = field(default_factory=set[int])
    failed: int = 0
    size: int = 0

    @property
    def lines(self) -> int:
        """How many lines the input has at least."""
        return max(self.indexes, default=-1) + 1


def check_files(source: str | None, target: str | None, *, resume: bool = False, overwrite: bool = False) -> Kept:
    """Whether input and output can be what was asked, before a model is loaded; and what of the output is kept.

    Raises InputFileError, ConfigError.
    """
    if source is not None and source != STANDARD:
        path = Path(source)
        if not path.exists():
            raise InputFileError(f"there is no input file {path}")
        if path.is_dir():
            raise InputFileError(f"the input {path} is a folder, not a file")
        if not os.access(path, os.R_OK):
            raise InputFileError(f"the input file {path} may not be read")
    if target is not None and target != STANDARD:
        path = Path(target)
        if path.is_dir():
            raise ConfigError(f"the output {path} is a folder, not a file")
        if not path.parent.is_dir():
            raise ConfigError(f"there is no folder {path.parent} for the output file")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(f"the output file {path} may not be written")
        if source is not None and source != STANDARD and path.exists() and path.samefile(source):
            raise ConfigError(f"{path} is both input and output: that would destroy the input")
    if resume and overwrite:
        raise ConfigError("--resume keeps the answers and --overwrite drops them: give one of them")
    if resume and (source is None or target is None or target == STANDARD):
        raise ConfigError("--resume goes on with a file of answers: it needs --input and --output FILE")
    if target is None or target == STANDARD or overwrite or not Path(target).exists():
        return Kept()
    if resume:
        return read_kept(Path(target))
    if Path(target).stat().st_size:
        more = "--resume to add the answers it does not have, or " if source is not None else ""
        raise ConfigError(f"the output {target} is not empty: give {more}--overwrite")
    return Kept()


def read_kept(path: Path) -> Kept:
    """The lines of an output, a broken last one left out. Raises ConfigError if anything else is no answer of ours."""
    if not path.is_file():
        raise ConfigError(f"--resume: {path} is not a regular file")
    indexes, failed, size = set[int](), 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and line.startswith(_BEGIN[: len(line)]):
                warn(f"line {number} of {path} is broken off: it is dropped")
                break
            record = _record(line)
            if record is None or record["index"] in indexes:
                raise ConfigError(
                    f"--resume: line {number} of {path} is no answer of gapless generate, or a second one"
                )
            indexes.add(record["index"])
            failed += "error" in record
            size += len(line)
    return Kept(indexes, failed, size)


def _record(line: bytes) -> dict[str, Any] | None:
    """What ResultWriter wrote, None if it did not."""
    try:
        value: object = json.loads(line) if line.startswith(_BEGIN) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    record = cast("dict[str, Any]", value)
    return record if type(record["index"]) is int and ("token_ids" in record or "error" in record) else None


class ResultWriter:
    """Writes one JSON object a line, at once and whole: a signal waits for the end of the line and its count."""

    def __init__(self, file: BinaryIO, written: int = 0) -> None:
        self._file = file
        self.on_screen = file.isatty()
        self.written = written

    def result(self, index: int, given_id: object, output: RequestOutput) -> None:
        answer = output.outputs[0]
        self._write(
            {
                **_head(index, given_id),
                "text": answer.text,
                "token_ids": answer.token_ids,
                "finish_reason": answer.finish_reason,
                "usage": asdict(output.usage),
            }
        )

    def error(self, index: int, given_id: object, line: int | None, reason: str) -> None:
        where: dict[str, object] = {} if line is None else {"line": line}
        self._write({**_head(index, given_id), **where, "error": reason})

    def _write(self, record: dict[str, object]) -> None:
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with held_back():
            while line:
                line = line[self._file.write(line) :]  # an unbuffered stdout takes a part when a signal comes
            self._file.flush()
            self.written += 1


@contextlib.contextmanager
def open_results(target: str, kept: Kept) -> Generator[ResultWriter]:
    """The output file, with what is kept of it, or stdout."""
    if target == STANDARD:
        yield ResultWriter(sys.stdout.buffer)
        return
    with Path(target).open("ab" if kept.size else "wb") as file:
        if kept.size:
            file.truncate(kept.size)
        yield ResultWriter(file, len(kept.indexes))


def open_lines(source: str) -> LineReader:
    """The input file, or stdin through a descriptor of our own: a thread may hang in it when the program ends."""
    return LineReader(os.fdopen(os.dup(0), "rb") if source == STANDARD else Path(source).open("rb"))


def _head(index: int, given_id: object) -> dict[str, object]:
    return {"index": index} if given_id is None else {"index": index, "id": given_id}
