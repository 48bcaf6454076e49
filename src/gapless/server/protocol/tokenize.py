"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gapless.server.protocol.chat import MAX_TOOLS, Messages, TemplateFields
from gapless.server.protocol.sampling import Body, TokenId
from gapless.server.protocol.tools import Tool


class TokenizeRequest(TemplateFields):
    """A text, or a chat: one of prompt and messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """Token ids."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
