"""`gapless serve`: the OpenAI-compatible server."""

from __future__ import annotations

import ipaddress
import os
from typing import cast

import typer

from gapless.cli import options, server_options
from gapless.cli.setup import make_config, warn
from gapless.cli.signals import INTERRUPTED
from gapless.config import STALL_SECONDS
from gapless.errors import ConfigError

TIMELINE_STEPS = 500


def serve(
    model: options.Model = "demo",
    host: server_options.Host = "127.0.0.1",
    port: server_options.Port = 8000,
    api_key: server_options.ApiKey = None,
    served_model_name: server_options.ModelName = None,
    tool_parser: server_options.ToolParser = None,
    reasoning_parser: server_options.ReasoningParser = None,
    cors_origin: server_options.CorsOrigin = None,
    page: server_options.Page = True,
    restart_engine: server_options.RestartEngine = True,
    max_open: server_options.MaxOpen = 1024,
    max_body: server_options.MaxBody = 8 * 2**20,
    drain_seconds: server_options.DrainSeconds = 30.0,
    log_format: server_options.LogFormat = "text",
    log_interval: server_options.LogInterval = 10.0,
    timeline: server_options.Timeline = True,
    otlp_endpoint: server_options.OtlpEndpoint = None,
    load: options.Load = "auto",
    shape: options.Shape = None,
    tokenizer: options.Tokenizer = None,
    seed: options.EngineSeed = 0,
    lookahead: options.Lookahead = 1,
    max_rows: options.MaxRows = 256,
    max_batch_tokens: options.MaxBatchTokens = None,
    max_model_len: options.MaxModelLen = None,
    kv_cache_memory: options.KVCacheMemory = None,
    num_blocks: options.NumBlocks = None,
    block_size: options.BlockSize = 16,
    prefix_cache: options.PrefixCache = True,
    deterministic: options.Deterministic = False,
    graphs: options.Graphs = True,
    dtype: options.Dtype = None,
    device: options.Device = None,
    stall_seconds: options.StallSeconds = STALL_SECONDS,
    config: options.Config = None,
) -> None:
    """Serve a model to OpenAI's clients, and a page that shows the engine at work.

    gapless serve --model demo --port 8000

    The API is at /v1 (chat/completions, completions, responses, models), the page at /, metrics at /metrics, and the
    health at /health and /ready. SIGTERM or Ctrl-C takes no new requests and lets those that run finish; a second
    Ctrl-C ends at once. The engine has a process of its own, which is started once more if it dies.
    """
    engine = make_config(
        lookahead=lookahead,
        max_rows=max_rows,
        max_batch_tokens=max_batch_tokens,
        max_model_len=max_model_len,
        kv_cache_memory=kv_cache_memory,
        num_blocks=num_blocks,
        block_size=block_size,
        prefix_cache=prefix_cache,
        deterministic=deterministic,
        graphs=graphs,
        dtype=dtype,
        device=device,
        seed=seed,
        stall_seconds=stall_seconds,
    )
    if not api_key and os.environ.get("GAPLESS_API_KEY") is not None:
        raise ConfigError("GAPLESS_API_KEY is empty, which would let everybody in: set a key, or unset it")
    if not api_key and not _is_loopback(host):
        warn(f"without --api-key, whoever reaches {host} is let in")
    from gapless.server.config import LogFormat, ServerConfig

    server = ServerConfig(
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        model_names=tuple(served_model_name or ()),
        max_open=max_open,
        max_body_bytes=max_body,
        drain_seconds=drain_seconds,
        restart_engine=restart_engine,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        cors_origins=tuple(cors_origin or ()),
        page=page,
        timeline=timeline,
        log_format=cast("LogFormat", log_format),
        log_interval=log_interval,
    )
    from gapless.server.run import bind, start_message
    from gapless.server.run import serve as run_server

    start = start_message(
        model, engine, load=load, shape=shape, tokenizer=tokenizer, timeline=TIMELINE_STEPS if timeline else 0
    )
    listener = bind(server)
    try:
        run_server(start, server, listener, otlp_endpoint)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
