"""What routes get from the request's surroundings."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request

from gapless.server.context import Context


def get_context(request: Request) -> Context:
    """The server's."""
    return cast("Context", request.app.state.context)


def request_id_of(request: Request) -> str:
    """The client's x-request-id, or one that was made for it."""
    return cast("str", request.state.request_id)


ServerContext = Annotated[Context, Depends(get_context)]
RequestId = Annotated[str, Depends(request_id_of)]
