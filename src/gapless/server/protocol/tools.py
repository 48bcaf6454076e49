"""Tools, and the choice among them, as chat requests give them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from gapless.server.protocol.sampling import Body, Schema


class FunctionDefinition(Body):
    """A function that the model may ask to be called. parameters: a JSON schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; there are no others than functions."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class FunctionName(Body):
    """One of the functions."""

    name: str


class NamedTool(Body):
    """This tool has to be called."""

    type: Literal["function"] = "function"
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def plain(tool: Tool) -> dict[str, Any]:
    """As JSON, without what was not given."""
    return tool.model_dump(exclude_none=True)
