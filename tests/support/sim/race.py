"""Many schedules on all cores, resumable; and one of them again, with its timeline.

python -m support.sim.race run --seeds 1000000
python -m support.sim.race replay --seed 1234 --trace trace.json --shrink
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gapless.params import SamplingParams
from support.sim.rig import Result, run
from support.sim.schedule import TARGETED, Move, Schedule, generate
from support.sim.shrink import shrink

CHUNK = 50
FOLDER = Path(".race")
STATE = FOLDER / "state.json"
MAX_KEPT = 100
_PLAIN = SamplingParams()
SUPPORT = Path(__file__).parents[1]
PRODUCT = sorted(
    Path(module.__file__) for name, module in sys.modules.items() if name.startswith("gapless") and module.__file__
)
"""What the rig imports of it."""

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@dataclass
class Totals:
    """Sums over schedules. `findings` are (seed, violation) of the first ones that failed."""

    schedules: int = 0
    steps: int = 0
    requests: int = 0
    tokens: int = 0
    preemptions: int = 0
    cancelled: int = 0
    updates: int = 0
    pauses: int = 0
    overshoot: int = 0
    failed_steps: int = 0
    failed: int = 0
    findings: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])

    def book(self, seed: int, result: Result) -> None:
        """Add one run."""
        self.schedules += 1
        self.steps += result.steps
        self.requests += len(result.requests)
        self.tokens += sum(map(len, result.tokens.values()))
        self.preemptions += result.preemptions
        self.cancelled += sum(end.reason.value == "cancelled" for end in result.finished.values())
        self.updates += result.commands["update"]
        self.pauses += result.commands["pause"] + result.commands["sleep"]
        self.overshoot += result.overshoot
        self.failed_steps += result.failed_steps
        if result.violation is not None:
            self.failed += 1
            self.findings.append((seed, str(result.violation)))

    def add(self, other: Totals) -> None:
        """Add the sums of others."""
        for name, value in asdict(other).items():
            if name != "findings":
                setattr(self, name, getattr(self, name) + value)
        self.findings = (self.findings + other.findings)[:MAX_KEPT]


@dataclass
class State:
    """What is done: chunks of CHUNK seeds, for one version of the code."""

    code: str
    chunks: list[int] = field(default_factory=list[int])
    totals: Totals = field(default_factory=Totals)
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Replace the file as a whole, so that an interruption can not spoil it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".new")
        scratch.write_text(json.dumps(asdict(self)))
        os.replace(scratch, path)

    @classmethod
    def load(cls, path: Path, code: str) -> State:
        """The saved state if it is of this code, else an empty one."""
        try:
            saved = json.loads(path.read_text())
        except (OSError, ValueError):
            return cls(code)
        if saved["code"] != code:
            return cls(code)
        totals = Totals(**saved["totals"])
        totals.findings = [(seed, text) for seed, text in totals.findings]
        return cls(code, saved["chunks"], totals, saved["seconds"])


def fingerprint() -> str:
    """Of the code that a schedule runs: what a result is good for."""
    files = [*PRODUCT, *sorted(SUPPORT.rglob("*.py"))]
    return _hash(b"".join(file.read_bytes() for file in files))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def replay_command(seed: int) -> str:
    """What shows a seed's run again, and its smallest form."""
    return f"make replay SEED={seed}"


def smallest(schedule: Schedule) -> Schedule:
    """The smallest that fails in the same way; itself if nothing is wrong with it."""
    first = run(schedule).violation
    if first is None:
        return schedule
    return shrink(schedule, lambda each: (found := run(each).violation) is not None and found.kind == first.kind)


def keep(schedule: Schedule, name: str) -> str:
    """Save a schedule that fails. Returns the command that replays it, whatever becomes of the seeds."""
    path = FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(schedule.to_json())
    return f"make replay SCHEDULE={path}"


def run_chunk(number: int) -> tuple[int, Totals]:
    """The schedules of one chunk."""
    torch.set_num_threads(1)
    totals = Totals()
    for seed in range(number * CHUNK, (number + 1) * CHUNK):
        totals.book(seed, run(generate(seed)))
    return number, totals


def leave_interrupts_to_the_parent() -> None:
    """Ctrl-C reaches every process of the terminal; one of them answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def explore(chunks: list[int], jobs: int) -> Iterator[tuple[int, Totals]]:
    """Chunks as they are done, on this many processes."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=leave_interrupts_to_the_parent) as pool:
        yield from pool.imap_unordered(run_chunk, chunks)


@app.command("run")
def run_command(
    seeds: Annotated[int, typer.Option(min=1, help="Schedules in all, rounded up to whole chunks.")] = 100_000,
    start: Annotated[int, typer.Option(min=0, help="The first seed, rounded down to a whole chunk.")] = 0,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default.")] = None,
    state: Annotated[Path, typer.Option(help="Where the progress is kept.")] = STATE,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what is done.")] = False,
) -> None:
    """Run SEEDS schedules from START on. Goes on where it was stopped, as long as the code is the same."""
    console, code = Console(), fingerprint()
    known = State(code) if restart else State.load(state, code)
    done = set(known.chunks)
    first = start // CHUNK
    missing = [number for number in range(first, first + -(-seeds // CHUNK)) if number not in done]
    if done:
        console.print(f"{len(done) * CHUNK:,} schedules of this code are done already")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    begun, before = time.monotonic(), known.seconds
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("schedules", total=len(missing) * CHUNK)
            for number, totals in explore(missing, jobs or os.cpu_count() or 1) if missing else ():
                known.chunks.append(number)
                known.totals.add(totals)
                known.seconds = before + time.monotonic() - begun
                known.save(state)
                progress.advance(task, CHUNK)
                for seed, violation in totals.findings:
                    console.print(f"seed {seed}: {violation}\n  {replay_command(seed)}", markup=False)
    except KeyboardInterrupt:
        console.print(f"interrupted; {known.totals.schedules:,} schedules are kept, the same command goes on")
        raise typer.Exit(130) from None
    report(console, known)
    raise typer.Exit(1 if known.totals.failed else 0)


def report(console: Console, state: State) -> None:
    """What was run and found."""
    totals = state.totals
    counts = {name: value for name, value in asdict(totals).items() if name != "findings"}
    text = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items())
    console.print(f"{text}; {state.seconds:,.0f} s, code {state.code}", markup=False)
    kinds = Counter(text.split(":")[0] for _, text in totals.findings)
    if kinds:
        console.print(f"the first ones: {dict(kinds)}", markup=False)
    for seed, _ in totals.findings[:1]:
        small = smallest(generate(seed))
        console.print(f"the first one, made small: {keep(small, str(seed))}", markup=False)


@app.command()
def replay(
    seed: Annotated[int | None, typer.Option(help="Of a generated schedule.")] = None,
    schedule: Annotated[Path | None, typer.Option(help="A schedule as JSON, as --save writes it.")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the schedule (the smallest one, with --shrink) here.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace here.")] = None,
    smaller: Annotated[bool, typer.Option("--shrink", help="Find the smallest schedule that fails alike.")] = False,
    last: Annotated[int | None, typer.Option(help="Show only this many lines of the timeline.")] = None,
) -> None:
    """Run one schedule again and show its timeline. Status 1 if it fails."""
    torch.set_num_threads(1)
    if (seed is None) == (schedule is None):
        raise typer.BadParameter("give either --seed or --schedule")
    chosen = generate(seed or 0) if schedule is None else _read(schedule)
    small = smallest(chosen) if smaller else chosen
    result = run(small)
    print(describe(small, result, last))
    if save is not None:
        save.write_text(small.to_json())
    if smaller and result.violation is not None:
        print(f"to see it again: {keep(small, str(seed) if seed is not None else _hash(small.to_json().encode()))}")
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.write_text(json.dumps(result.device.timeline.chrome_trace()))
        print(f"trace for chrome://tracing or ui.perfetto.dev: {trace}")
    raise typer.Exit(1 if result.violation else 0)


def _read(path: Path) -> Schedule:
    try:
        return Schedule.from_json(path.read_text())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        typer.echo(f"error: {path} holds no schedule: {error}", err=True)
        raise typer.Exit(2) from None


def describe(schedule: Schedule, result: Result, last: int | None = None) -> str:
    """The schedule, its timeline and what went wrong."""
    moves = "\n".join(f"  at {move.point}: {_what(move)}" for move in schedule.moves)
    sizes = {name: value for name, value in asdict(schedule).items() if name != "moves"}
    verdict = str(result.violation) if result.violation else f"no violation in {result.steps} steps"
    return f"{sizes}\n{moves}\n\n{result.device.timeline.text(last)}\n\n{verdict}"


def _what(move: Move) -> str:
    if move.kind == "add":
        more = ("priority", "salt", "arrivals", "endings", "form")
        asked = {name: value for name in more if (value := getattr(move, name))}
        names = [field.name for field in fields(move.params) if field.compare]
        asked |= {name: value for name in names if (value := getattr(move.params, name)) != getattr(_PLAIN, name)}
        return ", ".join([f"add a prompt of {len(move.prompt)}", *(f"{name} {asked[name]!r}" for name in asked)])
    if move.kind == "exhaust":
        return f"a step runs out of memory {move.where}"
    if move.kind == "update":
        return f"update the weights, in_flight {move.in_flight!r}"
    if move.kind not in TARGETED:
        return move.kind
    return f"{move.kind} request {move.target}{f', answer {move.place}' if move.place else ''}"


if __name__ == "__main__":
    app()
