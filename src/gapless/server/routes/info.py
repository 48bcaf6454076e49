"""What the server is and how it stands: /v1/models, /health, /ready, /version."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

import gapless
from gapless.server.context import Context, UnavailableError
from gapless.server.http.auth import is_public, needs_key
from gapless.server.http.depends import ServerContext
from gapless.server.http.openapi import GET, responses
from gapless.server.protocol.answers import Health, ModelCard, ModelList, Version
from gapless.server.routes.common import model_of

router = APIRouter(tags=["Server"])
SCHEMAS = (ModelList, ModelCard, Health, Version)
STALL_SECONDS = 120.0  # without a step, though there is work, where the engine itself looks for no stall
_PUBLIC = (400, 413, 431, 500)
_HEALTH = {**responses(Health, _PUBLIC), 503: {**responses(Health, ())[200], "description": "It does not."}}


@router.get("/v1/models", dependencies=[Depends(needs_key)], responses=responses(ModelList, GET))
async def list_models(context: ServerContext) -> Response:
    """The names that requests may give as `model`."""
    return _json(ModelList([_card(context, name) for name in context.model_names]))


@router.get("/v1/models/{name:path}", dependencies=[Depends(needs_key)], responses=responses(ModelCard, (*GET, 404)))
async def get_model(name: str, context: ServerContext) -> Response:
    """One of them."""
    return _json(_card(context, model_of(context, name)))


@router.get("/openapi.json", dependencies=[Depends(needs_key)], include_in_schema=False)
async def schema(request: Request) -> Response:
    """Of the whole application."""
    return JSONResponse(request.app.openapi())


@router.head("/health", dependencies=[Depends(is_public)], include_in_schema=False)
@router.get("/health", dependencies=[Depends(is_public)], responses=_HEALTH)
async def health(context: ServerContext) -> Response:
    """200 while the engine starts or works, 503 when it has died, be it started again, or makes no progress."""
    state = context.engines.state
    if state in ("dead", "restarting"):
        return _json(Health("dead", state), 503)
    return _json(Health("stalled", state), 503) if await _stalls(context) else _json(Health("ok", state))


@router.head("/ready", dependencies=[Depends(is_public)], include_in_schema=False)
@router.get("/ready", dependencies=[Depends(is_public)], responses=_HEALTH)
async def ready(context: ServerContext) -> Response:
    """200 if requests are taken."""
    state = context.engines.state
    if context.draining:
        return _json(Health("draining", state), 503)
    return _json(Health(state, state), 200 if state == "ready" else 503)


@router.get("/version", dependencies=[Depends(is_public)], responses=responses(Version, _PUBLIC))
async def version() -> Response:
    """Of the server."""
    return _json(Version(gapless.__version__))


async def _stalls(context: Context) -> bool:
    try:
        patience = context.engines.llm.loaded.config.stall_seconds or STALL_SECONDS
        return (await context.engines.stats()).seconds_since_progress > patience
    except UnavailableError:  # it is being loaded; one that is ready and does not answer hangs
        return context.engines.state == "ready"


def _card(context: Context, name: str) -> ModelCard:
    limits = context.engines.llm.loaded.engine.admission.limits
    return ModelCard(name, context.created, limits.max_model_len)


def _json(answer: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(answer), status, media_type="application/json")
