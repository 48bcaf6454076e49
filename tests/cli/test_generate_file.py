"""`gapless generate --input`: lines in, lines out, one bad line harms no other."""

import json
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Ran

Gapless = Callable[..., Ran]
Spawn = Callable[[Sequence[str]], subprocess.Popen[str]]


def write_lines(path: Path, lines: Sequence[dict[str, Any] | str]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_lines_of_every_form_are_answered(gapless: Gapless, options: list[str], tmp_path: Path):
    source = write_lines(
        tmp_path / "in.jsonl",
        [
            {"prompt": "abc", "id": "first"},
            {"prompt_token_ids": [1, 2, 3], "id": 2},
            {"messages": [{"role": "user", "content": "abc"}]},
            "",
            {"prompt": "abc", "max_tokens": 2, "seed": 5, "temperature": 0.5, "stop_token_ids": [4], "id": "last"},
        ],
    )
    target = tmp_path / "out.jsonl"
    argv = ["--input", str(source), "--output", str(target), "--max-tokens", "6", "--ignore-eos"]
    ran = gapless("generate", *options, *argv)
    assert ran.status == 0, ran.err
    assert (ran.out, ran.err) == ("", f"gapless: 4 of 4 lines answered, in {target}\n")
    records = {record["index"]: record for record in map(json.loads, target.read_text().splitlines())}
    assert sorted(records) == [0, 1, 2, 3]
    assert [records[index].get("id") for index in range(4)] == ["first", 2, None, "last"]
    assert records[0]["token_ids"] == records[1]["token_ids"]
    assert records[0]["text"] == records[1]["text"]
    assert records[0]["usage"] == {"prompt_tokens": 3, "completion_tokens": 6}
    assert records[2]["usage"]["prompt_tokens"] == 5
    assert records[0]["finish_reason"] == "length"
    assert len(records[3]["token_ids"]) <= 2


def test_an_answer_says_what_stopped_it_and_an_input_may_have_no_lines(
    gapless: Gapless, options: list[str], tmp_path: Path
):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    base = ["generate", *options, "--input", str(source), "--ignore-eos", "--max-tokens", "40"]
    write_lines(source, [{"prompt": "abc", "temperature": 0}])
    [record] = map(json.loads, gapless(*base).out.splitlines())
    assert "stop_reason" not in record
    stop = record["text"][3]
    [record] = map(json.loads, gapless(*base, "--stop", stop).out.splitlines())
    assert (record["finish_reason"], record["stop_reason"]) == ("stop", stop)
    source.write_text("")
    assert gapless(*base, "--output", str(target)).err == "gapless: the input has no lines\n"


def test_bad_lines_are_named_and_the_others_still_run(gapless: Gapless, options: list[str], tmp_path: Path):
    deep = "[" * 100_000
    lines: list[dict[str, Any] | str] = [
        {"prompt": "abc"},
        '{"prompt": "abc"',
        "",
        {"prompt": "abc", "temprature": 1},
        {"prompt": "abc", "temperature": -1, "id": "x"},
        '{"prompt": "abc", "temperature": NaN}',
        {"prompt": "abc", "prompt_token_ids": [1]},
        {"id": 5},
        "[1, 2]",
        {"prompt": ""},
        {"prompt_token_ids": [61]},
        {"messages": [{"content": "no role"}]},
        {"prompt": "abc", "max_tokens": "many"},
        '{"prompt": ' + deep,
        '{"seed": ' + "9" * 5000 + "}",
        {"prompt_token_ids": [1] * 70000},
        {"prompt": "abc"},
    ]
    source = write_lines(tmp_path / "in.jsonl", lines)
    with source.open("ab") as file:
        file.write(b'{"prompt": "\xff"}\n{"prompt": "abc"}')
    ran = gapless("generate", *options, "--input", str(source), "--max-tokens", "3")
    assert ran.status == 1
    errors = {record["line"]: record for record in ran.records() if "error" in record}
    answered = sorted(record["index"] for record in ran.records() if "error" not in record)
    assert answered == [0, 15, 17]
    assert sorted(errors) == [2, *range(4, 17), 18]
    assert "did you mean 'temperature'" in errors[4]["error"]
    assert errors[5]["id"] == "x"
    assert errors[5]["index"] == 3
    assert "temperature must be at least 0" in errors[5]["error"]
    assert "finite" in errors[6]["error"]
    assert "not UTF-8" in errors[18]["error"]
    for line in errors:
        assert f"line {line}: " in ran.err
    assert ran.err.endswith("gapless: 15 of 18 lines failed\n")
    assert "Traceback" not in ran.err


def test_files_that_can_not_be_used_are_refused_before_a_model_is_loaded(gapless: Gapless, tmp_path: Path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "abc"}])
    model = ["--model", str(tmp_path / "no-model")]
    for argv, said in [
        (["--input", str(tmp_path / "none.jsonl")], "there is no input file"),
        (["--input", str(tmp_path)], "is a folder"),
        (["--input", str(source), "--output", str(tmp_path / "no" / "out.jsonl")], "there is no folder"),
        (["--input", str(source), "--output", str(tmp_path)], "is a folder"),
        (["--input", str(source), "--output", str(source)], "both input and output"),
        (["--input", str(source), "a prompt"], "either PROMPTs or --input"),
        ([], "either PROMPTs or --input"),
    ]:
        ran = gapless("generate", *model, *argv)
        assert (ran.status, ran.out) == (2, "")
        assert said in ran.err
        assert ran.err.startswith("gapless: error: ")
        assert ran.err.count("\n") == 1
    assert source.read_text() == '{"prompt": "abc"}\n'


def test_a_model_that_is_missing_leaves_an_existing_output_alone(gapless: Gapless, tmp_path: Path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "abc"}])
    target = tmp_path / "out.jsonl"
    target.write_text("earlier results\n")
    argv = ["--model", str(tmp_path / "no-model"), "--input", str(source), "--output", str(target)]
    ran = gapless("generate", *argv, "--overwrite")
    assert ran.status == 2
    assert "no such file or folder" in ran.err
    assert target.read_text() == "earlier results\n"


def test_a_long_input_is_answered_through_a_small_window(gapless: Gapless, options: list[str], tmp_path: Path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "abc", "id": number} for number in range(500)])
    ran = gapless("generate", *options, "--max-rows", "4", "--input", str(source), "--max-tokens", "1")
    assert ran.status == 0
    assert sorted(record["id"] for record in ran.records()) == list(range(500))


def test_a_pipe_gets_each_answer_before_it_sends_the_next_line(spawn: Spawn, options: list[str]):
    process = spawn(["generate", *options, "--input", "-", "--max-tokens", "2"])
    assert process.stdin is not None
    assert process.stdout is not None
    for number in range(3):
        process.stdin.write(json.dumps({"prompt": "abc", "id": number}) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["id"] == number
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.parametrize("to_file", [False, True])
@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_interrupt_keeps_what_is_done(
    spawn: Spawn, options: list[str], tmp_path: Path, number: signal.Signals, status: int, said: str, to_file: bool
):
    target = tmp_path / "out.jsonl"
    argv = ["generate", *options, "--input", "-", "--ignore-eos"]
    process = spawn([*argv, "--output", str(target)] if to_file else argv)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    for given_id in range(8):
        process.stdin.write(json.dumps({"prompt": "abc", "id": given_id, "max_tokens": 60_000}) + "\n")
    for given_id in range(100, 103):
        process.stdin.write(json.dumps({"prompt": "abc", "id": given_id, "max_tokens": 1}) + "\n")
    process.stdin.write("not json\n")
    process.stdin.flush()
    lines: list[str] = []
    if to_file:
        assert "line 12: " in process.stderr.readline()
    else:
        lines = [process.stdout.readline() for _ in range(4)]
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    text = target.read_text() if to_file else "".join(lines) + out
    assert text.endswith("\n")
    records = [json.loads(line) for line in text.splitlines()]
    assert any("error" in record for record in records)
    if not to_file:
        assert {record["id"] for record in records if "error" not in record} == {100, 101, 102}
    assert re.search(
        rf"^gapless: {said}; {len(records)} of at least 12 lines are answered. To go on", err, re.MULTILINE
    )
    assert "Traceback" not in err
