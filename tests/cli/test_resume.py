"""`gapless generate --output FILE` never destroys answers, and `--resume` goes on with them."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Ran
from gapless.cli.files import read_kept
from gapless.errors import ConfigError
from support.processes import killed_after, size_of
from support.waiting import eventually

Gapless = Callable[..., Ran]


def records(path: Path) -> dict[int, dict[str, Any]]:
    """Of an output by index, each of which is there once."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["index"] for record in found}) == len(found)
    return {record["index"]: record for record in found}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twelve lines, every third of which is bad. All good ones are the same."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join("bad\n" if index % 3 == 2 else '{"prompt": "abc"}\n' for index in range(12)))
    return path


@pytest.fixture
def command(options: list[str], source: Path) -> list[str]:
    """Sampled, so that the seeds matter; up to the file of the output."""
    argv = ["generate", *options, "--ignore-eos", "--max-tokens", "8", "--temperature", "1", "--input", str(source)]
    return [*argv, "--output"]


def test_an_output_that_is_not_empty_is_refused_without_a_word_about_it(
    gapless: Gapless, command: list[str], tmp_path: Path
):
    target = tmp_path / "out.jsonl"
    target.write_text("earlier results\n")
    for argv, hints in [(command, ["--resume", "--overwrite"]), (["generate", "abc", "-o"], ["--overwrite"])]:
        ran = gapless(*argv, str(target))
        assert (ran.status, ran.out, target.read_text()) == (2, "", "earlier results\n")
        assert re.findall("--[a-z]+", ran.err) == hints
    assert gapless(*command, str(target), "--overwrite").status == 1
    assert sorted(records(target)) == list(range(12))


@pytest.mark.parametrize("lines", [0, 1, 3, 7, 12])
def test_a_resumed_output_ends_as_an_uninterrupted_one(
    gapless: Gapless, command: list[str], tmp_path: Path, lines: int
):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    ran = gapless(*command, str(whole))
    assert (ran.status, ran.err.splitlines()[-1]) == (1, f"gapless: 8 of 12 lines answered, 4 failed, in {whole}")
    text = whole.read_bytes().splitlines(keepends=True)
    assert len({tuple(record.get("token_ids", ())) for record in records(whole).values()}) == 9
    cut.write_bytes(b"".join(text[:lines]) + b"".join(text[lines:])[:20])
    ran = gapless(*command, str(cut), "--resume")
    added = "nothing to add: " if lines == 12 else ""
    assert (ran.status, ran.err.splitlines()[-1]) == (
        1,
        f"gapless: {added}8 of 12 lines answered, 4 failed, in {cut}",
    )
    assert ("is broken off: it is dropped" in ran.err) == (lines < 12)
    assert cut.read_bytes().startswith(b"".join(text[:lines]))
    assert records(cut) == records(whole)


def test_resume_starts_an_output_that_is_not_there_yet(gapless: Gapless, command: list[str], tmp_path: Path):
    assert gapless(*command, str(tmp_path / "new.jsonl"), "--resume").status == 1
    assert sorted(records(tmp_path / "new.jsonl")) == list(range(12))


@pytest.mark.parametrize(
    "content",
    [
        "notes\n",
        "notes",
        "[1]\n",
        "\n",
        '{"index": 0, "error": "x"}\nnotes',
        '{"index": 0}\n',
        '{"index": "0", "error": "x"}\n',
        '{"index": 0, "err\n{"index": 1, "error": "x"}\n',
        '{"index": 0, "error": "x"}\n{"index": 0, "error": "x"}\n',
    ],
)
def test_a_file_that_is_no_output_of_ours_is_neither_resumed_nor_changed(
    gapless: Gapless, command: list[str], tmp_path: Path, content: str
):
    target = tmp_path / "out.jsonl"
    target.write_text(content)
    ran = gapless(*command, str(target), "--resume")
    assert ran.status == 2
    assert "is no answer of gapless generate" in ran.err
    assert target.read_text() == content


def test_wherever_an_output_is_cut_its_whole_lines_are_kept(tmp_path: Path):
    target = tmp_path / "out.jsonl"
    text = b'{"index": 4, "error": "x"}\n{"index": 1, "token_ids": []}\n'
    first = text.index(b"\n") + 1
    for length in range(len(text) + 1):
        target.write_bytes(text[:length])
        kept = read_kept(target)
        assert kept.size == (0 if length < first else first if length < len(text) else len(text))
        assert set(kept.ids) == ({4, 1} if kept.size > first else {4} if kept.size else set())
        assert (kept.failed, kept.lines) == (({4}, 5) if kept.size else (set(), 0))


def test_resume_needs_files(gapless: Gapless, command: list[str], source: Path, tmp_path: Path):
    for argv, said in [
        ([*command, "-", "--resume"], "needs --input and --output FILE"),
        (["generate", "--resume", "--input", str(source)], "needs --input and --output FILE"),
        (["generate", "--resume", "abc", "--output", str(tmp_path / "o")], "needs --input and --output FILE"),
        ([*command, str(tmp_path / "o"), "--resume", "--overwrite"], "give one of them"),
    ]:
        ran = gapless(*argv)
        assert ran.status == 2
        assert said in ran.err
    with pytest.raises(ConfigError, match="not a regular file"):
        read_kept(Path("/dev/null"))


def spawned(argv: list[str], stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from gapless.cli.main import main; main()", *argv]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr, text=True)


def read_to_the_end(process: subprocess.Popen[str], terminal: int, last_words: bytes) -> bytes:
    """What the process showed on the terminal, which is closed."""
    seen = b""
    try:
        while last_words not in seen:
            seen += os.read(terminal, 4096)
    finally:
        process.wait(timeout=60)
        os.close(terminal)
    return seen


def test_an_interrupted_run_says_how_to_go_on_and_does(gapless: Gapless, options: list[str], tmp_path: Path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": "abc", "max_tokens": 1 + 7 * (place % 10)} for place in range(1_500)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["generate", *options, "--ignore-eos", "--input", str(source), "--output", str(target)]
    with killed_after(spawned(argv)) as process:
        eventually(lambda: size_of(target) > 2000)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "To go on, repeat the command with --resume" in err
    before = target.read_bytes()
    assert len(before.splitlines()) < 1_500
    assert gapless(*argv).status == 2
    assert target.read_bytes() == before
    ran = gapless(*argv, "--resume")
    assert (ran.status, ran.err) == (0, f"gapless: 1500 of 1500 lines answered, in {target}\n")
    assert target.read_bytes().startswith(before)
    assert [len(record["token_ids"]) for _, record in sorted(records(target).items())] == [
        line["max_tokens"] for line in lines
    ]


@pytest.mark.parametrize("columns", [0, 100])
def test_a_terminal_shows_how_far_the_answers_are(options: list[str], source: Path, tmp_path: Path, columns: int):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    process = spawned(
        ["generate", *options, "--max-tokens", "4", "--input", str(source), "--output", str(tmp_path / "o")], theirs
    )
    os.close(theirs)
    seen = read_to_the_end(process, ours, b"4 failed, in")
    assert re.search(rb"\r100%.* 12/12 \[.* request/s, \d+ tokens/s, 0 running\]", seen)


def test_a_terminal_shows_no_bar_where_there_is_nothing_to_add(options: list[str], tmp_path: Path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "abc"}\n')
    target.write_text('{"index": 0, "error": "x"}\n')
    ours, theirs = pty.openpty()
    process = spawned(["generate", *options, "--input", str(source), "--output", str(target), "--resume"], theirs)
    os.close(theirs)
    seen = read_to_the_end(process, ours, b"1 failed, in")
    first, second = seen.split(b"\r\n")[:2]
    assert first.startswith(b"gapless: loading")
    assert second.startswith(b"gapless: nothing to add: 0 of 1 lines answered, 1 failed, in ")


@pytest.mark.parametrize("piped", [False, True])
@pytest.mark.parametrize(
    ("line", "answer", "said"),
    [
        ('{"id": "a", "prompt": "abc"}', '{"index": 1, "id": "b", "token_ids": []}', "has the id 'a', its answer"),
        ('{"id": "a", "prompt": "abc"}', '{"index": 1, "token_ids": []}', "has the id 'a', its answer"),
        ('{"prompt": "abc"}', '{"index": 1, "id": "b", "error": "x"}', "in the output has 'b'"),
        ('{"id": 7, "prompt": 5}', '{"index": 1, "id": 8, "error": "x"}', "has the id 7, its answer"),
        ("bad", '{"index": 1, "token_ids": []}', "is no request, but the output has an answer"),
        ('{"id": 1, "tempratur": 0}', '{"index": 1, "id": 1, "token_ids": []}', "is no request"),
    ],
)
def test_answers_to_another_input_are_not_mixed_with_those_to_this_one(
    options: list[str], tmp_path: Path, line: str, answer: str, said: str, piped: bool
):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "abc"}\n\n' + line + "\n")
    target.write_text(answer + "\n")
    argv = ["generate", *options, "--input", "-" if piped else str(source), "--output", str(target), "--resume"]
    with source.open() as stdin:
        ran = subprocess.run(
            [sys.executable, "-m", "gapless", *argv], stdin=stdin, capture_output=True, text=True, check=False
        )
    assert ran.returncode == 2
    assert "line 3 of the input" in ran.stderr
    assert said in ran.stderr
    assert target.read_text() == answer + "\n"


def test_another_input_is_refused_before_a_model_is_loaded(gapless: Gapless, tmp_path: Path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "abc", "id": 1}\n')
    target.write_text('{"index": 0, "id": 2, "error": "x"}\n')
    argv = ["--model", "./no-model", "--input", str(source), "--output", str(target), "--resume"]
    ran = gapless("generate", *argv)
    assert ran.status == 2
    assert "has the id 1, its answer in the output has 2" in ran.err


def test_an_output_with_more_answers_than_the_input_has_lines_is_not_resumed(gapless: Gapless, tmp_path: Path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "abc"}\n')
    target.write_text('{"index": 1, "error": "x"}\n')
    ran = gapless("generate", "--input", str(source), "--output", str(target), "--resume")
    assert ran.status == 2
    assert "answers to 2 lines or more, the input has 1" in ran.err
