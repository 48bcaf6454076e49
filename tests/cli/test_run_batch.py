"""Batch files: every line answered once, whatever happens on the way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Ran
from gapless.server.batch import only_run
from support.processes import lines_in
from support.waiting import eventually

Spawn = Callable[[Sequence[str]], "subprocess.Popen[str]"]


def request(custom_id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def argv(model: Path, tmp_path: Path) -> list[str]:
    engine = ["--model", str(model), "--load", "random", "--device", "cpu", "--num-blocks", "8K", "--max-rows", "4"]
    return ["run-batch", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *engine]


def test_each_request_gets_what_the_server_would_answer(argv: list[str], gapless: Callable[..., Ran], tmp_path: Path):
    lines = [
        request("one"),
        request("chat", "/v1/chat/completions", messages=[{"role": "user", "content": "ab"}]),
        request("bad", temperature=-1),
        request("streams", stream=True),
        request("unknown", model="another"),
        "",
        request("two", n=2, logprobs=1),
        *(request(f"many {n}", prompt=[[1, n + 1], [2, 3], [n + 1]]) for n in range(12)),
    ]
    write(tmp_path / "in", lines)
    ran = gapless(*argv)
    assert ran.status == 1
    assert "15 of 18 lines answered" in ran.err
    assert ran.out == ""
    answers = {line["custom_id"]: line for line in records(tmp_path / "out")}
    assert set(answers) == {"one", "chat", "two", *(f"many {n}" for n in range(12))}
    assert all(line["error"] is None and line["response"]["status_code"] == 200 for line in answers.values())
    assert answers["one"]["response"]["body"]["usage"]["completion_tokens"] == 4
    assert answers["chat"]["response"]["body"]["object"] == "chat.completion"
    assert [choice["index"] for choice in answers["two"]["response"]["body"]["choices"]] == [0, 1]
    errors = {line["custom_id"]: line["response"] for line in records(tmp_path / "out.errors")}
    assert {name: each["status_code"] for name, each in errors.items()} == {"bad": 400, "streams": 400, "unknown": 404}
    assert "temperature" in errors["bad"]["body"]["error"]["message"]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_without_repeating_or_losing_a_line(
    argv: list[str], gapless: Callable[..., Ran], spawn: Spawn, tmp_path: Path
):
    lines = [request(f"r{n}", max_tokens=60 + n, temperature=1) for n in range(40)]
    lines[7]["body"]["top_p"] = 2
    write(tmp_path / "in", lines)
    whole = gapless(*argv, "-o", str(tmp_path / "whole"))
    assert whole.status == 1
    out = tmp_path / "out"
    for kill in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        before = lines_in(out)
        process = spawn([*argv, *(["--resume"] if before else [])])
        eventually(lambda: lines_in(out) >= before + 5)  # noqa: B023
        process.send_signal(kill)
        _, err = process.communicate(timeout=60)
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[kill]
        if kill != signal.SIGKILL:
            assert "repeat the command with --resume" in err
        with out.open("ab") as file:
            file.write(b'{"id": "batch_req_x", "custom_id": "r5')  # as a power cut may leave it
    refused = gapless(*argv)
    assert refused.status == 2
    assert "not empty" in refused.err
    ended = gapless(*argv, "--resume")
    assert ended.status == 1
    assert "39 of 40 lines answered" in ended.err
    names = [line["custom_id"] for path in (out, tmp_path / "out.errors") for line in records(path)]
    assert sorted(names) == sorted(line["custom_id"] for line in lines)

    def texts(path: Path) -> dict[str, str]:
        return {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in records(path)}

    assert texts(out) == texts(tmp_path / "whole")  # a seed follows from the custom_id
    again = gapless(*argv, "--resume")
    assert again.status == 1
    assert (
        f"nothing to add: all 40 lines have an answer; 1 of them with an error: to ask again, take it out of {out}.er"
        in (again.err)
    )
    (tmp_path / "out.errors").write_text("")
    once_more = gapless(*argv, "--resume")
    assert "39 of 40 lines answered" in once_more.err
    assert len(records(tmp_path / "out.errors")) == 1


def test_two_runs_do_not_write_to_one_output(argv: list[str], gapless: Callable[..., Ran], tmp_path: Path):
    write(tmp_path / "in", [request("one")])
    with only_run(tmp_path / "out"):
        for more in ([], ["--resume"], ["--overwrite"]):
            ran = gapless(*argv, *more)
            assert ran.status == 2
            assert "another run is writing to" in ran.err
    assert not (tmp_path / "out").exists()
    assert gapless(*argv).status == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_written_to_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
):
    said = [number, errno.EIO]

    def fails(*_: object) -> None:
        raise OSError(said[0], os.strerror(said[0]))

    monkeypatch.setattr(fcntl, "flock", fails)
    with only_run(tmp_path / "out"):
        (tmp_path / "out").write_text("x")
    assert (tmp_path / "out").read_text() == "x"
    assert "has no locks" in caplog.text
    said.pop(0)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), only_run(tmp_path / "out"):
        pass


def test_a_file_that_is_no_batch_is_refused_before_the_model_is_loaded(gapless: Callable[..., Ran], tmp_path: Path):
    source, out = tmp_path / "in", tmp_path / "out"
    good = request("a")
    for lines, text in (
        ([good, good], "line 2 of .* is that of line 1, too"),
        ([good, "{"], "line 2 of .* not JSON"),
        ([good, "[" * 100_000], "line 2 of .* not JSON"),
        (["[]"], "not a JSON object"),
        ([{**good, "custom_id": ""}], "custom_id must be"),
        ([{**good, "custom_id": 3}], "custom_id must be"),
        ([{**good, "custom_id": "\ud800"}], "not valid Unicode"),
        ([{**good, "url": "/v1/embeddings"}], "url must be one of"),
        ([{**good, "url": "/debug/lookahead"}], "url must be one of"),
        ([{**good, "method": "GET"}], "method must be POST"),
        ([{**good, "body": []}], "body must be an object"),
    ):
        write(source, lines)
        ran = gapless("run-batch", "-i", str(source), "-o", str(out), "--model", str(tmp_path / "none"))
        assert ran.status == 2
        assert re.search(text, ran.err), (text, ran.err)
        assert not out.exists()


def test_files_are_looked_at_first(gapless: Callable[..., Ran], tmp_path: Path):
    source = write(tmp_path / "in", [request("a")])
    other = write(tmp_path / "other", [{"custom_id": "b", "response": {}}])
    nonsense = write(tmp_path / "nonsense", ["{}"])
    for argv, text in (
        (["-i", str(tmp_path / "none"), "-o", str(tmp_path / "out")], "no input file"),
        (["-i", str(source), "-o", str(source)], "destroy the input"),
        (["-i", str(source), "-o", str(tmp_path / "out"), "--errors", str(tmp_path / "out")], "for errors"),
        (["-i", str(source), "-o", str(other)], "not empty"),
        (["-i", str(source), "-o", str(other), "--resume"], "does not have"),
        (["-i", str(source), "-o", str(nonsense), "--resume"], "no answer of gapless run-batch"),
        (["-i", str(source), "-o", str(other), "--resume", "--overwrite"], "give one of them"),
        (["-i", str(source), "-o", str(tmp_path / "no" / "out")], "no folder"),
    ):
        ran = gapless("run-batch", *argv)
        assert (ran.status, ran.out) == (2, ""), argv
        assert text in ran.err, argv
    empty = write(tmp_path / "empty", [""])
    assert gapless("run-batch", "-i", str(empty), "-o", str(tmp_path / "out")).status == 0


def test_an_engine_that_dies_costs_no_line(argv: list[str], spawn: Spawn, tmp_path: Path):
    write(tmp_path / "in", [request(f"r{n}", max_tokens=300) for n in range(30)])
    process = spawn(argv)
    out = tmp_path / "out"
    eventually(lambda: lines_in(out) >= 2)
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    for child in [child for file in children for child in file.read_text().split()]:
        subprocess.run(["kill", "-9", child], check=True)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert sorted(line["custom_id"] for line in records(out)) == sorted(f"r{n}" for n in range(30))


def test_its_help_names_what_a_line_has():
    shown = subprocess.run(
        [sys.executable, "-m", "gapless", "run-batch", "--help"], capture_output=True, text=True, check=True
    )
    assert "custom_id" in shown.stdout
