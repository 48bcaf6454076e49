"""The security properties that need more than a request: processes, folders, pages, and many tenants at once."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import socket
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.conftest import SHAPE
from cli.test_serve import Serving
from frontend.tiny import TEMPLATE, num_held_blocks, tiny_engine, tiny_inner
from gapless.config import EngineConfig
from gapless.server.page.routes import FILES, POLICY
from gapless.server.supervisor import Supervisor, start_message
from grammar.test_workers import HOSTILE
from support.hash_model import EOS, expected_tokens
from support.server import RunningServer, running_server
from support.waiting import eventually

CODE = "open({path!r}, 'a').write(__name__)\n"
NAMES = ("__init__", "modeling_tiny", "tokenization_tiny", "msgspec", "numpy", "sitecustomize", "usercustomize")


def folder_of(path: Path, **more: Any) -> Path:
    """A model without weights, for load="random"."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**SHAPE, **more}))
    settings = {"chat_template": TEMPLATE, "eos_token": "<end>", **more}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    tiny_inner().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    started: list[Serving] = []

    def start(*argv: str) -> Serving:
        base = ["--model", str(folder_of(tmp_path / "model")), "--load", "random", "--device", "cpu"]
        started.append(Serving([*base, "--num-blocks", "64", *argv]))
        started[-1].ready()
        return started[-1]

    yield start
    for each in started:
        each.close()


# ------------------------------------------------- 1, 8: what the processes talk to


def network_sockets(pid: int) -> list[tuple[int, int]]:
    """Local port and state (10 listens, 1 is connected) of a process's TCP and UDP sockets."""
    inodes: set[str] = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.update(re.findall(r"^socket:\[(\d+)\]$", os.readlink(link)))
        except FileNotFoundError:
            continue
    found: list[tuple[int, int]] = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if rest[5] in inodes:
                found.append((int(local.rpartition(":")[2], 16), int(state, 16)))
    return found


def child_pids(pid: int) -> list[str]:
    return [child for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads /proc")
def test_the_server_has_one_port_and_its_other_processes_no_network_socket(serve: Callable[..., Serving]):
    server = serve()
    body = {"prompt": [1, 2], "max_tokens": 2, "regex": "[a-c]+"}
    assert server.client.post("/v1/completions", json=body).status_code == 200
    port = httpx.URL(server.url or "").port
    ours = network_sockets(server.process.pid)
    assert (port, 10) in ours
    assert {each for each, _ in ours} == {port}  # nothing it has called itself
    children = [int(child) for child in child_pids(server.process.pid)]
    assert len(children) >= 2  # the engine, and what compiles forms
    assert all(network_sockets(pid) == [] for pid in children)


# ------------------------------------------------------------- 3: a model's folder


def test_a_model_folder_runs_no_code_even_where_the_server_is_started_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ran = tmp_path / "ran"
    classes = {"AutoConfig": "modeling_tiny.C", "AutoModelForCausalLM": "modeling_tiny.M"}
    folder = folder_of(tmp_path / "model", auto_map={**classes, "AutoTokenizer": ["tokenization_tiny.T", None]})
    for name in NAMES:
        (folder / f"{name}.py").write_text(CODE.format(path=str(ran)))
    monkeypatch.chdir(folder)
    config = EngineConfig(device="cpu", num_blocks=64, max_rows=4)

    async def start(model: str) -> None:
        supervisor = Supervisor(
            start_message(model, config, load="random", shape=None, tokenizer=None, timeline=0), restart=False
        )
        running = asyncio.create_task(supervisor.run())
        while supervisor.state == "starting":
            await asyncio.sleep(0.02)
        assert supervisor.state == "ready", supervisor.error
        await supervisor.close()
        await running

    for model in (str(folder), "."):
        asyncio.run(start(model))
    assert not ran.exists()


# --------------------------------------------------------------- 6: hostile forms


def test_the_server_answers_others_while_a_hostile_form_is_refused(demo_server: RunningServer):
    async def together() -> tuple[httpx.Response, int]:
        async with httpx.AsyncClient(base_url=demo_server.url, timeout=60) as client:
            body = {"prompt": "x", "json_schema": {"title": "of this test", **HOSTILE}}
            hostile = asyncio.create_task(client.post("/v1/completions", json=body))
            answered = 0
            while not hostile.done():
                answer = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
                assert answer.status_code == 200
                answered += not hostile.done()
            return await hostile, answered

    refused, answered = asyncio.run(together())
    assert refused.status_code == 400, refused.text
    assert answered >= 3


# ------------------------------------------------- 7: one request fails in the middle of its batch


@pytest.mark.parametrize("stream", [False, True])
def test_a_row_that_can_not_go_on_ends_alone_in_a_running_batch(demo_server: RunningServer, stream: bool):
    """Behind six letters its form has only digits left, and a digit ends the request."""
    with httpx.Client(base_url=demo_server.url, timeout=60) as client:
        digits = [client.post("/tokenize", json={"prompt": digit}).json()["tokens"] for digit in "0123456789"]
    assert all(len(ids) == 1 for ids in digits)
    bad = {
        "prompt": "x",
        "max_tokens": 40,
        "temperature": 0,
        "regex": "([ab] ){6}[0-9]+",
        "stop_token_ids": [ids[0] for ids in digits],
        "stream": stream,
    }
    good = [{"prompt": prompt, "max_tokens": 40, "temperature": 0, "return_token_ids": True} for prompt in "abcdef"]

    async def rounds() -> tuple[list[httpx.Response], list[httpx.Response], list[httpx.Response]]:
        async with httpx.AsyncClient(base_url=demo_server.url, timeout=60) as client:

            async def post(body: dict[str, Any]) -> httpx.Response:
                return await client.post("/v1/completions", json=body)

            before = await asyncio.gather(*[post(body) for body in good])
            mixed = await asyncio.gather(*[post(body) for each in good for body in (each, bad)])
            return before, mixed[::2], mixed[1::2]

    before, beside, failed = asyncio.run(rounds())
    assert [each.json()["choices"] for each in beside] == [each.json()["choices"] for each in before]
    for each in failed:
        if stream:
            *texts, error, done = [line[6:] for line in each.text.splitlines() if line]
            assert "".join(json.loads(text)["choices"][0]["text"] for text in texts).strip(" ab") == ""
            assert done == "[DONE]"
            error = json.loads(error)["error"]
        else:
            assert each.status_code == 400
            error = each.json()["error"]
        assert error["code"] == "answer_failed"
        assert error["message"].startswith("the answer can not go on: the grammar allows only tokens")
    eventually(lambda: demo_server.engine.held_blocks == 0)


# ------------------------------------------- 10: nobody sees anything of another


def marked(place: int) -> list[int]:
    """A prompt that no other has: half of it is of this request alone."""
    return [1 + place % 31, 1 + place // 31, *([1 + place % 29] * 6), 2, 2, 3, *([1 + place % 23] * 4)]


def test_under_cancels_preemptions_and_evictions_every_answer_is_that_of_its_own_prompt():
    """The model's tokens are hashes of the whole prefix, so one foreign token in a KV block changes the answer."""
    chance = random.Random(5)
    loaded = tiny_engine(lookahead=1, num_blocks=70, max_rows=8)
    with running_server(loaded) as server:

        async def one(client: httpx.AsyncClient, place: int, leaves: int | None) -> tuple[int, list[int]]:
            body = {
                "prompt": marked(place),
                "max_tokens": 60,
                "temperature": 0,
                "return_token_ids": True,
                "stream": True,
                "cache_salt": str(place % 3),
            }
            found: list[int] = []
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        found += json.loads(line[6:])["choices"][0].get("token_ids", [])
                        if leaves is not None and len(found) >= leaves:
                            break
            return place, found

        async def all_of() -> list[tuple[int, list[int]]]:
            limits = httpx.Limits(max_connections=24)
            async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
                places = [chance.randrange(40) for _ in range(120)]  # some come again, and find their blocks
                left = [chance.randrange(1, 40) if chance.random() < 0.3 else None for _ in places]
                return await asyncio.gather(*[one(client, *each) for each in zip(places, left, strict=True)])

        answers = asyncio.run(all_of())
        eventually(lambda: num_held_blocks(loaded) == 0)
        stats = loaded.engine.stats().scheduler
    whole = 0
    for place, found in answers:
        prompt = marked(place)
        expected = expected_tokens(prompt, len(prompt) + 60, [EOS])
        assert found == expected[: len(found)], place
        whole += len(found) == len(expected)
    assert 60 <= whole < len(answers)
    assert stats.preemptions > 0
    assert stats.cached_tokens > 0


# ---------------------------------------------- 11: leaving before the answer, or the request


def test_a_client_that_leaves_within_its_body_is_no_defect(
    tiny_server: RunningServer, caplog: pytest.LogCaptureFixture
):
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
    with socket.create_connection(("127.0.0.1", tiny_server.port)) as connection:
        connection.sendall(f'{head}X-Request-Id: left-early\r\n\r\n{{"prompt'.encode())
    eventually(lambda: any(each[0] == "left-early" for each in tiny_server.observer.refusals))
    assert tiny_server.observer.refusals[-1] == ("left-early", "/v1/completions", 499)
    assert "failed" not in caplog.text


# ---------------------------------------------------------------------- 12: the page


def test_the_page_ships_a_strict_policy_with_every_file(tiny_server: RunningServer):
    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(POLICY.split("; "))
    assert "unsafe" not in POLICY
    assert "http" not in POLICY
    assert "*" not in POLICY
    for path in ("/", *(f"/static/{name}" for name in FILES)):
        answer = httpx.get(f"{tiny_server.url}{path}")
        assert answer.status_code == 200, path
        assert answer.headers["content-security-policy"] == POLICY, path


def test_the_page_makes_no_markup_of_text():
    """Model output is put into the page as text nodes; what could make elements or code of it is not used."""
    static = files("gapless.server.page").joinpath("static")
    sinks = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc|\beval\(|new Function|javascript:"
    )
    for name in (*FILES, "index.html"):
        if not name.startswith("vendor/") and name.endswith(("js", "html")):
            found = sinks.search(static.joinpath(name).read_text())
            assert not found, f"{name}: {found}"


@pytest.mark.parametrize(
    "path", ["/static/../routes.py", "/static/..%2f..%2fconfig.py", "/static//etc/passwd", "/static/%2e%2e/routes.py"]
)
def test_no_path_of_a_request_is_opened(tiny_server: RunningServer, path: str):
    answer = httpx.get(httpx.URL(tiny_server.url).copy_with(raw_path=path.encode()))
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/json"
