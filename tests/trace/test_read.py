"""What was written is read back; what is no trace is refused with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gapless.errors import InputFileError
from gapless.spans import Run, Span, chrome_trace
from gapless.trace.read import read_files, read_runs
from gapless.trace.record import LANES, Trace
from support.traced import run_loop


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_trace_comes_back_as_it_was_but_for_where_its_time_begins(tmp_path: Path):
    trace = Trace()
    for lookahead in (0, 1):
        run_loop(trace, lookahead)
    path = tmp_path / "trace.json"
    trace.write(path)
    found, wanted = read_runs(path), trace.runs()
    assert [(run.name, run.note) for run in found] == [(run.name, run.note) for run in wanted]
    for run, true in zip(found, wanted, strict=True):
        start = min(span.begin for span in true.spans)
        assert [span[:4] for span in run.spans] == [span[:4] for span in true.spans]
        for span, other in zip(run.spans, true.spans, strict=True):
            assert (span.begin, span.end) == pytest.approx((other.begin - start, other.end - start), abs=2e-9)


def test_a_run_without_a_name_takes_that_of_its_file(tmp_path: Path):
    runs = [Run("", "", LANES, [Span("compute", "replay", 3, "B", 1.0, 2.0)])]
    (run,) = read_runs(write(tmp_path / "seed 12.json", chrome_trace(runs)))
    assert run.name == "seed 12"
    assert list(run.spans) == [Span("compute", "replay", 3, "B", 0.0, 1.0)]


def test_processes_without_a_compute_lane_are_left_out(tmp_path: Path):
    other = Run("profiler", "", ["stream 7"], [Span("stream 7", "gemm", -1, "", 0.0, 1.0)])
    ours = Run("ours", "", LANES, [Span("compute", "replay", 0, "A", 0.0, 1.0)])
    assert [run.name for run in read_runs(write(tmp_path / "two.json", chrome_trace([other, ours])))] == ["ours"]


def names(*paths: Path) -> list[str]:
    return [run.name for run in read_files(paths)]


def test_runs_of_several_files_are_named_after_them(tmp_path: Path):
    span = Span("compute", "replay", 0, "A", 0.0, 1.0)
    one = chrome_trace([Run("lookahead 1", "", LANES, [span])])
    (tmp_path / "x").mkdir()
    before, after, other = (tmp_path / name for name in ("before.json", "after.json", "x/before.json"))
    for path in (before, after, other):
        write(path, one)
    assert names(before) == ["lookahead 1"]
    assert names(before, after) == ["before: lookahead 1", "after: lookahead 1"]
    assert names(before, other) == [f"{before}: lookahead 1", f"{other}: lookahead 1"]
    assert names(after, after) == [f"{after}: lookahead 1", f"{after}: lookahead 1 (2)"]
    unnamed = write(tmp_path / "unnamed.json", chrome_trace([Run("", "", LANES, [span])]))
    assert names(before, unnamed) == ["before: lookahead 1", "unnamed"]


def test_runs_of_one_name_in_a_file_are_numbered(tmp_path: Path):
    run = Run("lookahead 1", "", LANES, [Span("compute", "replay", 0, "A", 0.0, 1.0)])
    assert names(write(tmp_path / "two.json", chrome_trace([run, run]))) == ["lookahead 1", "lookahead 1 (2)"]


LANE = {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "compute"}}
SPAN = {"ph": "X", "name": "replay", "pid": 1, "tid": 1, "ts": 0, "dur": 1, "args": {"step": 0}}


def test_a_bare_list_of_events_is_a_trace_too(tmp_path: Path):
    assert len(read_runs(write(tmp_path / "list.json", [LANE, SPAN]))) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 200_000, "not valid JSON"),
        ("7" * 5000, "not valid JSON"),
        ("7", "no list of traceEvents"),
        ({"traceEvents": {}}, "no list of traceEvents"),
        ({"traceEvents": []}, "no compute lane"),
        ([LANE], "no compute lane"),
        ([SPAN], "no compute lane"),
        ([LANE, SPAN | {"args": None}], "no compute lane"),
        ([LANE, 7], "event 1 is no object"),
        ([LANE | {"pid": "x"}], "pid of event 0"),
        ([LANE | {"tid": [1]}], "tid of event 0"),
        ([LANE, SPAN | {"ts": "0"}], "ts of event 1"),
        ([LANE, SPAN | {"ts": None}], "ts of event 1"),
        ([LANE, SPAN | {"ts": 10**400}], "ts of event 1"),
        (json.dumps([LANE, SPAN | {"dur": float("nan")}]), "dur of event 1"),
        (json.dumps([LANE, SPAN | {"dur": float("inf")}]), "dur of event 1"),
        ([LANE, SPAN | {"dur": -1}], "event 1 takes -1e-06 s"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_trace_is_refused_with_its_reason(tmp_path: Path, content: Any, reason: str):
    with pytest.raises(InputFileError, match=reason):
        read_runs(write(tmp_path / "bad.json", content))


def test_a_file_that_can_not_be_read_is_refused(tmp_path: Path):
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "none.json", tmp_path / "bytes.json"):
        with pytest.raises(InputFileError):
            read_runs(path)
