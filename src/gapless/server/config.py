"""How the server behaves, apart from the engine: every option with its bounds, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gapless.errors import ConfigError

LogFormat = Literal["text", "json"]
MAX_PORT = 65_535


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Options of `gapless serve` that are not the engine's.

    host, port          where to listen; port 0: any free one.
    api_keys            any of them opens the routes that need one; none: they are open to all who reach the port.
    model_names         what clients may write as `model`, the first is shown; none: the loaded model's own name.
    max_open            requests open at once, running and waiting; one more is told to come back (429).
    max_body_bytes      of a request's body; more is refused (413).
    max_header_bytes    of all of a request's headers together; more is refused (431), as are over max_headers.
    drain_seconds       that running requests get to finish after SIGTERM.
    restart_engine      start the engine's process once more if it dies; else the server ends with status 1.
    tool_parser         how the model writes tool calls: "hermes", "llama3_json", "none"; None: by its chat template.
    reasoning_parser    the tag that its thoughts stand in, as "think"; "none"; None: by its chat template.
    cors_origins        web pages of these origins may call the API.
    page                serve the page at /.
    timeline            keep the last steps' timeline for /debug/timeline.
    log_format          text or JSON lines.
    log_interval        seconds between two lines on how it goes; 0: none.

    Raises ConfigError.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    model_names: tuple[str, ...] = ()
    max_open: int = 1024
    max_body_bytes: int = 8 * 2**20
    max_header_bytes: int = 32 * 2**10
    max_headers: int = 100
    drain_seconds: float = 30.0
    restart_engine: bool = True
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    cors_origins: tuple[str, ...] = ()
    page: bool = True
    timeline: bool = True
    log_format: LogFormat = "text"
    log_interval: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= MAX_PORT:
            raise ConfigError(f"port must be 0 to {MAX_PORT}, not {self.port}")
        for name in ("max_open", "max_body_bytes", "max_header_bytes", "max_headers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("drain_seconds", "log_interval"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be 0 or more seconds, not {getattr(self, name)}")
        if not all(key.isascii() and key.isprintable() and key.strip() == key and key for key in self.api_keys):
            raise ConfigError("an API key is printable ASCII without spaces around it, and not empty")
        if self.log_format not in ("text", "json"):
            raise ConfigError(f"log_format must be text or json, not {self.log_format!r}")
