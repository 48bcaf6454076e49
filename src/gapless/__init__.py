"""Gapless: LLM inference whose accelerator never waits for its host."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gapless.async_llm import AsyncLLM, RequestStream
    from gapless.config import EngineConfig
    from gapless.errors import (
        ConfigError,
        CorruptModelError,
        EmptyPromptError,
        EngineDeadError,
        GaplessError,
        InputFileError,
        InternalError,
        InvalidRequestError,
        ModelError,
        ModelNotFoundError,
        OutOfMemoryError,
        PromptTooLongError,
        RequestTooLargeError,
        UnsupportedModelError,
    )
    from gapless.llm import LLM
    from gapless.outputs import CompletionOutput, RequestOutput, TextDelta, Usage
    from gapless.request import FinishReason, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "ConfigError",
    "CorruptModelError",
    "EmptyPromptError",
    "EngineConfig",
    "EngineDeadError",
    "FinishReason",
    "GaplessError",
    "InputFileError",
    "InternalError",
    "InvalidRequestError",
    "ModelError",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "PromptTooLongError",
    "RequestOutput",
    "RequestStream",
    "RequestTooLargeError",
    "SamplingParams",
    "TextDelta",
    "UnsupportedModelError",
    "Usage",
    "__version__",
]

_HOMES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "RequestStream": "async_llm",
    "EngineConfig": "config",
    "FinishReason": "request",
    "SamplingParams": "request",
    "CompletionOutput": "outputs",
    "RequestOutput": "outputs",
    "TextDelta": "outputs",
    "Usage": "outputs",
}


def __getattr__(name: str) -> Any:
    """Names load their modules when first used: `import gapless` stays fast and free of torch."""
    if name not in __all__:
        raise AttributeError(f"module 'gapless' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gapless.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
