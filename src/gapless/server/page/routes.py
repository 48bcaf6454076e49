"""Serves the page and its files: those of one table, and no path from a request is ever opened."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from fastapi import APIRouter, Depends, HTTPException, Request, Response

from gapless.server.http.auth import is_public

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_INDEX = "index.html"
FILES = (
    "answer.js",
    "api.js",
    "app.js",
    "chart.js",
    "charts.css",
    "compare.js",
    "dashboard.js",
    "format.js",
    "history.js",
    "key.js",
    "lanes.js",
    "language.js",
    "mark.svg",
    "playground.css",
    "playground.js",
    "poll.js",
    "settings.js",
    "sse.js",
    "style.css",
    "theme.js",
    "timeline.js",
    "tokens.js",
    "trace.js",
    "ui.js",
    "vendor/hooks.mjs",
    "vendor/htm.mjs",
    "vendor/preact.mjs",
    "vendor/uplot.css",
    "vendor/uplot.mjs",
)
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # asked for again each time, and answered with 304
}

page_router = APIRouter(dependencies=[Depends(is_public)], include_in_schema=False)


class _File(NamedTuple):
    content: bytes
    headers: dict[str, str]


@page_router.api_route("/", methods=["GET", "HEAD"])
def index(request: Request) -> Response:
    """The page."""
    return _answer(request, _INDEX)


@page_router.api_route("/static/{name:path}", methods=["GET", "HEAD"])
def static(request: Request, name: str) -> Response:
    """A file of it."""
    if name not in FILES:
        raise HTTPException(404, "there is no such file")
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    file = _read(name)
    given = {each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")}
    if file.headers["etag"] in given or "*" in given:
        return Response(status_code=304, headers=file.headers)
    return Response(file.content, headers=file.headers, media_type=_TYPES[name.rpartition(".")[2]])


@cache
def _read(name: str) -> _File:
    """A file of the package, once."""
    content = files("gapless.server.page").joinpath("static", *name.split("/")).read_bytes()
    return _File(content, {**_HEADERS, "etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'})
