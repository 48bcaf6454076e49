"""The entry of the program `gapless`: small, so that Ctrl-C ends it in peace while the rest is still being imported."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from gapless.cli.signals import bring_lost_interrupts_back, leave_interrupted


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the program and exit."""
    try:
        bring_lost_interrupts_back()
        _fill_closed_streams()
        from gapless.cli.program import run

        run(argv)
    except KeyboardInterrupt:
        leave_interrupted()


def _fill_closed_streams() -> None:
    """What goes to a stream that was closed from the start goes nowhere, and no file of ours gets its number."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
