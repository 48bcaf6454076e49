"""What the server sends as the page: its files, their types and headers, and nothing else."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import httpx
import pytest

from frontend.tiny import tiny_engine
from gapless.server.page.routes import FILES, POLICY
from support.server import RunningServer, running_server

STATIC = Path(str(files("gapless.server.page"))) / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".mjs": "text/javascript"}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(tiny_engine(lookahead=1), api_keys=("sesame",)) as running:
        yield running


@pytest.mark.parametrize("path", ["/", *(f"/static/{name}" for name in FILES)])
def test_each_file_has_its_type_and_the_policy_and_needs_no_key(server: RunningServer, path: str):
    answer = httpx.get(server.url + path)
    assert answer.status_code == 200
    kind, _, letters = answer.headers["content-type"].partition("; ")
    assert kind == TYPES.get(Path(path).suffix or ".html", "image/svg+xml")
    assert letters == ("" if path.endswith(".svg") else "charset=utf-8")
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    name = path.removeprefix("/static/") if path != "/" else "index.html"
    assert answer.content == (STATIC / name).read_bytes()


def test_all_that_lies_there_is_served_but_for_licences():
    there = {str(path.relative_to(STATIC)) for path in STATIC.rglob("*") if path.is_file()}
    kept = {name for name in there if name.endswith((".LICENSE", "VERSIONS"))}
    assert there - kept - {"index.html"} == set(FILES)
    assert {f"vendor/{name}.LICENSE" for name in ("preact", "htm", "uplot")} <= kept


def test_vendored_files_are_those_that_versions_names():
    versions = (STATIC / "vendor/VERSIONS").read_text()
    digests = re.findall(r"^([a-z.]+\.(?:mjs|css)) .*\n +([0-9a-f]{64})$", versions, re.M)
    vendored = {name.removeprefix("vendor/") for name in FILES if name.startswith("vendor/")}
    assert {name for name, _ in digests} == vendored
    for name, digest in digests:
        assert hashlib.sha256((STATIC / "vendor" / name).read_bytes()).hexdigest() == digest, name


def test_a_file_that_the_browser_has_is_not_sent_again(server: RunningServer):
    first = httpx.get(f"{server.url}/static/app.js")
    tag = first.headers["etag"]
    assert first.headers["cache-control"] == "no-cache"
    for given in (tag, f"W/{tag}", f'"other", {tag}'):
        again = httpx.get(f"{server.url}/static/app.js", headers={"if-none-match": given})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert httpx.get(f"{server.url}/static/app.js", headers={"if-none-match": '"other"'}).status_code == 200


def test_head_tells_of_a_file_and_sends_none(server: RunningServer):
    answer = httpx.head(f"{server.url}/static/style.css")
    assert answer.status_code == 200
    assert answer.content == b""
    assert int(answer.headers["content-length"]) == (STATIC / "style.css").stat().st_size


@pytest.mark.parametrize(
    "path",
    [
        "/static/",
        "/static/index.html",
        "/static/vendor",
        "/static/vendor/VERSIONS",
        "/static/../routes.py",
        "/static/vendor/../../routes.py",
        "/static/%2e%2e/routes.py",
        "/static/..%2froutes.py",
        "/static/..%5croutes.py",
        "/static//etc/passwd",
        "/static/app.js%00",
        "/static/App.js",
        "/static/app.js/",
    ],
)
def test_other_names_are_not_there(server: RunningServer, path: str):
    answer = httpx.get(httpx.URL(server.url).copy_with(raw_path=path.encode()))
    assert answer.status_code == 404
    assert "routes" not in answer.text


def test_a_server_may_have_no_page():
    with running_server(tiny_engine(lookahead=1), page=False) as server:
        assert httpx.get(f"{server.url}/").status_code == 404
        assert httpx.get(f"{server.url}/static/app.js").status_code == 404


def test_the_page_asks_for_nothing_from_elsewhere_and_has_nothing_inline():
    html = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\son\w+=|\sstyle=", html)
    for path in STATIC.glob("*"):
        if path.is_file():
            addresses = set(re.findall(r"https?://[^\s\"'`)]+", path.read_text()))
            assert addresses <= {"http://www.w3.org/2000/svg"}, path.name
    imports = re.compile(r"""(?:from|import)\s*["']([^"']+)["']""")
    for path in STATIC.glob("*.js"):
        for name in imports.findall(path.read_text()):
            assert name.startswith("./"), f"{path.name}: {name}"
            assert name.removeprefix("./") in FILES, f"{path.name}: {name}"
