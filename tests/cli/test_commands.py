"""Options, configuration order, plain prompts, chat, env, and how the program ends."""

import fcntl
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import typer

from cli.conftest import Ran
from gapless.cli.command import join_lines
from gapless.cli.options import parse_size

Gapless = Callable[..., Ran]
Spawn = Callable[[Sequence[str]], subprocess.Popen[str]]


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("32K", 32768), ("32k", 32768), ("1.5M", 3 * 2**19), ("4G", 2**32), ("4GiB", 2**32), (7, 7)],
)
def test_sizes_have_units(text: str | int, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "-1", "1.3", "4X", "1e9", "0x10", "99999999999999999999", "4 4"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(typer.BadParameter, match="not a size"):
        parse_size(text)


def test_one_prompt_prints_its_answer(gapless: Gapless, options: list[str]):
    chat = gapless("generate", *options, "--max-tokens", "8", "--ignore-eos", "abc")
    assert chat.status == 0, chat.err
    assert chat.out.endswith("\n")
    assert chat.err == ""
    raw = gapless("generate", *options, "--max-tokens", "8", "--ignore-eos", "--raw", "abc\na")
    assert raw.out == chat.out


def test_several_prompts_are_shown_with_their_answers_in_order(gapless: Gapless, options: list[str]):
    ran = gapless("generate", *options, "--max-tokens", "4", "--raw", "abc", "", "xyz")
    assert ran.status == 1
    assert ran.out.startswith("> abc\n")
    assert ran.out.index("> abc") < ran.out.index("> xyz")
    assert "prompt 2: the prompt is empty" in ran.err


def test_prompts_can_be_written_as_json(gapless: Gapless, options: list[str]):
    ran = gapless("generate", *options, "--max-tokens", "4", "--output", "-", "--raw", "abc", "")
    assert ran.status == 1
    records = {record["index"]: record for record in ran.records()}
    assert records[0]["usage"]["prompt_tokens"] == 3
    assert "empty" in records[1]["error"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--temperature", "-1"], "temperature must be at least 0"),
        (["--temperature", "nan"], "temperature must be a finite number"),
        (["--temperature", "inf"], "temperature must be a finite number"),
        (["--top-p", "0"], "top_p must be above 0"),
        (["--max-tokens", "0"], "max_tokens must be between 1"),
        (["--block-size", "3"], "power of two"),
        (["--lookahead", "-1"], "lookahead must be an integer between 0"),
        (["--dtype", "int4"], "dtype must be one of"),
        (["--load", "dummy"], "--load must be auto or random"),
        (["--shape", "llama-1b", "--tokenizer", "."], "--shape goes with --load random"),
        (["--shape", "llama-1b", "--load", "random"], "add --tokenizer FOLDER, or give --input FILE"),
        (["--model", "./no-model"], "no such file or folder"),
        (["--max-model-len", "many"], "not a size"),
        (["--max-rows", "few"], "--max-rows"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_a_wrong_option_ends_with_status_2(gapless: Gapless, argv: list[str], said: str):
    ran = gapless("generate", *argv, "a prompt")
    assert ran.status == 2
    assert said in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("name", "hint"), [("GAPLESS_MAX_TOKEN", "; did you mean GAPLESS_MAX_TOKENS?"), ("GAPLESS_FOO", "")]
)
@pytest.mark.parametrize("command", [["env"], ["generate", "abc"], ["bench", "host"]])
def test_a_variable_that_no_option_reads_is_an_error(
    gapless: Gapless, monkeypatch: pytest.MonkeyPatch, command: list[str], name: str, hint: str
):
    monkeypatch.setenv(name, "4")
    ran = gapless(*command)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err == f"gapless: error: the environment has {name}, which no option reads{hint}\n"


def test_variables_of_a_service_beside_the_container_are_none_of_ours(
    gapless: Gapless, monkeypatch: pytest.MonkeyPatch
):
    for name in ("SERVICE_HOST", "SERVICE_PORT_HTTP", "PORT_8000_TCP", "PORT_8000_TCP_ADDR"):
        monkeypatch.setenv(f"GAPLESS_TEST_{name}", "x")
    monkeypatch.setenv("GAPLESS_TEST_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("GAPLESS_CACHE", "/tmp")
    monkeypatch.setenv("GAPLESS_MAX_BODY", "8M")  # of another command
    assert gapless("env").status == 0
    monkeypatch.setenv("GAPLESS_TEST_PORT", "80")  # meant for us
    assert gapless("env").status == 2


def test_what_only_the_model_can_tell_is_refused_too(gapless: Gapless, options: list[str]):
    assert gapless("generate", *options, "--max-model-len", "1M", "abc").status == 2
    ran = gapless("generate", *options, "--stop-token-id", "61", "--raw", "abc")
    assert ran.status == 2
    assert "outside the vocabulary" in ran.err


def test_debug_shows_the_traceback_and_keeps_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from gapless.cli.main import main

    monkeypatch.setenv("GAPLESS_DEBUG", "1")
    with pytest.raises(SystemExit) as left:
        main(["generate"])
    assert left.value.code == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_command_line_goes_over_the_environment_over_the_file_over_the_default(
    gapless: Gapless, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "options.yaml"
    file.write_text("max-tokens: 3\nignore_eos: true\nmax-model-len: 1K\n")
    base = ["generate", *options, "--raw", "--output", "-"]

    def tokens(*more: str) -> int:
        ran = gapless(*base, *more, "abc")
        assert ran.status == 0, ran.err
        return len(ran.records()[0]["token_ids"])

    assert tokens("--config", str(file)) == 3
    monkeypatch.setenv("GAPLESS_MAX_TOKENS", "4")
    assert tokens("--config", str(file)) == 4
    assert tokens("--config", str(file), "--max-tokens", "5") == 5
    monkeypatch.delenv("GAPLESS_MAX_TOKENS")
    monkeypatch.setenv("GAPLESS_CONFIG", str(file))
    assert tokens() == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("max_tokns: 3\n", "did you mean 'max-tokens'"),
        ("[1, 2]\n", "must hold"),
        ("a: [\n", "not valid YAML, line"),
        ("max_tokens: many\n", "options.yaml: max-tokens: 'many'"),
        ("max-model-len: many\n", "options.yaml: max-model-len: 'many' is not a size such"),
        ("temperature: .nan\n", "finite"),
        ("max_tokens:\n", "options.yaml: max_tokens has no value"),
        ("stop: []\n", "options.yaml: stop has no value"),
        ("model: 0123\n", "options.yaml: model must be a text, not '83': write it in quotes"),
        ("stop: [a, 1.10]\n", "options.yaml: stop must be a text, not '1.1': write it in quotes"),
    ],
)
def test_a_wrong_config_file_ends_with_status_2(gapless: Gapless, tmp_path: Path, content: str, said: str):
    file = tmp_path / "options.yaml"
    file.write_text(content)
    ran = gapless("generate", "--config", str(file), "abc")
    assert ran.status == 2
    assert said in ran.err


def test_a_wrong_value_is_blamed_on_the_environment_or_the_option_it_came_from(
    gapless: Gapless, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GAPLESS_MAX_TOKENS", "abc")
    for command in (["generate", "abc"], ["chat"]):
        ran = gapless(*command)
        assert ran.status == 2
        assert re.fullmatch("gapless: error: GAPLESS_MAX_TOKENS: 'abc'.* valid integer.*\n", ran.err)
    ran = gapless("generate", "--max-tokens", "abd", "abc")
    assert ran.status == 2
    assert "--max-tokens" in ran.err
    assert "GAPLESS" not in ran.err


@pytest.mark.parametrize("content", ["stop_token_id: 61", "stop-token-id: [3, 61]"])
def test_an_option_that_may_be_repeated_may_stand_alone_in_a_file(
    gapless: Gapless, options: list[str], tmp_path: Path, content: str
):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    ran = gapless("generate", *options, "--config", str(file), "--raw", "abc")
    assert ran.status == 2
    assert "61 is outside the vocabulary" in ran.err


def test_a_missing_config_file_ends_with_status_2(gapless: Gapless, tmp_path: Path):
    ran = gapless("chat", "--config", str(tmp_path / "none.yaml"))
    assert ran.status == 2
    assert "can not be read" in ran.err


@pytest.mark.parametrize("leave", ["/exit", "/quit"])
def test_chat_reads_turns_from_a_pipe(spawn: Spawn, model: Path, leave: str):
    argv = ["chat", "--model", str(model), "--load", "random", "--device", "cpu", "--kv-cache-memory", "8M"]
    process = spawn([*argv, "--temperature", "0", "--max-tokens", "5", "--max-model-len", "64"])
    turns = ["abc", "", "/help", "/nonsense", "/reset", "abc", "a" * 80, leave, "never read"]
    out, err = process.communicate("\n".join(turns) + "\n", timeout=60)
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert "/reset  forget the conversation" in lines
    assert "There is no command /nonsense; /help lists them." in lines
    anew = out.index("The conversation starts anew.\n")
    first = out[: out.index("/reset  forget")]
    assert first == out[anew + len("The conversation starts anew.\n") :]
    assert "the prompt has" in err
    assert err.count("\n") == 1


def test_env_tells_versions_devices_and_folders(gapless: Gapless):
    ran = gapless("env", "--json")
    assert ran.status == 0
    facts = json.loads(ran.out)
    assert {"python", "packages", "cores", "devices", "model_cache", "hub_cache", "demo_model"} <= set(facts)
    assert facts["packages"]["torch"]
    assert any(device.startswith("cpu") for device in facts["devices"])
    assert Path(facts["hub_cache"]).is_absolute()
    shown = gapless("env").out
    assert f"                 torch {facts['packages']['torch']}\n" in shown
    assert f"model cache      {facts['model_cache']}\n" in shown


def test_env_tells_the_hub_folder_that_was_chosen(gapless: Gapless, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", "~/elsewhere")
    assert json.loads(gapless("env", "--json").out)["hub_cache"] == str(Path.home() / "elsewhere")


def test_the_help_shows_what_a_size_looks_like(gapless: Gapless):
    shown = gapless("generate", "--help").out
    assert all(size in shown for size in ("2G", "512M", "32K", "(32768)"))


def test_the_help_is_as_wide_as_the_terminal_and_leaves_examples_alone():
    text = """First line.

    A paragraph
    of two lines: read
    --this and `that`.
    {"id": "an example"}

    gapless one
    gapless two
    """
    assert join_lines(text).splitlines() == [
        "First line.",
        "",
        "A paragraph of two lines: read --this and `that`.",
        '{"id": "an example"}',
        "",
        "gapless one",
        "gapless two",
    ]


def test_a_prompt_that_is_not_utf_8_is_refused(spawn: Spawn):
    process = spawn(["generate", "good", os.fsdecode(b"bad \xff bytes")])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (2, "", "gapless: error: prompt 2 is not UTF-8\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_error(closed: str):
    command = f"exec {sys.executable} -m gapless env {closed}"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("python") == (">&-" not in closed.replace("2>&-", ""))


def test_an_error_keeps_its_status_where_nobody_reads_it():
    command = f"exec {sys.executable} -m gapless generate 2>&-"
    assert subprocess.run(["sh", "-c", command], timeout=60, check=False).returncode == 2


def test_version_and_help(gapless: Gapless):
    assert gapless("--version").out.startswith("gapless 0.")
    for command in ("generate", "chat", "env", "demo", "bench"):
        ran = gapless(command, "--help")
        assert ran.status == 0
        assert "Usage" in ran.out
    assert gapless("no-such-command").status == 2


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "run-batch", "timeline", "env", "demo"])
def test_no_option_is_cut_off_in_a_help_of_80_columns(gapless: Gapless, monkeypatch: pytest.MonkeyPatch, command: str):
    monkeypatch.setenv("COLUMNS", "80")
    assert "…" not in gapless(command, "--help").out


def read_until(terminal: int, marker: str) -> str:
    """What the program shows up to and with a marker."""
    seen = ""
    while marker not in seen:
        seen += os.read(terminal, 4096).decode("utf-8", "replace")
    return seen


def press_ctrl_c(terminal: int, taken: Callable[[], bool]) -> None:
    """Press until it is taken: a signal that comes between a prompt and the wait for its answer interrupts neither."""
    for _ in range(30):
        os.write(terminal, b"\x03")
        if taken():
            return
    raise AssertionError("Ctrl-C did nothing")


def shows(terminal: int, marker: str) -> bool:
    """Whether the program shows a marker within two seconds."""
    seen = ""
    while marker not in seen:
        if not select.select([terminal], [], [], 2.0)[0]:
            return False
        seen += os.read(terminal, 4096).decode("utf-8", "replace")
    return True


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(timeout=2.0)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_in_a_terminal_ctrl_c_stops_the_answer_and_twice_leaves(model: Path):
    ours, theirs = pty.openpty()
    argv = ["chat", "--model", str(model), "--load", "random", "--device", "cpu", "--kv-cache-memory", "64M"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from gapless.cli.main import main; main()", *argv, "-t", "0", "--max-tokens", "60000"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    try:
        read_until(ours, "lists the commands.\r\n> ")
        os.write(ours, b"abc\n")
        read_until(ours, "abc\r\n")
        os.read(ours, 1)
        os.write(ours, b"\x03")
        read_until(ours, "[stopped]\r\n> ")
        os.write(ours, b"/help\n")
        read_until(ours, "leaves.\r\n> ")
        press_ctrl_c(ours, lambda: shows(ours, "Ctrl-C again or /exit leaves.\r\n> "))
        press_ctrl_c(ours, lambda: has_ended(process))
        assert process.returncode == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
