"""What people and machines that look after a server ask it: figures, percentiles, the timeline, and the lookahead."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from gapless.server import metrics
from gapless.server.context import EngineState
from gapless.server.http.auth import needs_key
from gapless.server.http.body import JsonBody
from gapless.server.http.depends import ServerContext
from gapless.server.http.openapi import GET, POST, responses
from gapless.server.latency import Latency
from gapless.server.observer import observer_of
from gapless.spans import Run, chrome_trace

MAX_STEPS = 500
MAX_LOOKAHEAD = 64
MAX_SECONDS = 3600.0
_POST = (*(status for status in POST if status != 429), 409)

router = APIRouter(tags=["debug"], dependencies=[Depends(needs_key)])


class Percentiles(BaseModel):
    """Of the last minute, in seconds; null if nothing came."""

    p50: float | None
    p99: float | None


class Latencies(BaseModel):
    """From queueing to the first token, between two tokens of a request, and from queueing to the answer's end."""

    ttft: Percentiles
    inter_token: Percentiles
    e2e: Percentiles


class Stats(BaseModel):
    """How the server and its engine stand. Counts and times are of the engine that runs now, since its start."""

    state: EngineState
    model: str
    device: str
    time: float = Field(description="Unix time")
    lookahead: int
    running: int
    waiting: int
    rows: int = Field(description="the most requests that can run at once")
    kv_blocks_used: int
    kv_blocks: int
    steps: int
    prompt_tokens: int
    cached_tokens: int = Field(description="of prompt_tokens, found in the prefix cache")
    generated_tokens: int
    recomputed_tokens: int
    overshoot_rows: int
    preemptions: int
    failed_steps: int
    busy_seconds: float = Field(description="of the compute stream")
    active_seconds: float = Field(description="wall time with work")
    host_seconds: float = Field(description="the host's own work in steps")
    seconds_since_progress: float
    latency: Latencies


class Lookahead(BaseModel):
    """Steps queued before the oldest is read: 0 takes turns, 1 and more run ahead."""

    lookahead: int = Field(ge=0, le=MAX_LOOKAHEAD, strict=True)
    seconds: float | None = Field(
        default=None, gt=0, le=MAX_SECONDS, strict=True, description="for so long, then as before; null: from now on"
    )
    lease: str | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="a word of one's own beside `seconds`: until these are over, others' get 409",
    )


@router.get("/metrics", response_class=PlainTextResponse, responses=responses(None, GET))
async def read_metrics(context: ServerContext) -> Response:
    """For Prometheus. Without an engine, what is known without it."""
    return Response(await metrics.render(context), media_type=metrics.CONTENT_TYPE)


@router.get("/debug/stats", responses=responses(None, GET))
async def read_stats(context: ServerContext) -> Stats:
    """For the page's dashboard."""
    observer = observer_of(context)
    live = await observer.engine.read(context.engines)
    loaded = context.engines.llm.loaded

    def percentiles(latency: Latency) -> Percentiles:
        p50, p99 = latency.percentiles(observer.clock())
        return Percentiles(p50=p50, p99=p99)

    return Stats(
        state=context.engines.state,
        model=context.model_names[0],
        device=loaded.device_name,
        time=time.time(),
        latency=Latencies(
            ttft=percentiles(observer.ttft),
            inter_token=percentiles(observer.inter_token),
            e2e=percentiles(observer.e2e),
        ),
        **asdict(live),
    )


@router.get("/debug/timeline", responses=responses(None, GET))
async def read_timeline(
    context: ServerContext, steps: Annotated[int, Query(ge=1, le=MAX_STEPS, description="the last so many")] = 50
) -> Response:
    """The last steps at each lookahead as Chrome trace JSON; without events if the server keeps none."""
    runs = await context.engines.timeline(steps)
    return Response(await asyncio.to_thread(_encoded, runs), media_type="application/json")


@router.post("/debug/lookahead", responses=responses(None, _POST))
async def set_lookahead(
    context: ServerContext, wanted: Annotated[Lookahead, Depends(JsonBody(Lookahead))]
) -> Lookahead:
    """Go on with so many steps in flight, at most as many as the engine was built for."""
    await context.lookahead.set(wanted.lookahead, wanted.seconds, wanted.lease)
    return wanted


def _encoded(runs: Sequence[Run]) -> bytes:
    return msgspec.json.encode(chrome_trace(runs))
