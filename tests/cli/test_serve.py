"""The server as a process: how it starts, what it does when its engine dies, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.conftest import Ran
from gapless.config import EngineConfig
from gapless.server import run
from gapless.server.config import ServerConfig
from gapless.server.run import bind
from gapless.server.supervisor import start_message
from support.waiting import eventually

RUN = [sys.executable, "-c", "from gapless.cli.main import main; main()"]
LONG = {"prompt": [1, 2, 3], "max_tokens": 50_000, "ignore_eos": True, "temperature": 0}


class Serving:
    """`gapless serve` on a free port."""

    def __init__(self, argv: list[str]) -> None:
        self.process = subprocess.Popen(
            [*RUN, "serve", *argv, "--port", "0", "--log-format", "json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[dict[str, Any]] = []
        self.other: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        eventually(lambda: self.url is not None or self.process.poll() is not None)
        self.client = httpx.Client(base_url=self.url or "", timeout=60)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.lines.append(json.loads(line))
            except ValueError:
                self.other.append(line)

    @property
    def url(self) -> str | None:
        found = [re.search(r"listening at (http\S+);", line["message"]) for line in list(self.lines)]
        return next((each[1] for each in found if each), None)

    def ready(self) -> None:
        eventually(lambda: self.client.get("/ready").status_code == 200)

    def running(self) -> int:
        return self.client.get("/debug/stats").json()["running"]

    def engine_pid(self) -> int:
        """Of the one child that runs the engine."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        [pid] = [int(pid) for file in children for pid in file.read_text().split()]
        return pid

    @contextmanager
    def streaming(self) -> Generator[Iterator[str]]:
        with self.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            yield lines

    def ended(self) -> int:
        """The exit status, once nothing is left of it."""
        status = self.process.wait(60)
        self._reader.join(60)
        assert self.process.stdout is not None
        assert self.process.stdout.read() == ""
        return status

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture
def serve(model: Path) -> Iterator[Callable[..., Serving]]:
    started: list[Serving] = []

    def start(*argv: str) -> Serving:
        base = ["--model", str(model), "--load", "random", "--device", "cpu", "--num-blocks", "8K", "--max-rows", "8"]
        started.append(Serving([*base, *argv]))
        return started[-1]

    yield start
    for each in started:
        each.close()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_sigterm_takes_nothing_new_lets_requests_finish_and_ends_with_status_0(serve: Callable[..., Serving]):
    server = serve()
    assert server.client.get("/health").status_code == 200  # while the model is being loaded, too
    server.ready()
    engine = server.engine_pid()
    short = {**LONG, "max_tokens": 2000, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=short) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        refused = httpx.post(f"{server.url}/v1/completions", json=LONG)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        rest = list(lines)
    assert json.loads(rest[-4].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert rest[-2] == "data: [DONE]"
    assert server.ended() == 0
    assert gone(engine)
    assert not server.other


def test_what_has_not_finished_within_the_drain_window_ends_with_an_error(serve: Callable[..., Serving]):
    server = serve("--drain-seconds", "0.2")
    server.ready()
    with server.streaming() as lines:
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    error = json.loads(rest[-2].removeprefix("data: "))["error"]
    assert (error["message"], error["code"]) == ("the server is shutting down", "unavailable")
    assert server.ended() == 0


def test_a_second_ctrl_c_ends_at_once(serve: Callable[..., Serving]):
    server = serve("--drain-seconds", "600")
    server.ready()
    engine = server.engine_pid()
    with server.streaming():
        server.process.send_signal(signal.SIGINT)
        eventually(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        server.process.send_signal(signal.SIGINT)
        assert server.ended() == 130
    assert gone(engine)
    assert not server.other


def test_an_engine_that_dies_is_started_once_more_and_whoever_waited_is_told(serve: Callable[..., Serving]):
    server = serve()
    server.ready()
    first = server.engine_pid()
    with server.streaming() as lines:
        os.kill(first, signal.SIGKILL)
        rest = [line for line in lines if line]
        assert httpx.get(f"{server.url}/health").status_code == 503
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    server.ready()
    assert server.engine_pid() != first
    answer = server.client.post("/v1/completions", json={**LONG, "max_tokens": 3})
    assert answer.json()["usage"]["completion_tokens"] == 3
    os.kill(server.engine_pid(), signal.SIGKILL)
    assert server.ended() == 1
    assert "has ended with status -9" in "".join(server.other)


def test_a_signal_while_the_model_is_being_loaded_is_not_waited_for(serve: Callable[..., Serving]):
    server = serve()
    eventually(lambda: len(list(Path(f"/proc/{server.process.pid}/task").glob("*/children"))) > 0)
    engine = server.engine_pid()
    server.process.send_signal(signal.SIGTERM)
    assert server.ended() == 0
    assert gone(engine)
    assert not server.other


def test_an_engine_that_does_not_answer_is_told_of_at_health_and_ended(serve: Callable[..., Serving]):
    server = serve("--stall-seconds", "6")
    server.ready()
    engine = server.engine_pid()
    with server.streaming() as lines:
        os.kill(engine, signal.SIGSTOP)
        assert httpx.get(f"{server.url}/health", timeout=10).status_code == 503
        assert any("error" in line for line in lines)  # once it is ended
    eventually(lambda: gone(engine))
    server.ready()


def test_without_a_restart_it_ends_with_its_engine(serve: Callable[..., Serving]):
    server = serve("--no-restart")
    server.ready()
    with server.streaming() as lines:
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert any("error" in line for line in lines)
    assert server.ended() == 1


def test_the_engine_ends_with_its_server(serve: Callable[..., Serving]):
    server = serve()
    server.ready()
    engine = server.engine_pid()
    with server.streaming():
        server.process.kill()
        server.process.wait()
        eventually(lambda: gone(engine))


def test_a_server_without_work_uses_no_cpu(serve: Callable[..., Serving]):
    server = serve()
    server.ready()
    answer = server.client.post("/v1/completions", json={**LONG, "max_tokens": 50})
    assert answer.status_code == 200
    pids = [server.process.pid, server.engine_pid()]

    def ticks() -> list[int]:
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split() for pid in pids]
        return [int(each[11]) + int(each[12]) for each in stats]

    def switches() -> int:
        """How often a thread of theirs has woken of itself: a clock that ticks shows here, however cheap it is."""
        files = [file for pid in pids for file in Path(f"/proc/{pid}/task").glob("*/status")]
        return sum(int(re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", f.read_text(), re.M)[0]) for f in files)

    looks = threading.Event()
    before, woken = ticks(), switches()
    looks.wait(3.0)
    assert sum(ticks()) - sum(before) <= 2  # hundredths of a second
    assert switches() - woken < 20


LANE_OF = {
    **dict.fromkeys(("plan", "fill", "launch", "collect", "commit", "publish"), "host"),
    "copy in": "h2d",
    "compute": "compute",
    "copy out": "d2h",
}


def timelines(server: Serving, steps: int) -> dict[str, dict[int, dict[str, Any]]]:
    """By the name of the run: the spans of each step by their names."""
    answer = server.client.get(f"/debug/timeline?steps={steps}")
    names: dict[tuple[int, ...], str] = {}
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for event in answer.json()["traceEvents"]:
        if event["ph"] == "M" and event["name"] == "process_name":
            names[event["pid"],] = event["args"]["name"]
        elif event["ph"] == "M" and event["name"] == "thread_name":
            names[event["pid"], event["tid"]] = event["args"]["name"]
        elif event["ph"] == "X":
            name = event["args"]["name"]
            assert names[event["pid"], event["tid"]] == LANE_OF[name]
            spans = found.setdefault(names[event["pid"],], {}).setdefault(event["args"]["step"], {})
            assert name not in spans
            spans[name] = event
    return found


def test_the_timeline_of_the_last_steps_shows_the_lanes_and_what_ran_ahead(
    serve: Callable[..., Serving], gapless: Callable[..., Ran], tmp_path: Path
):
    server = serve("--api-key", "sesame")
    server.client.headers["authorization"] = "Bearer sesame"
    server.ready()
    assert httpx.get(f"{server.url}/debug/timeline").status_code == 401
    assert timelines(server, 10) == {}
    for lookahead in (1, 0):
        wanted = {"lookahead": lookahead, "seconds": 600, "lease": "test"}
        assert server.client.post("/debug/lookahead", json=wanted).json() == wanted
        assert server.client.post("/v1/completions", json={**LONG, "max_tokens": 40}).status_code == 200
    runs = timelines(server, 10)
    assert set(runs) == {"lookahead 0", "lookahead 1"}
    for name, steps in runs.items():
        first = min(steps)
        assert sorted(steps) == list(range(first, first + 10))
        for number, spans in steps.items():
            assert set(spans) == set(LANE_OF)
            begins = [spans[each]["ts"] for each in ("plan", "fill", "launch", "copy in", "compute", "copy out")]
            assert begins == sorted(begins)
            assert spans["commit"]["ts"] >= spans["copy out"]["ts"] + spans["copy out"]["dur"]
            assert len({span["args"]["slot"] for span in spans.values()}) == 1
            if number > first:
                before = steps[number - 1]
                # what makes the difference: the next step is on its way before the last one is read
                assert (spans["launch"]["ts"] < before["collect"]["ts"]) == (name == "lookahead 1")
                if name == "lookahead 1":
                    assert spans["plan"]["args"]["slot"] != before["plan"]["args"]["slot"]
    trace = tmp_path / "trace.json"
    trace.write_bytes(server.client.get("/debug/timeline?steps=10").content)
    assert gapless("timeline", str(trace), "-o", str(tmp_path / "page.html")).status == 0
    metrics = server.client.get("/metrics").text
    assert re.search(r"gapless_time_to_first_token_seconds_count\{.*\} 2.0\n", metrics)  # they were not streamed
    assert re.search(r"gapless_inter_token_latency_seconds_count\{.*\} 78.0\n", metrics)


def test_without_a_timeline_there_is_none(serve: Callable[..., Serving]):
    server = serve("--no-timeline")
    server.ready()
    assert server.client.post("/v1/completions", json={**LONG, "max_tokens": 5}).status_code == 200
    assert timelines(server, 10) == {}


def test_what_is_wrong_is_said_before_or_when_the_model_is_loaded(gapless: Callable[..., Ran], tmp_path: Path):
    for argv, status, text in (
        (["--port", "99999"], 2, "port must be 0 to 65535"),
        (["--api-key", ""], 2, "API key"),
        (["--shape", "llama-1b"], 2, "--load random"),
        (["--log-format", "xml"], 2, "text or json"),
        (["--tool-parser", "nonsense", "--port", "0"], 2, "tool"),
        (["--host", "300.1.1.1"], 2, "can not listen"),
        (["--model", str(tmp_path / "none"), "--port", "0"], 2, "no such file or folder"),
    ):
        ran = gapless("serve", *argv)
        assert (ran.status, ran.out) == (status, ""), argv
        assert text in ran.err, argv


@pytest.mark.parametrize("key", ["", "  "])
def test_an_empty_key_in_the_environment_opens_nothing(
    gapless: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, key: str
):
    monkeypatch.setenv("GAPLESS_API_KEY", key)
    ran = gapless("serve", "--port", "0")
    assert ran.status == 2
    assert "GAPLESS_API_KEY is empty" in ran.err


@pytest.mark.parametrize("line", ["api-key:", "api-key: []", "api_key: ''", "api-key: 0123"])
def test_a_key_in_a_file_that_is_none_opens_nothing(gapless: Callable[..., Ran], tmp_path: Path, line: str):
    file = tmp_path / "serve.yaml"
    file.write_text(f"{line}\nport: 0\n")
    ran = gapless("serve", "--config", str(file))
    assert (ran.status, ran.out) == (2, "")
    assert "key" in ran.err


def test_a_server_that_lets_everybody_in_says_so(gapless: Callable[..., Ran], tmp_path: Path):
    argv = ["serve", "--model", str(tmp_path / "none"), "--port", "0", "--host"]
    assert "whoever reaches 0.0.0.0 is let in" in gapless(*argv, "0.0.0.0").err
    assert "let in" not in gapless(*argv, "127.0.0.1").err
    assert "let in" not in gapless(*argv, "0.0.0.0", "--api-key", "a-key").err


def test_a_port_that_is_taken_is_said_at_once(gapless: Callable[..., Ran]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = gapless("serve", "--port", str(taken.getsockname()[1]))
    assert ran.status == 2
    assert "can not listen at 127.0.0.1" in ran.err


def test_what_is_sent_leaves_at_once():
    """asyncio turns Nagle's algorithm off only where it knows that a socket is TCP's; else an answer waits 40 ms."""
    with bind(ServerConfig(port=0)) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_the_demo_model_answers_to_that_name_too():
    start = start_message("demo", EngineConfig(), load="auto", shape=None, tokenizer=None, timeline=0)
    server = run._Server(start, ServerConfig(), None)  # pyright: ignore[reportPrivateUsage]
    assert server.context.alias == "demo"
