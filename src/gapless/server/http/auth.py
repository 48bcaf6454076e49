"""API keys. Every route declares `needs_key` or `is_public`, and nothing but the route decides."""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPBearer

from gapless.server.config import ServerConfig
from gapless.server.http.depends import ServerContext
from gapless.server.http.errors import ApiError

_BEARER = HTTPBearer(auto_error=False, description="One of the server's API keys, if it has any.")
_HEADER = APIKeyHeader(name="x-api-key", auto_error=False, description="The same, for clients that send it here.")


async def needs_key(
    request: Request,
    context: ServerContext,
    _bearer: Annotated[object, Depends(_BEARER)],  # both for the schema only
    _header: Annotated[object, Depends(_HEADER)],
) -> None:
    """For a route that takes one of the server's keys, if it has any. Raises ApiError."""
    keys = context.config.api_keys
    if not keys:
        return
    given = presented_key(request)
    if given is None:
        raise _refusal("an API key is needed: send it as Authorization: Bearer KEY")
    if not _is_known(given, keys):
        raise _refusal("this API key is not known")


async def is_public() -> None:
    """For a route that takes no key."""


def presented_key(request: Request) -> bytes | None:
    """The key that the request brings, known or not."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and (key := key.strip(" \t")):
        return key.encode("latin-1")
    given = request.headers.get("x-api-key")
    return given.encode("latin-1") if given else None


def cache_salt_of(request: Request, config: ServerConfig, given: str | None) -> str:
    """What the request's KV blocks are shared under: with `given`, but never beyond the API key."""
    if not config.api_keys:
        return given or ""
    key = hashlib.sha256(presented_key(request) or b"").digest()
    return hashlib.sha256(key + (given or "").encode()).hexdigest()


def _is_known(given: bytes, keys: tuple[str, ...]) -> bool:
    """Digests are compared, all of them, so the time says nothing of a key, its length or its place."""
    digest, known = hashlib.sha256(given).digest(), False
    for key in keys:
        known |= hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest())
    return known


def _refusal(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
