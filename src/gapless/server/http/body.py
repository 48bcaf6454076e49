"""A request's body as a pydantic model, read after the key was checked."""

from __future__ import annotations

from typing import Generic, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from gapless.server.http.errors import ApiError, ClientGoneError, invalid_body

Model = TypeVar("Model", bound=BaseModel)


class JsonBody(Generic[Model]):
    """A dependency of routes: `body: Annotated[Model, Depends(JsonBody(Model))]`.

    FastAPI would read the body before it asks for the key, and with a parser that has no limit of depth. This one
    refuses what is nested deeper than 200, numbers of more than 4,300 digits, and half surrogate pairs. A body that
    does not say it is JSON is refused, too: a form on another site's page can send none that does.
    """

    def __init__(self, model: type[Model]) -> None:
        self.model = model

    async def __call__(self, request: Request) -> Model:
        """Raises ApiError, ClientGoneError."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "send the request as JSON, with content-type: application/json")
        try:
            return self.model.model_validate_json(await request.body())
        except ClientDisconnect:
            raise ClientGoneError("the client has gone") from None
        except ValidationError as error:
            raise invalid_body(error) from None
