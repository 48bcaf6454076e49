"""Options of `gapless serve` that are not the engine's."""

from __future__ import annotations

from typing import Annotated

from gapless.cli.options import make_option, make_size

_SERVER, _LIMITS, _WATCH = "Server", "Limits", "Observation"

Host = Annotated[str, make_option("--host", "Address to listen at; 0.0.0.0 is all of this machine's.", _SERVER)]
Port = Annotated[int, make_option("--port", "Port to listen at; 0 is any free one.", _SERVER)]
ApiKey = Annotated[
    list[str] | None,
    make_option("--api-key", "Clients must send one of these. May be repeated; without any, all are let in.", _SERVER),
]
ModelName = Annotated[
    list[str] | None,
    make_option("--served-model-name", "What clients call the model. May be repeated.", _SERVER),
]
ToolParser = Annotated[
    str | None,
    make_option("--tool-parser", "hermes, llama3_json or none. Default: by the chat template.", _SERVER),
]
ReasoningParser = Annotated[
    str | None,
    make_option("--reasoning-parser", "Tag that thoughts stand in, as think; or none.", _SERVER),
]
CorsOrigin = Annotated[
    list[str] | None, make_option("--cors-origin", "Web pages from here may call. May be repeated.", _SERVER)
]
Page = Annotated[bool, make_option("--page/--no-page", "Serve the page at /.", _SERVER)]
RestartEngine = Annotated[
    bool,
    make_option("--restart/--no-restart", "Start the engine once more if it dies; else end.", _SERVER),
]

MaxOpen = Annotated[
    int,
    make_option(
        "--max-open", "Answers open at once, waiting ones and all n of a prompt too; more are told 429.", _LIMITS
    ),
]
MaxBody = Annotated[
    int, make_size("--max-body", "The most bytes of a request's body (8M).", _LIMITS, show_default=False)
]
DrainSeconds = Annotated[
    float, make_option("--drain-seconds", "That running requests get to finish after SIGTERM.", _LIMITS)
]

LogFormat = Annotated[str, make_option("--log-format", "text or json.", _WATCH)]
LogInterval = Annotated[
    float, make_option("--log-interval", "Seconds between two lines on how it goes; 0: none.", _WATCH)
]
Timeline = Annotated[
    bool, make_option("--timeline/--no-timeline", "Keep the last steps for the page's timeline.", _WATCH)
]
OtlpEndpoint = Annotated[
    str | None,
    make_option("--otlp-endpoint", "Send OpenTelemetry spans here; needs the extra otel.", _WATCH),
]
