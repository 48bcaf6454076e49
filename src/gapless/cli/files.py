"""Files of requests and results: checked before a model is loaded, written a whole line at a time."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Generator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, cast

from gapless.cli.jobs import BadLineError, Line, LineReader, lines_of, parse_line
from gapless.cli.setup import warn
from gapless.cli.signals import held_back
from gapless.cli.targets import check_target, naming
from gapless.errors import ConfigError, InputFileError
from gapless.outputs import CompletionOutput, RequestOutput, TokenLogprob
from gapless.params import SamplingParams

STANDARD = "-"
_BEGIN = b'{"index": '


@dataclass(frozen=True, slots=True)
class Kept:
    """What an output holds from an earlier run.

    ids     of the lines of the input that are answered, by their index; None for a line without
    failed  indexes of those with an error
    size    bytes up to the end of the last whole line
    """

    ids: dict[int, object] = field(default_factory=dict[int, object])
    failed: set[int] = field(default_factory=set[int])
    size: int = 0

    @property
    def lines(self) -> int:
        """How many lines the input has at least."""
        return max(self.ids, default=-1) + 1

    def check(self, line: Line, given_id: object, *, bad: bool) -> None:
        """Whether the answer to this line, if there is one, can be its own. Raises ConfigError."""
        if line.index not in self.ids:
            return
        other = self.ids[line.index]
        if other != given_id:
            raise ConfigError(
                f"--resume: line {line.number} of the input has the id {given_id!r}, its answer in the output has "
                f"{other!r}: they are of two different inputs"
            )
        if bad and line.index not in self.failed:
            raise ConfigError(
                f"--resume: line {line.number} of the input is no request, but the output has an answer to it: they "
                "are of two different inputs"
            )


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
        check_target(path, "output")
        if source is not None and source != STANDARD and path.exists() and path.samefile(source):
            raise ConfigError(f"{path} is both input and output: that would destroy the input")
    if resume and overwrite:
        raise ConfigError("--resume keeps the answers and --overwrite drops them: give one of them")
    if resume and (source is None or target is None or target == STANDARD):
        raise ConfigError("--resume goes on with a file of answers: it needs --input and --output FILE")
    if target is None or target == STANDARD or overwrite or not Path(target).exists():
        return Kept()
    if resume:
        kept = read_kept(Path(target))
        if source is not None and Path(source).is_file():
            _check_kept(kept, Path(source))
        return kept
    if Path(target).stat().st_size:
        more = "--resume to add the answers it does not have, or " if source is not None else ""
        raise ConfigError(f"the output {target} is not empty: give {more}--overwrite")
    return Kept()


def read_kept(path: Path) -> Kept:
    """The lines of an output, a broken last one left out. Raises ConfigError if anything else is no answer of ours."""
    if not path.is_file():
        raise ConfigError(f"--resume: {path} is not a regular file")
    ids, failed, size = dict[int, object](), set[int](), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and line.startswith(_BEGIN[: len(line)]):
                warn(f"line {number} of {path} is broken off: it is dropped")
                break
            record = _record(line)
            if record is None or record["index"] in ids:
                raise ConfigError(
                    f"--resume: line {number} of {path} is no answer of gapless generate, or a second one"
                )
            ids[record["index"]] = record.get("id")
            if "error" in record:
                failed.add(record["index"])
            size += len(line)
    return Kept(ids, failed, size)


def _check_kept(kept: Kept, source: Path) -> None:
    """Whether the answers can be those to this input. Raises ConfigError."""
    count = 0
    with source.open("rb") as stream:
        for line in lines_of(stream):
            count += 1
            if line.index in kept.ids:
                try:
                    _, given_id = parse_line(line.data, SamplingParams())
                except BadLineError as error:
                    kept.check(line, error.given_id, bad=True)
                else:
                    kept.check(line, given_id, bad=False)
    if count < kept.lines:
        raise ConfigError(f"--resume: the output has answers to {kept.lines} lines or more, the input has {count}")


def count_lines(source: str) -> int | None:
    """How many requests an input has; None if it can be read once only."""
    if not Path(source).is_file():
        return None
    with Path(source).open("rb") as stream:
        return sum(1 for _ in lines_of(stream))


def _record(line: bytes) -> dict[str, Any] | None:
    """What ResultWriter wrote, None if it did not."""
    try:
        value: object = json.loads(line) if line.startswith(_BEGIN) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    record = cast("dict[str, Any]", value)
    answered = not record.keys().isdisjoint(("token_ids", "outputs", "error"))
    return record if type(record["index"]) is int and answered else None


class ResultWriter:
    """Writes one JSON object a line, at once and whole: a signal waits for the end of the line and its count."""

    def __init__(self, file: BinaryIO | FileIO, written: int = 0) -> None:
        self._file = file
        self.on_screen = file.isatty()
        self.written = written

    def result(self, index: int, given_id: object, output: RequestOutput) -> None:
        answers = [_answer(each) for each in output.outputs]
        scores = output.prompt_logprobs
        error = first_error(output)
        self._write(
            {
                **_head(index, given_id),
                **(answers[0] if len(answers) == 1 else {"outputs": answers}),
                **({} if scores is None else {"prompt_logprobs": [each and _logprob(each) for each in scores]}),
                "usage": {  # not what the prefix cache had: a resumed run would say something else
                    "prompt_tokens": output.usage.prompt_tokens,
                    "completion_tokens": output.usage.completion_tokens,
                },
                **({} if error is None else {"error": error}),
            }
        )

    def error(self, index: int, given_id: object, line: int | None, reason: str) -> None:
        where: dict[str, object] = {} if line is None else {"line": line}
        self._write({**_head(index, given_id), **where, "error": reason})

    def _write(self, record: dict[str, object]) -> None:
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with held_back(), naming(self._file.name):
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
    with Path(target).open("ab" if kept.size else "wb", buffering=0) as file:  # what a full disk refuses is not kept
        if kept.size:
            file.truncate(kept.size)
        yield ResultWriter(file, len(kept.ids))


def open_lines(source: str) -> LineReader:
    """The input file, or stdin through a descriptor of our own: a thread may hang in it when the program ends."""
    return LineReader(os.fdopen(os.dup(0), "rb") if source == STANDARD else Path(source).open("rb"))


def first_error(output: RequestOutput) -> str | None:
    """What is wrong with the first answer that ended by an error."""
    return next((each.error or "unknown" for each in output.outputs if each.finish_reason == "error"), None)


def _answer(answer: CompletionOutput) -> dict[str, object]:
    found: dict[str, object] = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
    }
    if answer.stop_reason is not None:
        found["stop_reason"] = answer.stop_reason
    if answer.logprobs is not None:
        found["logprobs"] = [_logprob(each) for each in answer.logprobs]
    if answer.error is not None:
        found["error"] = answer.error
    return found


def _logprob(found: TokenLogprob) -> dict[str, object]:
    """JSON has no infinity: what the model excludes gets null."""
    return {
        "token_id": found.token_id,
        "logprob": _finite(found.logprob),
        "rank": found.rank,
        "top": [[token, _finite(logprob)] for token, logprob in found.top],
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _head(index: int, given_id: object) -> dict[str, object]:
    return {"index": index} if given_id is None else {"index": index, "id": given_id}
