"""Files of requests and results: checked before a model is loaded, written a whole line at a time."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from gapless.cli.jobs import LineReader
from gapless.cli.signals import held_back
from gapless.errors import ConfigError, InputFileError
from gapless.outputs import RequestOutput

STANDARD = "-"


def check_files(source: str | None, target: str | None) -> None:
    """Whether input and output can be what was asked, before a model is loaded. Raises InputFileError, ConfigError."""
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


class ResultWriter:
    """Writes one JSON object a line, at once and whole: a signal waits for the end of the line and its count."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.on_screen = file.isatty()
        self.written = 0

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
def open_results(target: str) -> Generator[ResultWriter]:
    """The output file, emptied, or stdout."""
    if target == STANDARD:
        yield ResultWriter(sys.stdout.buffer)
        return
    with Path(target).open("wb") as file:
        yield ResultWriter(file)


def open_lines(source: str) -> LineReader:
    """The input file, or stdin through a descriptor of our own: a thread may hang in it when the program ends."""
    return LineReader(os.fdopen(os.dup(0), "rb") if source == STANDARD else Path(source).open("rb"))


def _head(index: int, given_id: object) -> dict[str, object]:
    return {"index": index} if given_id is None else {"index": index, "id": given_id}
