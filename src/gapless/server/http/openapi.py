"""What /openapi.json says beyond what FastAPI sees: bodies that a dependency reads, and answers that are structs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gapless.server.http.body import JsonBody
from gapless.server.http.errors import ErrorBody

_REFERENCE = "#/components/schemas/"
_EVENT = {  # of each event, as tools read the schema of a stream before OpenAPI 3.2
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_MEANINGS = {
    400: "The request is wrong; nothing was queued.",
    401: "An API key is needed, or this one is not known.",
    403: "A page of another site may not do this.",
    404: "There is no such model.",
    409: "Somebody else's turn is not over.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "As many requests are open as may be: try again later.",
    431: "The headers are too large.",
    500: "The server failed.",
    503: "The engine starts, has failed, or the server is being shut down.",
}
GET = (400, 401, 413, 431, 500, 503)
"""The statuses of a route that reads nothing."""
POST = (400, 401, 403, 413, 415, 429, 431, 500, 503)
"""The statuses of a route that takes JSON."""


def responses(answer: type[msgspec.Struct] | None, statuses: Sequence[int], *, stream: bool = False) -> dict[Any, Any]:
    """For a route's `responses`: 200 with this struct, or with anything if it is None, and errors with ErrorBody."""
    content: dict[str, Any] = {} if answer is None else {"application/json": {"schema": _reference(answer)}}
    if stream:
        content["text/event-stream"] = {"schema": _EVENT}
    found: dict[Any, Any] = {200: {"description": "The answer.", "content": content}}
    for status in statuses:
        error = {"application/json": {"schema": _reference(ErrorBody)}}
        found[status] = {"description": _MEANINGS[status], "content": error}
    return found


def describe(app: FastAPI, answers: Sequence[type[msgspec.Struct]]) -> None:
    """Let /openapi.json have the schemas of these answers and of all bodies."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _schema(app, answers)
        return app.openapi_schema

    app.openapi = openapi  # the way that FastAPI gives


def _schema(app: FastAPI, answers: Sequence[type[msgspec.Struct]]) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    bodies = dict(_bodies(app))
    _, models = models_json_schema(
        [(model, "validation") for model in bodies.values()], ref_template=_REFERENCE + "{model}"
    )
    _, structs = msgspec.json.schema_components([ErrorBody, *answers], ref_template=_REFERENCE + "{name}")
    found.setdefault("components", {}).setdefault("schemas", {}).update({**models.get("$defs", {}), **structs})
    for (path, method), model in bodies.items():
        found["paths"][path][method]["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": _REFERENCE + model.__name__}}},
        }
    for operations in found["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # ours is 400
    return found


def _bodies(app: FastAPI) -> Iterator[tuple[tuple[str, str], type[BaseModel]]]:
    """By path and method, what JsonBody reads there."""
    for route in app.routes:
        if isinstance(route, APIRoute):
            for dependant in _all_of(route.dependant):
                if isinstance(dependant.call, JsonBody):
                    for method in route.methods or ():
                        yield (route.path_format, method.lower()), dependant.call.model


def _all_of(dependant: Dependant) -> Iterator[Dependant]:
    for each in dependant.dependencies:
        yield each
        yield from _all_of(each)


def _reference(answer: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REFERENCE + answer.__name__}
