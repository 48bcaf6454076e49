"""One server over the demo model for all tests of the API."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from frontend.tiny import tiny_engine
from gapless.config import EngineConfig
from gapless.loading import load_engine
from support.server import RunningServer, running_server


@pytest.fixture(scope="session")
def demo_server() -> Iterator[RunningServer]:
    """Open to all."""
    with running_server(load_engine("demo", EngineConfig(device="cpu", lookahead=1, max_rows=16))) as server:
        yield server


@pytest.fixture
def client(demo_server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


@pytest.fixture(scope="session")
def tiny_server() -> Iterator[RunningServer]:
    """Open to all, with small limits."""
    with running_server(
        tiny_engine(lookahead=1), max_body_bytes=16384, max_header_bytes=8192, max_headers=40, max_open=6
    ) as server:
        yield server
