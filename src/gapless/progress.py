"""A progress bar on stderr: requests done, tokens per second, requests running."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

from tqdm import tqdm

_REFRESH_SECONDS = 0.2
_WIDTH_UNKNOWN = 80


def _width() -> int | None:
    """None: as wide as the terminal is; a number where that says 0 columns, as a plain pty and some containers do."""
    try:
        known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        known = False
    return None if known else _WIDTH_UNKNOWN


class Progress:
    """Does nothing unless `show`; None shows it when stderr is a terminal. `total` None: not known.

    done  requests of the total that were done before
    """

    def __init__(self, total: int | None, show: bool | None, done: int = 0) -> None:
        if show is None:
            show = sys.stderr.isatty()
        self._bar = (
            tqdm(
                total=total,
                initial=done,
                unit=" request",
                file=sys.stderr,
                ncols=_width(),
                dynamic_ncols=not _width(),
            )
            if show
            else None
        )
        self._tokens = 0
        self._started = self._shown = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._show(0)
            self._bar.close()

    def advance(self, *, tokens: int, running: int, finished: int) -> None:
        """Book one step."""
        if self._bar is None:
            return
        self._tokens += tokens
        now = time.perf_counter()
        self.count(finished)
        if now - self._shown >= _REFRESH_SECONDS:
            self._shown = now
            self._show(running)

    def count(self, finished: int) -> None:
        """Book requests that are done."""
        if self._bar is not None:
            self._bar.update(finished)

    def _show(self, running: int) -> None:
        assert self._bar is not None
        rate = self._tokens / max(time.perf_counter() - self._started, 1e-9)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s, {running} running", refresh=True)
