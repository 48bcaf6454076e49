"""POST /tokenize and /detokenize."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Response

from gapless.errors import InvalidRequestError
from gapless.loading import Loaded
from gapless.server.http.auth import needs_key
from gapless.server.http.body import JsonBody
from gapless.server.http.depends import ServerContext
from gapless.server.http.openapi import POST, responses
from gapless.server.protocol.answers import Text, Tokens
from gapless.server.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from gapless.server.protocol.tools import plain
from gapless.server.routes.chat import render, text_length
from gapless.server.routes.common import LONG_TEXT, check_length, is_long, model_of
from gapless.server.token_texts import TokenTexts
from gapless.text.tokenizer import Tokenizer

router = APIRouter(tags=["Tokens"])
SCHEMAS = (Tokens, Text)


@router.post("/tokenize", dependencies=[Depends(needs_key)], responses=responses(Tokens, (*POST, 404)))
async def tokenize(
    context: ServerContext, body: Annotated[TokenizeRequest, Depends(JsonBody(TokenizeRequest))]
) -> Response:
    """A text, or a chat, as the model reads it."""
    model_of(context, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("one of prompt and messages is needed")
    loaded = context.llm.loaded
    length = len(body.prompt) if body.prompt is not None else text_length(body.messages or ())
    check_length(length, loaded.engine.admission.limits.max_model_len, text=True)
    long = is_long(body.prompt, body.messages, body.chat_template_kwargs, [plain(tool) for tool in body.tools or ()])
    answer = await asyncio.to_thread(_tokens, body, loaded) if long else _tokens(body, loaded)
    return Response(msgspec.json.encode(answer), media_type="application/json")


@router.post("/detokenize", dependencies=[Depends(needs_key)], responses=responses(Text, (*POST, 404)))
async def detokenize(
    context: ServerContext, body: Annotated[DetokenizeRequest, Depends(JsonBody(DetokenizeRequest))]
) -> Response:
    """The text of token ids, special tokens included."""
    model_of(context, body.model)
    tokenizer = _tokenizer(context.llm.loaded)
    ids = body.tokens
    if len(ids) > (limit := context.llm.loaded.engine.admission.limits.max_model_len):
        raise InvalidRequestError(f"tokens: there are {len(ids)}, and {limit} at most can be given: the context limit")
    if unknown := next((token for token in ids if token >= tokenizer.vocab_size), None):
        raise InvalidRequestError(f"tokens: {unknown} is outside the vocabulary (0 to {tokenizer.vocab_size - 1})")
    if len(ids) > LONG_TEXT:
        text = await asyncio.to_thread(tokenizer.decode, ids, skip_special_tokens=False)
    else:
        text = tokenizer.decode(ids, skip_special_tokens=False)
    return Response(msgspec.json.encode(Text(text)), media_type="application/json")


def _tokens(body: TokenizeRequest, loaded: Loaded) -> Tokens:
    if body.messages is not None:
        tools = [plain(tool) for tool in body.tools or ()]
        _, token_ids = render(body, body.messages, loaded, tools or None)
    else:
        token_ids = _tokenizer(loaded).encode(
            body.prompt or "", add_special_tokens=body.add_special_tokens is not False
        )
    answer = Tokens(len(token_ids), loaded.engine.admission.limits.max_model_len, token_ids)
    if body.return_token_strs:
        texts = TokenTexts(loaded.tokenizer)
        answer.token_strs = [texts.text(token) for token in token_ids]
    return answer


def _tokenizer(loaded: Loaded) -> Tokenizer:
    if loaded.tokenizer is None:
        raise InvalidRequestError("this model was loaded without a tokenizer")
    return loaded.tokenizer
