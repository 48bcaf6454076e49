"""`--trace` writes what happened however the command ends, and `gapless timeline` draws it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cli.conftest import Ran
from gapless.bench.predict import predict
from gapless.spans import chrome_trace
from gapless.trace.read import read_runs
from gapless.trace.window import typical_window

ROOT = Path(__file__).parents[2]


@pytest.fixture
def simulated(tmp_path: Path) -> list[Path]:
    """A trace for each of two lookaheads."""
    paths: list[Path] = []
    for ahead in (0, 1):
        paths.append(tmp_path / f"{ahead}.json")
        paths[-1].write_text(json.dumps(chrome_trace([predict(ahead, host=1e-3, device=1e-3, steps=20).run])))
    return paths


def test_generate_writes_a_trace_that_timeline_draws(gapless: Callable[..., Ran], options: list[str], tmp_path: Path):
    trace, image = tmp_path / "trace.json", tmp_path / "image.svg"
    assert gapless("generate", *options, "--ignore-eos", "-n", "12", "--trace", str(trace), "ab", "cd").status == 0
    (run,) = read_runs(trace)
    assert (run.name, run.note) == ("lookahead 1", "cpu")
    assert {span.step for span in run.spans} == set(range(12))
    assert gapless("timeline", str(trace), "-o", str(image)).status == 0
    assert ET.parse(image).getroot().tag.endswith("svg")
    ran = gapless("timeline", str(trace))
    assert (ran.status, ran.out) == (0, f"{tmp_path / 'trace.html'}\n")
    assert (tmp_path / "trace.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    "argv",
    [
        ["decode", "--requests", "3", "--prompt-len", "4", "--new-tokens", "8", "--repeat", "1"],
        [
            "mixed",
            "--requests",
            "3",
            "--max-prompt-len",
            "8",
            "--max-new-tokens",
            "8",
            "--rate",
            "inf",
            "--repeat",
            "1",
        ],
        ["predict", "--host-us", "5", "--device-us", "20", "--steps", "10"],
    ],
    ids=lambda argv: argv[0],
)
def test_a_measurement_writes_one_trace_with_a_run_for_each_lookahead(
    gapless: Callable[..., Ran], model: Path, tmp_path: Path, argv: list[str]
):
    trace = tmp_path / "trace.json"
    engine = [] if argv[0] == "predict" else ["--shape", str(model / "config.json"), "--device", "cpu"]
    assert gapless("bench", *argv, *engine, "--lookahead", "1", "--lookahead", "0", "--trace", str(trace)).status == 0
    runs = read_runs(trace)
    assert sorted(run.name for run in runs) == ["lookahead 0", "lookahead 1"]
    assert all(set(run.lanes) == {"host", "h2d", "compute", "d2h"} for run in runs)
    assert gapless("timeline", str(trace)).status == 0


def test_two_traces_are_drawn_one_above_the_other(gapless: Callable[..., Ran], simulated: list[Path], tmp_path: Path):
    page = tmp_path / "page.html"
    assert gapless("timeline", *map(str, simulated), "-o", str(page), "--steps", "3").status == 0
    assert "<title>0: lookahead 0 over 1: lookahead 1</title>" in page.read_text()


def test_the_first_decode_steps_of_a_short_generation_are_drawn_without_its_prompt(
    gapless: Callable[..., Ran], options: list[str], tmp_path: Path
):
    trace = tmp_path / "trace.json"
    assert gapless("generate", *options, "--ignore-eos", "-n", "4", "--trace", str(trace), "ab " * 20).status == 0
    (run,) = read_runs(trace)
    assert list(typical_window(run, 4).steps) == [1, 2]


def test_help_names_the_page_that_is_written_by_default(gapless: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert "Default: the first TRACE's name with .html." in gapless("timeline", "--help").out


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs a git checkout")
@pytest.mark.parametrize("text", ["README.md", "docs/timeline.md"])
def test_what_the_documented_commands_leave_behind_is_ignored_by_git(text: str):
    written = set(re.findall(r"--trace (\S+\.json)|-o (\S+\.html)", (ROOT / text).read_text()))
    names = {trace or page for trace, page in written}
    assert names
    command = ["git", "check-ignore", "--no-index", *names]
    assert set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()) == names


def test_an_unwritable_trace_is_refused_before_a_model_is_looked_for(gapless: Callable[..., Ran], tmp_path: Path):
    for place, reason in ((tmp_path, "is a folder"), (tmp_path / "none" / "x.json", "there is no folder")):
        for command in (["generate", "hi"], ["chat"], ["demo"]):
            ran = gapless(*command, "--model", str(tmp_path / "no model"), "--trace", str(place))
            assert ran.status == 2
            assert reason in ran.err


def test_a_trace_does_not_overwrite_what_the_command_reads_or_writes(
    gapless: Callable[..., Ran], options: list[str], tmp_path: Path
):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "a"}\n')
    ran = gapless("generate", *options, "--input", str(lines), "--trace", str(lines))
    assert ran.status == 2
    assert lines.read_text() == '{"prompt": "a"}\n'


def test_an_error_keeps_the_trace(gapless: Callable[..., Ran], options: list[str], tmp_path: Path):
    trace = tmp_path / "trace.json"
    ran = gapless("generate", *options, "--trace", str(trace), "")
    assert ran.status != 0
    assert json.loads(trace.read_text())["traceEvents"] == []


def test_ctrl_c_keeps_the_trace(
    spawn: Callable[[Sequence[str]], subprocess.Popen[str]], options: list[str], tmp_path: Path
):
    trace = tmp_path / "trace.json"
    argv = ["generate", *options, "-n", "50000", "--ignore-eos", "--trace", str(trace), "ab"]
    with spawn(argv) as program:
        assert program.stdout is not None
        assert program.stdout.read(1)
        program.send_signal(signal.SIGINT)
        assert program.wait(60) == 130
    (run,) = read_runs(trace)
    assert {span.name for span in run.spans} >= {"plan", "compute", "publish"}


def test_what_can_not_be_drawn_is_refused_with_its_reason(
    gapless: Callable[..., Ran], simulated: list[Path], tmp_path: Path
):
    good, bad = str(simulated[0]), tmp_path / "bad.json"
    bad.write_text("{}")
    for argv, reason in (
        ([str(bad)], "no Chrome trace"),
        ([str(tmp_path / "none.json")], "can not be read"),
        ([good, "-o", str(tmp_path / "none" / "x.html")], "there is no folder"),
        ([good, "-o", good], "would overwrite the trace"),
        ([str(tmp_path / "none.json"), "-o", str(tmp_path / "t.pdf")], "must end in .html"),
        ([str(tmp_path / "none.json"), "-o", str(tmp_path / "t")], "must end in .html"),
    ):
        ran = gapless("timeline", *argv)
        assert (ran.status, ran.out) == (2, "")
        assert reason in ran.err
        assert ran.err.count("\n") == 1
