"""Chrome trace JSON back into runs. The file may come from anywhere: everything in it is checked."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from gapless.errors import InputFileError
from gapless.spans import Run, Span

MAX_BYTES = 2**29
_MICRO = 1e-6
_LATEST = 1e12  # seconds
_MOST_STEPS = 2**53


def read_runs(path: Path) -> list[Run]:
    """One run for each process that has a compute lane, in the order of process ids. Raises InputFileError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputFileError(f"the trace {path} is larger than {MAX_BYTES} bytes")
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputFileError(f"the trace {path} can not be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"the trace {path} is not valid JSON") from error
    events = content.get("traceEvents") if isinstance(content, dict) else content
    if not isinstance(events, list):
        raise InputFileError(f"the trace {path} is no Chrome trace: it has no list of traceEvents")
    try:
        runs = _runs_of(cast("list[object]", events), path.stem)
    except _BadEventError as error:
        raise InputFileError(f"the trace {path} is no Chrome trace: {error}") from error
    if not runs:
        raise InputFileError(f"the trace {path} has no compute lane: gapless --trace writes one")
    return runs


def read_files(paths: Sequence[Path]) -> list[Run]:
    """The runs of one or several traces, no two of one name: with several files each name begins with its file's.

    Raises InputFileError.
    """
    stems_differ = len({path.stem for path in paths}) == len(paths)
    seen = Counter[str]()
    runs: list[Run] = []
    for path in paths:
        file = path.stem if stems_differ else str(path)
        for run in read_runs(path):
            name = run.name if len(paths) == 1 or run.name == file else f"{file}: {run.name}"
            seen[name] += 1
            runs.append(run._replace(name=name if seen[name] == 1 else f"{name} ({seen[name]})"))
    return runs


class _BadEventError(Exception):
    pass


def _runs_of(events: list[object], default_name: str) -> list[Run]:
    names: dict[int, str] = {}
    notes: dict[int, str] = {}
    lanes: dict[tuple[int, int], str] = {}
    for number, event in enumerate(events):
        if not isinstance(event, dict):
            raise _BadEventError(f"event {number} is no object")
        if event.get("ph") != "M":
            continue
        pid, args = _integer(event, "pid", number), _args(event)
        if event.get("name") == "process_name":
            names[pid] = _text(args.get("name"))
        elif event.get("name") == "process_labels":
            notes[pid] = _text(args.get("labels"))
        elif event.get("name") == "thread_name":
            lanes[pid, _integer(event, "tid", number)] = _text(args.get("name"))
    spans: dict[int, list[Span]] = {}
    for number, event in enumerate(cast("list[dict[str, Any]]", events)):
        if event.get("ph") == "X":
            pid = _integer(event, "pid", number)
            lane = lanes.get((pid, _integer(event, "tid", number)), "")
            spans.setdefault(pid, []).append(_span(event, lane, number))
    return [
        Run(names.get(pid) or default_name, notes.get(pid, ""), list(dict.fromkeys(each.lane for each in found)), found)
        for pid, found in sorted(spans.items())
        if any(span.lane == "compute" and span.step >= 0 for span in found)
    ]


def _span(event: dict[str, Any], lane: str, number: int) -> Span:
    begin, length, args = _seconds(event, "ts", number), _seconds(event, "dur", number), _args(event)
    if length < 0:
        raise _BadEventError(f"event {number} takes {length} s")
    step = args.get("step")
    return Span(
        lane=lane,
        name=_text(args.get("name") or event.get("name")),
        step=step if isinstance(step, int) and step < _MOST_STEPS else -1,
        slot=_text(args.get("slot")),
        begin=begin,
        end=begin + length,
    )


def _args(event: dict[str, Any]) -> dict[str, Any]:
    args = event.get("args")
    return cast("dict[str, Any]", args) if isinstance(args, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _integer(event: dict[str, Any], key: str, number: int) -> int:
    value: object = event.get(key, 0)
    if not isinstance(value, int):
        raise _BadEventError(f"the {key} of event {number} is no whole number")
    return value


def _seconds(event: dict[str, Any], key: str, number: int) -> float:
    value: object = event.get(key)
    if not isinstance(value, int | float) or abs(value) > _LATEST / _MICRO or not math.isfinite(value):
        raise _BadEventError(f"the {key} of event {number} is no time")
    return value * _MICRO
