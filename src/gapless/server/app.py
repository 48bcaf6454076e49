"""The server as an ASGI application: its routes, and what stands before them."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import gapless
from gapless.server.context import Context
from gapless.server.http import errors, openapi
from gapless.server.http.limits import Gate
from gapless.server.page.routes import page_router
from gapless.server.routes import chat, completions, debug, info, responses, tokenize

_SCHEMAS = tuple(struct for each in (chat, completions, responses, tokenize, info) for struct in each.SCHEMAS)


def create_app(context: Context) -> FastAPI:
    """All that is served. Its schema is at /openapi.json, in info.py, as it takes a key; pages for it would load
    scripts from elsewhere."""
    app = FastAPI(
        title="Gapless",
        description="LLM inference with OpenAI's interface.",
        version=gapless.__version__,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.context = context
    routers = [each.router for each in (chat, completions, responses, tokenize, info, debug)]
    for router in [*routers, page_router] if context.config.page else routers:
        app.router.routes += router.routes  # flat: whoever walks the routes sees each of them
    openapi.describe(app, _SCHEMAS)
    errors.install(app)
    app.add_middleware(Gate, context=context)
    if context.config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(context.config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients in browsers send their own; nothing is let in by a cookie
            expose_headers=["retry-after", "x-request-id"],
        )
    return app
