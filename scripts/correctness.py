"""Fills the measured parts of docs/correctness.md: the fault table, a shrunk replay, the idle table, the last race.

PYTHONPATH=tests python scripts/correctness.py [faults] [replay] [race] [idle]     (all without arguments)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from support.sim.faults import FAULTS, hunt, table
from support.sim.race import STATE, State, Totals, describe, fingerprint
from support.sim.rig import run
from support.sim.schedule import Schedule
from support.sim.shrink import shrink

DOCS = Path(__file__).parents[1] / "docs" / "correctness.md"
SHOWN_FAULT = "a slot is refilled before its d2h_done"


def faults() -> str:
    """The table of planted faults."""
    return table()


def replay() -> str:
    """A planted fault's first schedule, made small."""
    fault = next(fault for fault in FAULTS if fault.name == SHOWN_FAULT)

    def fails(schedule: Schedule) -> bool:
        found = run(schedule, fault.parts).violation
        return found is not None and fault.proved_by(found)

    small = shrink(hunt(fault).schedule, fails)
    return f"```\n{describe(small, run(small, fault.parts), last=24)}\n```"


def race() -> str:
    """The totals of `make race`, also of several that were made side by side, each with a state file of its own."""
    state, totals = State(fingerprint()), Totals()
    for file in sorted(STATE.parent.glob(f"{STATE.stem}*.json")):
        part = State.load(file, state.code)
        if twice := set(part.chunks) & set(state.chunks):
            sys.exit(f"{file} has {len(twice)} chunks that another state has, too")
        state.chunks += part.chunks
        totals.add(part.totals)
    if not state.chunks:
        sys.exit(f"{STATE} has no run of this code; run `make race` first")
    cells = {
        "schedules": totals.schedules,
        "steps": totals.steps,
        "requests": totals.requests,
        "tokens": totals.tokens,
        "preemptions": totals.preemptions,
        "cancels": totals.cancelled,
        "steps out of memory": totals.failed_steps,
        "overshoot rows": totals.overshoot,
        "violations": totals.failed,
    }
    return (
        f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}\n| "
        + " | ".join(f"{value:,}" for value in cells.values())
        + f" |\n\n`make race`, code `{state.code}`."
    )


def idle() -> str:
    """The table of predicted idle shares."""
    sys.path.insert(0, str(Path(__file__).parent))
    from idle_share import shares
    from idle_share import table as idle_table

    return idle_table(shares())


SECTIONS: dict[str, Callable[[], str]] = {"faults": faults, "replay": replay, "race": race, "idle": idle}


def main() -> None:
    """Replace what stands between the markers."""
    torch.set_num_threads(1)
    text = DOCS.read_text()
    for name in sys.argv[1:] or SECTIONS:
        section = f"<!-- {name} -->\n{SECTIONS[name]()}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, new=section: new, text, flags=re.DOTALL)
        DOCS.write_text(text)
        print(f"{name}: written")


if __name__ == "__main__":
    main()
