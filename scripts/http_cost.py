"""What serving over HTTP costs: CPU time per token in both processes, latencies, and tokens/s against the engine alone.

python scripts/http_cost.py --requests 32,256                                  a tiny model, so nearly all is the server
python scripts/http_cost.py --shape llama-8b --requests 32,256 --min-ratio 0.95               on a GPU, with real work

Prompts are token ids over /v1/completions, all streams at once, each of the same length. The engine alone is LLM with
the same options and prompts, in a process of its own. Prints JSON; status 1 if a ratio is below --min-ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from load_server import Server, cpu_seconds, tiny_folder

_EVENT = b'"text":'
_END = b"data: [DONE]\n\n"
_TINY = ("--num-blocks", "16K", "--max-model-len", "4K")


@dataclass
class Stream(asyncio.Protocol):
    """One request. It looks at nothing but when bytes came and how many events are in them."""

    request: bytes
    begin: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    head: bytes = b""
    tail: bytes = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self) -> None:
        """Ask, on a connection that stands."""
        self.begin = time.perf_counter()
        self._transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self.head = self.head or data[:200]
        joined = self.tail + data
        count = joined.count(_EVENT) - self.tail.count(_EVENT)
        if count:
            self.arrivals.append((now, count))
        self.tail = joined[-32:]
        if _END in joined:
            self.over.set()
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set()


def percentiles(values: list[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(values)
    return {f"p{each}": round(1e3 * ordered[min(len(ordered) - 1, len(ordered) * each // 100)], 3) for each in (50, 99)}


def prompts_of(streams: int, options: argparse.Namespace) -> list[list[int]]:
    """The same for both."""
    chance = random.Random(streams)
    return [[chance.randrange(1, options.vocabulary) for _ in range(options.prompt_tokens)] for _ in range(streams)]


async def stream_all(server: Server, streams: int, options: argparse.Namespace, max_tokens: int) -> list[Stream]:
    """All at once, each to its end."""
    loop, found = asyncio.get_running_loop(), list[Stream]()
    for prompt in prompts_of(streams, options):
        body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
        )
        stream = Stream(head.encode() + b"\r\n\r\n" + data)
        await loop.create_connection(lambda stream=stream: stream, server.host, server.port)
        found.append(stream)
    for stream in found:
        stream.send()
    await asyncio.gather(*[stream.over.wait() for stream in found])
    broken = [stream.head for stream in found if _END not in stream.tail]
    if broken:
        raise SystemExit(f"{len(broken)} of {streams} streams broke: {broken[0]!r}")
    return found


def over_http(server: Server, streams: int, options: argparse.Namespace) -> dict[str, Any]:
    """One measured round after one to warm up."""
    assert server.process is not None
    asyncio.run(stream_all(server, streams, options, 8))
    pids = (server.process.pid, server.engine_pid())
    before = [cpu_seconds(pid) for pid in pids]
    found = asyncio.run(stream_all(server, streams, options, options.max_tokens))
    front, engine = (cpu_seconds(pid) - then for pid, then in zip(pids, before, strict=True))
    seconds = max(each.arrivals[-1][0] for each in found) - min(each.begin for each in found)
    tokens, events = streams * options.max_tokens, sum(count for each in found for _, count in each.arrivals)
    gaps = [
        (now - then) / count
        for each in found
        for (then, _), (now, count) in zip(each.arrivals, each.arrivals[1:], strict=False)
        for _ in range(count)
    ]
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "tokens_per_event": round(tokens / events, 2),
        "front_cpu_us_per_token": round(1e6 * front / tokens, 1),
        "engine_process_cpu_us_per_token": round(1e6 * engine / tokens, 1),
        "time_to_first_token_ms": percentiles([each.arrivals[0][0] - each.begin for each in found]),
        "inter_token_ms": percentiles(gaps),
    }


def alone(options: argparse.Namespace) -> dict[str, float]:
    """Tokens/s of LLM.generate by the number of requests: what a process of its own prints."""
    from gapless import LLM, SamplingParams

    found: dict[str, float] = {}
    with LLM(
        options.model, load=options.load, shape=options.shape, tokenizer=options.tokenizer, **_engine(options)
    ) as llm:
        for streams in options.requests:
            prompts: list[Any] = [{"prompt_token_ids": ids} for ids in prompts_of(streams, options)]
            for max_tokens in (8, options.max_tokens):
                params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
                before = time.perf_counter()
                llm.generate(prompts, params, use_tqdm=False)
                seconds = time.perf_counter() - before
            found[str(streams)] = streams * options.max_tokens / seconds
    return found


def _engine(options: argparse.Namespace) -> dict[str, Any]:
    given = {"device": options.device, "max_rows": max(options.requests), "lookahead": options.lookahead}
    tiny = {"num_blocks": 16_384, "max_model_len": 4096} if options.tiny else {}
    return {**given, **tiny, "prefix_cache": False}


def _arguments(options: argparse.Namespace) -> list[str]:
    found = ["--model", options.model, "--load", options.load, "--max-rows", str(max(options.requests))]
    for name in ("shape", "tokenizer", "device"):
        if getattr(options, name) is not None:
            found += [f"--{name}", getattr(options, name)]
    found += ["--lookahead", str(options.lookahead), "--no-prefix-cache", "--log-interval", "0", "--no-timeline"]
    return [*found, *(_TINY if options.tiny else ()), *options.server]


def parse() -> argparse.Namespace:
    """The command line. Without a model or a shape, a tiny one is made."""
    parser = argparse.ArgumentParser(description="Measure what HTTP costs.")
    parser.add_argument("--model")
    parser.add_argument("--shape", help="with random weights, as llama-8b")
    parser.add_argument("--tokenizer")
    parser.add_argument("--device")
    parser.add_argument("--lookahead", type=int, default=1)
    parser.add_argument("--requests", default="32,256", help="streams at once; several numbers with commas")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=250, help="prompts have ids below this")
    parser.add_argument("--min-ratio", type=float, default=0.0)
    parser.add_argument("--alone", action="store_true", help="the engine alone, in this process")
    parser.add_argument("server", nargs="*", help="behind --: further options of the server")
    options = parser.parse_args()
    options.requests = [int(each) for each in str(options.requests).split(",")]
    options.tiny = options.model is None and options.shape is None
    options.load = "auto" if options.model is not None and options.shape is None else "random"
    if options.tiny:
        options.model, options.device = tiny_folder(), "cpu"
    options.model = options.model or "demo"
    return options


def main() -> int:
    """The engine alone first, so that its memory is free again for the server's."""
    options = parse()
    if options.alone:
        print(json.dumps(alone(options)))
        return 0
    done = subprocess.run([sys.executable, *sys.argv, "--alone"], stdout=subprocess.PIPE, text=True, check=True)
    offline: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    server = Server(_arguments(options), key="")
    found: list[dict[str, Any]] = []
    try:
        server.wait_ready()
        for streams in options.requests:
            http = over_http(server, streams, options)
            ratio = http["tokens_per_second"] / offline[str(streams)]
            engine = {"engine_alone_tokens_per_second": round(offline[str(streams)], 1), "ratio": round(ratio, 3)}
            found.append({"streams": streams, **http, **engine})
    finally:
        server.stop()
    shown = options.shape or ("one tiny layer" if options.tiny else options.model)
    sizes = {"prompt_tokens": options.prompt_tokens, "max_tokens": options.max_tokens}
    print(json.dumps({"model": shown, **sizes, "results": found}, indent=2))
    return 0 if all(each["ratio"] >= options.min_ratio for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
