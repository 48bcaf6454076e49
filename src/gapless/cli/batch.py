"""A file of requests in, a file of results out, each written as soon as it is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

from gapless.cli.files import Kept, ResultWriter, first_error
from gapless.cli.jobs import BadLineError, Line, LineReader, parse_line
from gapless.cli.setup import warn
from gapless.collector import Prepared
from gapless.errors import InvalidRequestError
from gapless.llm import LLM
from gapless.outputs import RequestOutput
from gapless.params import SamplingParams
from gapless.progress import Progress


class BatchRun:
    """Runs the lines of one input through one model. At most `window` requests are in memory.

    target  the output if it is a file, so that --resume can go on with it
    total   lines of the input, where that is known
    errors  lines that failed, those of an earlier run included
    """

    def __init__(
        self,
        llm: LLM,
        defaults: SamplingParams,
        writer: ResultWriter,
        lines: LineReader,
        *,
        kept: Kept,
        target: str | None,
        total: int | None = None,
    ) -> None:
        self._llm = llm
        self._defaults = defaults
        self._writer = writer
        self._lines = lines
        self._open: dict[str, tuple[Line, object]] = {}  # request id -> its line, without its data, and the line's id
        self._kept = kept
        self._target = target
        self.errors = len(kept.failed)
        to_do = total is None or total > len(kept.ids)
        self._progress = Progress(total, None if to_do and not writer.on_screen else False, done=len(kept.ids))

    def progress(self) -> str:
        """How far the output is, and how to go on from there: for the last words of a run that was cut short."""
        more = "" if self._lines.ended else "at least "
        how = (
            "repeat the command with --resume"
            if self._target is not None
            else "run the lines whose index the output does not have"
        )
        return f"{self._writer.written} of {more}{self._drawn} lines are answered. To go on, {how}"

    @property
    def _drawn(self) -> int:
        return max(self._lines.drawn, self._kept.lines)

    def run(self) -> None:
        window = max(64, 2 * self._llm.loaded.config.max_rows)
        with (
            self._progress,
            closing(self._llm.run(self._requests(), window=window, progress=self._progress)) as outputs,
        ):
            for output in outputs:
                self._book(output)
        if self._target is not None:
            added = "" if self._writer.written > len(self._kept.ids) else "nothing to add: "
            failed = f", {self.errors} failed" if self.errors else ""
            answered = f"{self._writer.written - self.errors} of {self._drawn} lines answered"
            warn(f"{added}{answered}{failed}, in {self._target}" if self._drawn else "the input has no lines")
        elif self.errors:
            warn(f"{self.errors} of {self._drawn} lines failed")

    def _requests(self) -> Iterator[Prepared | None]:
        while True:
            line = self._lines.next(wait=not self._open)
            if line is None:
                if self._lines.ended:
                    return
                yield None
            elif (prepared := self._prepare(line)) is not None:
                yield prepared

    def _prepare(self, line: Line) -> Prepared | None:
        """None for a line that is bad, or answered already: it is prepared since later seeds follow from the order."""
        given_id: object = None
        try:
            job, given_id = parse_line(line.data, self._defaults)
            prepared = self._llm.prepare(job.prompt, job.params)
        except InvalidRequestError as error:
            bad = isinstance(error, BadLineError)
            given_id = error.given_id if bad else given_id
            self._kept.check(line, given_id, bad=bad)
            if line.index not in self._kept.ids:
                self._refuse(line, given_id, str(error))
            return None
        self._kept.check(line, given_id, bad=False)
        if line.index in self._kept.ids:
            return None
        self._open[str(prepared.request_id)] = (replace(line, data=b""), given_id)
        return prepared

    def _refuse(self, line: Line, given_id: object, reason: str) -> None:
        self.errors += 1
        self._writer.error(line.index, given_id, line.number, reason)
        self._progress.count(1)
        warn(f"error: line {line.number}: {' '.join(reason.split())}")

    def _book(self, output: RequestOutput) -> None:
        line, given_id = self._open.pop(output.request_id)
        self._writer.result(line.index, given_id, output)
        if (error := first_error(output)) is not None:
            self.errors += 1
            warn(f"error: line {line.number}: {' '.join(error.split())}")
