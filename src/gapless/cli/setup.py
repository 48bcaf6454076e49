"""From checked options to a loaded LLM, with the errors that need no model first."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

from gapless.config import STALL_SECONDS, Dtype, EngineConfig
from gapless.errors import ConfigError

if TYPE_CHECKING:
    from gapless.llm import LLM
    from gapless.trace.record import Trace


def make_config(
    *,
    lookahead: int,
    max_rows: int,
    max_batch_tokens: int | None,
    max_model_len: int | None,
    kv_cache_memory: int | None,
    num_blocks: int | None,
    block_size: int,
    graphs: bool,
    prefix_cache: bool = True,
    deterministic: bool = False,
    dtype: str | None,
    device: str | None,
    seed: int,
    stall_seconds: float = STALL_SECONDS,
) -> EngineConfig:
    """Raises ConfigError."""
    return EngineConfig(
        lookahead=lookahead,
        max_rows=max_rows,
        max_batch_tokens=max_batch_tokens,
        max_model_len=max_model_len,
        kv_cache_bytes=kv_cache_memory,
        num_blocks=num_blocks,
        block_size=block_size,
        prefix_cache=prefix_cache,
        deterministic=deterministic,
        graphs=graphs,
        dtype=cast("Dtype | None", dtype),
        device=device,
        seed=seed,
        stall_seconds=stall_seconds,
    )


def load_llm(
    model: str, config: EngineConfig, *, load: str, shape: str | None, tokenizer: str | None, trace: Trace | None = None
) -> LLM:
    """Load a model. torch is imported here. Raises ConfigError, ModelError, OutOfMemoryError."""
    if load not in ("auto", "random"):
        raise ConfigError(f"--load must be auto or random, not {load!r}")
    if shape is not None and load != "random":
        raise ConfigError("a shape has no weights: --shape goes with --load random")
    say(f"loading {shape or model} ...")
    from gapless.llm import LLM
    from gapless.loading import load_engine

    return LLM.from_loaded(load_engine(model, config, load=load, shape=shape, tokenizer=tokenizer, trace=trace))


def say(text: str) -> None:
    """One line for a person at a terminal; nothing in a pipe or a log."""
    if sys.stderr.isatty():
        sys.stderr.write(f"gapless: {text}\n")
        sys.stderr.flush()


def warn(text: str) -> None:
    """One line on stderr, always."""
    sys.stderr.write(f"gapless: {text}\n")
    sys.stderr.flush()
