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
    from gapless.logits_processor import LogitsProcessor, ProcessedStep
    from gapless.outputs import CompletionOutput, RequestOutput, TextDelta, TokenLogprob, Usage
    from gapless.params import SamplingParams
    from gapless.request import FinishReason

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
    "LogitsProcessor",
    "ModelError",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "ProcessedStep",
    "PromptTooLongError",
    "RequestOutput",
    "RequestStream",
    "RequestTooLargeError",
    "SamplingParams",
    "TextDelta",
    "TokenLogprob",
    "UnsupportedModelError",
    "Usage",
    "__version__",
]

_HOMES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "RequestStream": "async_llm",
    "EngineConfig": "config",
    "LogitsProcessor": "logits_processor",
    "ProcessedStep": "logits_processor",
    "FinishReason": "request",
    "SamplingParams": "params",
    "CompletionOutput": "outputs",
    "RequestOutput": "outputs",
    "TextDelta": "outputs",
    "TokenLogprob": "outputs",
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
