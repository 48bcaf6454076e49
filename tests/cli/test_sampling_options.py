"""The sampling options on the command line and in lines, and what of them comes out."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Ran
from frontend.tiny import tiny_engine
from gapless import LLM
from gapless.cli.files import ResultWriter, read_kept
from gapless.cli.jobs import SAMPLING_KEYS, parse_line
from gapless.cli.prompts import print_answers, write_answers
from gapless.cli.sampling import ChatOptions, GenerateOptions, SamplingOptions
from gapless.params import SamplingParams

Gapless = Callable[..., Ran]
Spawn = Callable[[Sequence[str]], subprocess.Popen[str]]
ALL = [
    *("--n", "2", "--min-tokens", "3", "--repetition-penalty", "1.5", "--presence-penalty", "-1"),
    *("--frequency-penalty", "0.5", "--logit-bias", "5=-2.5", "--logit-bias", "6=100", "--bad-word", "xy"),
    *("--bad-word", "z", "--logprobs", "2", "--prompt-logprobs", "0", "--echo", "--stop", "q"),
]


def test_every_option_reaches_the_parameters():
    options = GenerateOptions(
        n=2,
        min_tokens=3,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=0.5,
        logit_bias=["5=-2.5", "6=100"],
        bad_word=["xy", "z"],
        logprobs=2,
        prompt_logprobs=0,
        echo=True,
        stop=["q"],
        stop_token_id=[4],
        ignore_eos=True,
        temperature=0.5,
        top_k=3,
        top_p=0.5,
        min_p=0.25,
        max_tokens=9,
    )
    assert options.params() == SamplingParams(
        n=2,
        min_tokens=3,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=0.5,
        logit_bias={5: -2.5, 6: 100},
        bad_words=["xy", "z"],
        logprobs=2,
        prompt_logprobs=0,
        echo=True,
        stop=["q"],
        stop_token_ids=(4,),
        ignore_eos=True,
        temperature=0.5,
        top_k=3,
        top_p=0.5,
        min_p=0.25,
        max_tokens=9,
    )
    assert SamplingOptions(choice=["a", "b"]).params().choice == ("a", "b")
    assert ChatOptions(json_object=True).params().json_object
    assert ChatOptions().params() == SamplingParams(temperature=0.7, top_p=0.95, max_tokens=512)
    assert GenerateOptions().params() == SamplingParams()


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_every_option_is_in_the_help(gapless: Gapless, monkeypatch: pytest.MonkeyPatch, command: str):
    monkeypatch.setenv("COLUMNS", "200")
    shown = gapless(command, "--help").out
    kind = GenerateOptions if command == "generate" else ChatOptions
    for field in fields(kind):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", shown), field.name


def test_a_line_of_the_output_has_what_was_asked_for(gapless: Gapless, options: list[str]):
    ran = gapless("generate", *options, *ALL, "--max-tokens", "6", "--raw", "-o", "-", "abc")
    assert ran.status == 0, ran.err
    [record] = ran.records()
    assert set(record) == {"index", "outputs", "prompt_logprobs", "usage"}
    assert len(record["outputs"]) == 2
    for answer in record["outputs"]:
        assert set(answer) == {"text", "token_ids", "finish_reason", "logprobs"}
        assert answer["text"].startswith("abc")
        assert [each["token_id"] for each in answer["logprobs"]] == answer["token_ids"]
        assert all(len(each["top"]) == 2 and each["rank"] >= 1 for each in answer["logprobs"])
    assert record["usage"]["completion_tokens"] == sum(len(each["token_ids"]) for each in record["outputs"])
    first, *others = record["prompt_logprobs"]
    assert first is None
    assert [each["top"] for each in others] == [[], []]


def test_a_plain_line_has_nothing_more_than_before(gapless: Gapless, options: list[str]):
    [record] = gapless("generate", *options, "--max-tokens", "2", "--raw", "-o", "-", "abc").records()
    assert set(record) == {"index", "text", "token_ids", "finish_reason", "usage"}


def test_what_a_model_excludes_is_null_and_not_infinite(gapless: Gapless, options: list[str], tmp_path: Path):
    from gapless.outputs import CompletionOutput, RequestOutput, TokenLogprob, Usage

    never = TokenLogprob(3, float("-inf"), 61, ((4, -0.5), (5, float("-inf"))))
    answer = CompletionOutput(0, "", [3], "length", [never])
    with (tmp_path / "out.jsonl").open("wb") as file:
        ResultWriter(file).result(0, None, RequestOutput("0", None, [1], [answer], True, Usage(1, 1)))
    text = (tmp_path / "out.jsonl").read_text()
    assert "Infinity" not in text
    assert json.loads(text)["logprobs"] == [{"token_id": 3, "logprob": None, "rank": 61, "top": [[4, -0.5], [5, None]]}]


def test_several_answers_to_one_prompt_are_printed_with_their_numbers(gapless: Gapless, options: list[str]):
    ran = gapless("generate", *options, "--n", "2", "--max-tokens", "4", "--ignore-eos", "--raw", "abc")
    assert ran.status == 0, ran.err
    assert re.fullmatch(r"> abc\n\[1\] (.*)\n\[2\] \1\n\n", ran.out, re.DOTALL)


def test_forms_come_as_text_or_from_a_file(gapless: Gapless, options: list[str], tmp_path: Path):
    schema = '{"enum": ["ab", "cd"]}'
    grammar = tmp_path / "lark"
    grammar.write_text('start: "ab" | "cd"')
    for argv in (
        ["--regex", "ab|cd"],
        ["--choice", "ab", "--choice", "cd"],
        ["--grammar", grammar.read_text()],
        ["--grammar", f"@{grammar}"],
    ):
        ran = gapless("generate", *options, *argv, "--raw", "abc")
        assert (ran.status, ran.out in ("ab\n", "cd\n")) == (0, True), ran.err
    (tmp_path / "schema.json").write_text(schema)
    for given in (schema, f"@{tmp_path / 'schema.json'}"):
        ran = gapless("generate", *options, "--json-schema", given, "--raw", "abc")
        assert "json_schema can not be compiled" in ran.err  # this vocabulary has no quotation mark
        assert ran.status == 2


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--n", "0"], "n must be between 1 and 128"),
        (["--n", "two"], "--n"),
        (["--min-tokens", "300"], "min_tokens 300 is more than max_tokens 256"),
        (["--repetition-penalty", "0"], "repetition_penalty must be at least 0.01"),
        (["--presence-penalty", "3"], "presence_penalty must be at least -2"),
        (["--frequency-penalty", "nan"], "frequency_penalty must be a finite number"),
        (["--logit-bias", "5"], "--logit-bias takes ID=BIAS"),
        (["--logit-bias", "a=1"], "--logit-bias takes ID=BIAS"),
        (["--logit-bias", "5=200"], "bias of token 5"),
        (["--bad-word", ""], "1 to 256 characters"),
        (["--logprobs", "21", "-o", "-"], "logprobs must be between 0 and 20"),
        (["--logprobs", "2"], "add --output FILE"),
        (["--prompt-logprobs", "2"], "add --output FILE"),
        (["--json-schema", "{"], "json_schema is not JSON"),
        (["--json-schema", "@none.json"], "--json-schema: none.json can not be read"),
        (["--json-object", "--regex", "a"], "json_object and regex"),
        (["--grammar", "@/"], "--grammar: / can not be read"),
    ],
)
def test_a_wrong_value_ends_with_status_2_before_a_model_is_loaded(gapless: Gapless, argv: list[str], said: str):
    ran = gapless("generate", "--model", "./no-model", *argv, "abc")
    assert ran.status == 2
    assert said in ran.err
    assert ran.err.startswith("gapless: error: ") or "--n" in argv
    assert "no such file or folder" not in ran.err


def test_a_file_that_is_no_text_or_too_large_is_refused(gapless: Gapless, tmp_path: Path):
    path = tmp_path / "schema"
    for content, said in ((b"\xff", "is not UTF-8"), (b" " * (2**20 + 1), "is larger than")):
        path.write_bytes(content)
        ran = gapless("generate", "--json-schema", f"@{path}", "abc")
        assert ran.status == 2
        assert said in ran.err


def test_lines_take_all_of_them_and_the_form_of_a_line_goes_over_that_of_the_command(
    gapless: Gapless, options: list[str], tmp_path: Path
):
    assert "allowed_tokens" not in SAMPLING_KEYS
    source = tmp_path / "in.jsonl"
    lines: list[dict[str, Any]] = [
        {"prompt": "abc"},
        {"prompt": "abc", "choice": ["cd"]},
        {"prompt": "abc", "regex": None, "bad_words": ["a", [4]], "logit_bias": {"5": 1}, "logprobs": 1},
        {"prompt": "abc", "n": 2, "prompt_logprobs": 1},
        {"prompt": "abc", "allowed_tokens": [1]},
        {"prompt": "abc", "regex": "(", "id": "x"},
        {"prompt": "abc", "n": 1000},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ran = gapless("generate", *options, "--regex", "ab", "--input", str(source), "--max-tokens", "5")
    records = {record["index"]: record for record in ran.records()}
    assert ran.status == 1
    assert [records[0]["text"], records[1]["text"]] == ["ab", "cd"]
    assert records[2]["text"] not in ("ab", "cd")
    assert len(records[2]["logprobs"]) == len(records[2]["token_ids"])
    assert [each["text"] for each in records[3]["outputs"]] == ["ab", "ab"]
    assert len(records[3]["prompt_logprobs"]) == 3
    assert "did you mean 'allowed_token_ids'" in records[4]["error"]
    assert "regex can not be compiled" in records[5]["error"]
    assert "between 1 and 128" in records[6]["error"]


def test_a_wrong_bias_in_a_line_is_refused():
    from gapless.cli.jobs import BadLineError

    with pytest.raises(BadLineError, match="bias of token 5"):
        parse_line(b'{"prompt": "a", "logit_bias": {"5": "x"}}', SamplingParams())


def failing(ids: Sequence[int]) -> list[int]:
    return [3] if len(ids) < 6 else []


@pytest.mark.parametrize("n", [1, 2])
def test_an_answer_that_fails_is_told_written_and_counted(n: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    params = SamplingParams(allowed_tokens=failing, n=n)
    target = tmp_path / "out.jsonl"
    with LLM.from_loaded(tiny_engine()) as llm:
        assert print_answers(llm, ["abc"], ["abc"], params) == 1
        shown = capsys.readouterr()
        assert "ccc" in shown.out
        assert "allowed_tokens allows no token" in shown.err
        assert print_answers(llm, ["abc", "abcd"], ["abc", "abcd"], params) == 2
        assert "prompt 2: allowed_tokens" in capsys.readouterr().err
        with target.open("wb") as file:
            assert write_answers(llm, ["abc"], params, ResultWriter(file)) == 1
    record = json.loads(target.read_text())
    assert record["error"] == "allowed_tokens allows no token"
    answers = [record] if n == 1 else record["outputs"]
    assert [each["finish_reason"] for each in answers] == ["error"] * n
    assert read_kept(target).failed == {0}


def test_a_line_whose_answer_fails_is_counted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from gapless.cli.batch import BatchRun
    from gapless.cli.files import Kept, open_lines

    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('\n{"prompt": "abc"}\n{"prompt": "abc", "n": 2}\n{"prompt": "abc", "max_tokens": 2}\n')
    with LLM.from_loaded(tiny_engine()) as llm, target.open("wb") as file:
        defaults = SamplingParams(allowed_tokens=failing)
        run = BatchRun(llm, defaults, ResultWriter(file), open_lines(str(source)), kept=Kept(), target=str(target))
        run.run()
    assert run.errors == 2
    said = capsys.readouterr().err
    assert "error: line 2: allowed_tokens" in said
    assert "error: line 3: allowed_tokens" in said
    assert "1 of 3 lines answered, 2 failed" in said
    assert read_kept(target).failed == {0, 1}
    assert sorted(read_kept(target).ids) == [0, 1, 2]


def test_several_answers_count_as_answered_when_a_run_is_resumed(gapless: Gapless, options: list[str], tmp_path: Path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "abc", "n": 2}\n{"prompt": "abc"}\n')
    argv = ["generate", *options, "--temperature", "1", "--max-tokens", "8", "--input", str(source), "-o", str(target)]
    assert gapless(*argv).status == 0
    whole = target.read_text().splitlines(keepends=True)
    for line in whole:
        target.write_text(line)
        assert gapless(*argv, "--resume").status == 0
        assert sorted(target.read_text().splitlines(keepends=True)) == sorted(whole)


def test_chat_takes_a_form(spawn: Spawn, model: Path):
    argv = ["chat", "--model", str(model), "--load", "random", "--device", "cpu", "--kv-cache-memory", "8M"]
    process = spawn([*argv, "--choice", "abc", "--choice", "cba", "--max-model-len", "64"])
    out, err = process.communicate("hello\n", timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out in ("abc\n", "cba\n")
