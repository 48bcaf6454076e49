"""How a model writes calls and thoughts: by what its chat template writes, unless the server was told."""

from __future__ import annotations

import re
from typing import Final, get_args

from gapless.errors import ConfigError
from gapless.server.answers.parser import CALL_TAG, Dialect

_TAG: Final = re.compile(r"[A-Za-z][A-Za-z0-9_:.-]{0,31}")
_LLAMA_CALL: Final = re.compile(
    r"""\{\s*\\?["']name\\?["']\s*:(?:(?!arguments).){0,200}?["']parameters\\?["']\s*:""", re.DOTALL
)
_OTHERS: Final = ("<function=", "<arg_key>", "[TOOL_CALLS]")  # that show other forms than they might seem to


def dialect_of(template_source: str | None, configured: str | None) -> Dialect:
    """How calls are written. `configured` None: by the template; "none" if that shows no form that is known.

    Raises ConfigError for a name that is no dialect.
    """
    if configured is not None:
        for dialect in get_args(Dialect):
            if configured == dialect:
                return dialect
        raise ConfigError(f"tool_parser must be one of {', '.join(get_args(Dialect))}, not {configured!r:.100}")
    source = template_source or ""
    if any(mark in source for mark in _OTHERS):
        return "none"
    if CALL_TAG in source:
        return "hermes"
    return "llama3_json" if _LLAMA_CALL.search(source) else "none"


def reasoning_tag_of(template_source: str | None, configured: str | None) -> str | None:
    """The tag that thoughts stand in, without its brackets; None if the model has none or `configured` is "none".

    Raises ConfigError for what can be no tag.
    """
    if configured is None:
        return "think" if "<think>" in (template_source or "") else None
    if not _TAG.fullmatch(configured):
        raise ConfigError(f'reasoning_parser must be a tag like "think", or "none", not {configured!r:.100}')
    return None if configured == "none" else configured
