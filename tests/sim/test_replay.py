"""A failing schedule can be shown again, and made small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from support.effort import and_thoroughly
from support.sim.faults import FAULTS, hunt
from support.sim.race import CHUNK, State, Totals, app, describe, report
from support.sim.rig import run
from support.sim.schedule import Schedule, generate
from support.sim.shrink import shrink

BY_NAME = {fault.name: fault for fault in FAULTS}


def test_a_schedule_survives_json():
    for seed in range(50):
        assert Schedule.from_json(generate(seed).to_json()) == generate(seed)


@pytest.mark.parametrize(
    ("name", "most_moves"),
    and_thoroughly(
        [("a block table delta is lost", 1), ("slots share the pinned inputs", 1), ("preemption repeats a token", 2)],
        [("a cancelled request gets no end", 2), ("the newest request is admitted first", 3)],
    ),
)
def test_shrinking_gives_a_small_schedule_that_fails_alike(name: str, most_moves: int):
    fault = BY_NAME[name]
    caught = hunt(fault)
    first = caught.schedule

    def fails(schedule: Schedule) -> bool:
        violation = run(schedule, fault.parts).violation
        return violation is not None and fault.proved_by(violation)

    small = shrink(first, fails, budget=400)
    assert fails(small)
    assert len(small.moves) <= most_moves
    assert small.lookahead <= first.lookahead
    assert small.blocks <= first.blocks
    assert small.order_seed < first.order_seed
    assert run(small).violation is None


@pytest.mark.parametrize("content", [None, "nonsense", "[]", "{}", '{"moves": 3}', '{"moves": [{}]}', '{"moves": []}'])
def test_a_file_that_is_no_schedule_is_refused_in_one_line(tmp_path: Path, content: str | None):
    path = tmp_path / "schedule.json"
    if content is not None:
        path.write_text(content)
    shown = CliRunner().invoke(app, ["replay", "--schedule", str(path)])
    assert shown.exit_code == 2
    assert shown.output.startswith(f"error: {path} holds no schedule: ")
    assert shown.output.count("\n") == 1


def test_the_replay_command_shows_lanes_and_writes_a_chrome_trace(tmp_path: Path):
    trace, saved = tmp_path / "trace.json", tmp_path / "schedule.json"
    shown = CliRunner().invoke(app, ["replay", "--seed", "3", "--trace", str(trace), "--save", str(saved)])
    assert shown.exit_code == 0, shown.output
    assert "no violation" in shown.output
    [header] = [line for line in shown.output.splitlines() if line.split()[:1] == ["host"]]
    assert header.split() == ["host", "h2d", "compute", "d2h"]
    events = json.loads(trace.read_text())["traceEvents"]
    assert {each["cat"] for each in events if each["ph"] == "X"} == {"host", "h2d", "compute", "d2h"}
    again = CliRunner().invoke(app, ["replay", "--schedule", str(saved)])
    assert again.output.split("no violation")[0] in shown.output


def test_a_violation_prints_the_command_that_replays_its_smallest_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The engine is right, so the schedule is wrong: it has a prompt that is longer than the context."""
    monkeypatch.chdir(tmp_path)
    schedule = generate(5)
    adds = [move for move in schedule.moves if move.kind == "add"]
    too_long = replace(adds[0], point=schedule.moves[-1].point, prompt=(1,) * schedule.max_length)
    Path("long.json").write_text(replace(schedule, moves=(*schedule.moves, too_long)).to_json())
    shown = CliRunner().invoke(app, ["replay", "--schedule", "long.json", "--shrink"])
    assert shown.exit_code == 1
    assert "error: PromptTooLongError" in shown.output
    [saved] = Path(".race").glob("*.json")
    assert f"make replay SCHEDULE={saved}" in shown.output
    assert len(Schedule.from_json(saved.read_text()).moves) == 1
    again = CliRunner().invoke(app, ["replay", "--schedule", str(saved)])
    assert again.exit_code == 1
    assert again.output.strip() in shown.output


def test_a_race_keeps_the_first_schedule_that_failed_and_says_how_to_replay_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    console = Console(record=True)
    report(
        console, State("code", totals=Totals(schedules=CHUNK, failed=2, findings=[(3, "tokens: a"), (8, "books: b")]))
    )
    assert "make replay SCHEDULE=.race/3.json" in console.export_text()
    assert Schedule.from_json(Path(".race/3.json").read_text()) == generate(3)


def test_a_failing_run_is_described_with_its_schedule_timeline_and_violation():
    fault = BY_NAME["slots share the pinned inputs"]
    caught = hunt(fault)
    schedule = caught.schedule
    text = describe(schedule, run(schedule, fault.parts), last=10)
    assert "race on host in A" in text
    assert "add a prompt of" in text


def test_a_race_goes_on_where_it_was_stopped_and_starts_anew_when_the_code_changes(tmp_path: Path):
    path = tmp_path / "state.json"
    command = ["run", "--jobs", "1", "--state", str(path), "--seeds"]
    first = CliRunner().invoke(app, [*command, str(CHUNK)])
    assert first.exit_code == 0, first.output
    assert f"{CHUNK} schedules" in first.output
    again = CliRunner().invoke(app, [*command, str(CHUNK)])
    assert f"{CHUNK} schedules of this code are done already" in again.output
    saved = json.loads(path.read_text())
    assert saved["totals"]["schedules"] == CHUNK
    assert State.load(path, saved["code"]).totals.steps == saved["totals"]["steps"] > CHUNK
    assert State.load(path, "other").chunks == []
    path.write_text("spoilt")
    assert State.load(path, saved["code"]).chunks == []
