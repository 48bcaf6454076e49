"""Every error as a client sees it: OpenAI's error object, a status, and nothing of the inside of the server."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import fields

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from gapless.errors import (
    ConfigError,
    EngineDeadError,
    GaplessError,
    InvalidRequestError,
    PromptTooLongError,
    RequestTooLargeError,
)
from gapless.params import SamplingParams
from gapless.server.context import BusyError, UnavailableError
from gapless.server.lookahead import LeasedError

BUSY_SECONDS = 1  # after which a client may try again
UNAVAILABLE_SECONDS = 5

_logger = logging.getLogger("gapless.server")
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
_PARAMETERS = frozenset(field.name for field in fields(SamplingParams)) | {"priority", "cache_salt"}
_FIELD = re.compile(r"(?!(body|query|path|str|int)$)\w+")  # pydantic puts the kinds of a union between the fields
_FIRST_WORD = re.compile(r"\w+")
_PLAIN = {
    404: "there is nothing at this path",
    405: "this path does not take that method",
}


class ErrorDetail(msgspec.Struct):
    """What is wrong.

    type   invalid_request_error, authentication_error, permission_error, rate_limit_error or server_error.
    param  the field of the request that is wrong, if it is one.
    code   for programs; None for most.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """The body of every answer that is none."""

    error: ErrorDetail


class ApiError(GaplessError):
    """A request gets this in place of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """As JSON."""
        message = str(self).encode("utf-8", "replace").decode()
        detail = ErrorDetail(message, _KINDS.get(self.status, "invalid_request_error"), self.param, self.code)
        return msgspec.json.encode(ErrorBody(detail))

    def response(self) -> Response:
        """With its status and headers."""
        return Response(self.body(), self.status, self.headers, "application/json")


class ClientGoneError(GaplessError):
    """The client has closed the connection: what is answered nobody reads."""


def error_of(error: BaseException, request_id: str) -> ApiError:
    """The error to show. One that nobody expected is logged, and only its request's id is shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnavailableError):
        return ApiError(503, str(error), code="unavailable", headers={"retry-after": str(UNAVAILABLE_SECONDS)})
    if isinstance(error, LeasedError):
        return ApiError(409, str(error), code="lookahead_leased")
    if isinstance(error, BusyError):
        return ApiError(429, str(error), code="too_many_requests", headers={"retry-after": str(BUSY_SECONDS)})
    if isinstance(error, EngineDeadError):
        retry = {"retry-after": str(UNAVAILABLE_SECONDS)}
        return ApiError(503, "the engine has failed or was stopped", code="engine_dead", headers=retry)
    if isinstance(error, PromptTooLongError | RequestTooLargeError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, InvalidRequestError | ConfigError):
        return ApiError(400, str(error), param=_param_of(str(error)))
    if isinstance(error, HTTPException):
        message = _PLAIN.get(error.status_code) or str(error.detail)
        return ApiError(error.status_code, message, headers=error.headers)
    if isinstance(error, ClientGoneError):
        return ApiError(499, "the client has gone")
    _logger.error("request %s failed", request_id, exc_info=error)
    return ApiError(500, f"the server failed on this request; its log has more under {request_id}", code="internal")


def invalid_body(error: ValidationError | RequestValidationError) -> ApiError:
    """The first thing that is wrong with a request, without what was in it. Of a field that may be of several kinds it
    is what is wrong with the kind that was given."""
    found = error.errors()
    field = [each for each in found if each["loc"][:1] == found[0]["loc"][:1]]
    first = next((each for each in field if not each["type"].endswith("_type")), found[0])
    place = [part for part in first["loc"] if isinstance(part, int) or _FIELD.fullmatch(part)]
    message = str(first["msg"]).removeprefix("Value error, ")
    if not place:
        return ApiError(400, message)
    name = ".".join(str(part) for part in place)
    return ApiError(400, f"{name}: {message}", param=name)


def install(app: FastAPI) -> None:
    """Answer all that is raised in a route with OpenAI's error object."""

    async def answer(request: Request, error: Exception) -> Response:
        return error_of(error, request.state.request_id).response()

    async def answer_invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return invalid_body(error).response()

    app.add_exception_handler(GaplessError, answer)
    app.add_exception_handler(HTTPException, answer)
    app.add_exception_handler(RequestValidationError, answer_invalid)


def _param_of(message: str) -> str | None:
    """The parameter that a message begins with."""
    word = _FIRST_WORD.match(message)
    return word[0] if word and word[0] in _PARAMETERS else None
