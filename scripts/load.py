"""Many clients at once against a server, well-behaved ones and others, and what must hold at the end.

python scripts/load.py --clients 256 --minutes 10 > docs/load.json
python scripts/load.py --crowd 1000                        as many streams open at once, and /health meanwhile
python scripts/load.py --url http://127.0.0.1:8000 --kills 0 --api-key KEY      a server that runs

It starts a server of its own with the demo model; arguments behind -- are that server's. Each prompt has a marker that
the model repeats, so an answer with the marker of another request would be seen. Prints a report as JSON; ends with
status 1 if something in it is wrong: `failures` says what.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from load_clients import Client, Mix, Plan, Tally, make_plan
from load_server import Server, rss_mib, tiny_folder

PROBE = Path(__file__).with_name("load_probe.py")
SAMPLE_SECONDS, CROWD_SAMPLE_SECONDS = 5.0, 0.2
AFTERMATH = 5.0  # seconds after the engine is back in which answers may still tell of its death
END_SECONDS = 60.0
MAX_BODY = 256 * 1024
FLAT_MIB, FLAT_SHARE = 16.0, 0.03
RESTART_MIB = 32.0  # that an engine's death may cost the front, once
SERVER = ["--max-rows", "64", "--num-blocks", "300", "--max-model-len", "2K", "--max-body", "256K", "--device", "cpu"]


@dataclass
class Watched:
    """What was looked at along the way. Times count from the begin.

    memory   (time, MiB) of the front process, and of each engine process by its pid
    kills    when the engine was killed, and when there was one again
    health   the longest that /health took, and when, of so many probes; `unhealthy` of them said no though no engine
             had died
    """

    begin: float = field(default_factory=time.monotonic)
    front: list[tuple[float, float]] = field(default_factory=list)
    engines: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    kills: list[tuple[float, float]] = field(default_factory=list)
    health: tuple[float, float] = (0.0, 0.0)
    probes: int = 0
    unhealthy: int = 0
    preemptions: int = 0
    most_running: int = 0
    most_waiting: int = 0
    most_open: int = 0

    def now(self) -> float:
        return time.monotonic() - self.begin

    def look(self, server: Server) -> None:
        """One sample."""
        now = self.now()
        if server.process is not None:
            front, pid = rss_mib(server.process.pid), server.engine_pid()
            self.front += [] if front is None else [(now, front)]
            engine = rss_mib(pid)
            if pid is not None and engine is not None:
                self.engines.setdefault(pid, []).append((now, engine))
        stats = server.stats()
        self.preemptions = max(self.preemptions, stats.get("preemptions", 0))
        self.most_running = max(self.most_running, stats.get("running", 0))
        self.most_waiting = max(self.most_waiting, stats.get("waiting", 0))
        self.most_open = max(self.most_open, stats.get("running", 0) + stats.get("waiting", 0))

    def front_lives(self) -> list[list[tuple[float, float]]]:
        """The front's memory before the first kill, between kills, and after the last: errors for everybody who waits
        and all of them coming back take some of it, once."""
        borders = [0.0, *(back for _, back in self.kills), math.inf]
        return [[each for each in self.front if begin <= each[0] < end] for begin, end in pairwise(borders)]

    def take(self, probes: str) -> None:
        """What load_probe.py has printed."""
        for line in probes.splitlines():
            begin, status, seconds = map(float, line.split())
            self.probes += 1
            self.health = max(self.health, (seconds, begin - self.begin))
            self.unhealthy += status != 200 and not self.excuses(begin, begin)

    def excuses(self, begin: float, end: float) -> bool:
        """Whether the engine was dead at some time of it."""
        return any(dead <= end - self.begin and begin - self.begin <= back + AFTERMATH for dead, back in self.kills)


async def watch(server: Server, watched: Watched, over: asyncio.Event, every: float = SAMPLE_SECONDS) -> None:
    """Until it is over, every so many seconds."""
    command = [sys.executable, str(PROBE), server.host, str(server.port)]
    with tempfile.TemporaryFile("w+") as printed, subprocess.Popen(command, stdout=printed) as probe:
        while not over.is_set():
            await asyncio.to_thread(watched.look, server)
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), every)
        probe.terminate()
        probe.wait()
        printed.seek(0)
        watched.take("".join(line for line in printed if line.endswith("\n")))


async def kill_engine(server: Server, watched: Watched, at: list[float]) -> None:
    """At these times, with SIGKILL."""
    for when in at:
        await asyncio.sleep(max(0.0, when - watched.now()))
        pid = server.engine_pid()
        assert pid is not None, "no engine to kill"
        begin = watched.now()
        watched.kills.append((begin, float("inf")))
        os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.2)
        await asyncio.to_thread(server.wait_ready)
        watched.kills[-1] = (begin, watched.now())


async def one_client(
    server: Server, number: int, options: argparse.Namespace, mix: Mix, tally: Tally, until: float
) -> None:
    """Requests one after the other until then."""
    chance = random.Random(f"{options.seed} {number}")
    client = Client(server.host, server.port, server.key)
    while time.monotonic() < until:
        result = await client.ask(make_plan(chance, mix, tally.markers, max_body=MAX_BODY))
        tally.add(result)
        if result.status == 503:
            await asyncio.sleep(chance.uniform(0.2, 1.0))
    client.close()


async def load(server: Server, options: argparse.Namespace) -> tuple[Tally, Watched]:
    """All clients at once, for the time that was asked for."""
    mix = Mix(options.bad, options.disconnects, options.cancels, options.slow)
    tally, watched, over = Tally(), Watched(), asyncio.Event()
    seconds = options.minutes * 60
    until = time.monotonic() + seconds
    watching = asyncio.create_task(watch(server, watched, over))
    kills = [seconds * (place + 1) / (options.kills + 1) for place in range(options.kills)]
    async with asyncio.TaskGroup() as group:
        group.create_task(kill_engine(server, watched, kills))
        for number in range(options.clients):
            group.create_task(one_client(server, number, options, mix, tally, until))
    over.set()
    await watching
    return tally, watched


async def crowd(server: Server, options: argparse.Namespace) -> tuple[Tally, Watched]:
    """That many streams, all of them open before the first has ended."""
    tally, watched, over = Tally(), Watched(), asyncio.Event()
    chance = random.Random(options.seed)
    watching = asyncio.create_task(watch(server, watched, over, CROWD_SAMPLE_SECONDS))

    async def one() -> None:
        marker = make_plan(chance, Mix(), tally.markers, max_body=1).marker
        body = {"prompt": f"{marker} {marker} {marker}", "max_tokens": options.crowd_tokens, "temperature": 0}
        data = json.dumps({**body, "stream": True, "ignore_eos": True}).encode()
        client = Client(server.host, server.port, server.key)
        tally.add(await client.ask(Plan("stream", "/v1/completions", data, marker, stream=True, greedy=True)))
        client.close()

    await asyncio.gather(*[one() for _ in range(options.crowd)])
    over.set()
    await watching
    return tally, watched


def settle(server: Server) -> dict[str, Any]:
    """What is left, once nothing is or the time is up."""
    until = time.monotonic() + END_SECONDS
    while True:
        stats = server.stats()
        left = {name: stats.get(name) for name in ("running", "waiting", "kv_blocks_used")}
        if not any(left.values()) or time.monotonic() > until:
            return left
        time.sleep(0.1)


def growth(samples: list[tuple[float, float]]) -> dict[str, Any] | None:
    """The median of a process's second minute against that of its last; None if it did not live three."""
    if not samples or samples[-1][0] - samples[0][0] < 170:
        return None
    first, last = samples[0][0], samples[-1][0]
    early = statistics.median(mib for at, mib in samples if 60 <= at - first < 120)
    late = statistics.median(mib for at, mib in samples if last - at <= 60)
    minutes = [[mib for at, mib in samples if minute * 60 <= at - first < minute * 60 + 60] for minute in range(60)]
    return {
        "second_minute_mib": round(early, 1),
        "last_minute_mib": round(late, 1),
        "by_minute_mib": [round(statistics.median(each), 1) for each in minutes if each],
    }


def compare(server: Server, tally: Tally, failures: list[str]) -> dict[str, Any]:
    """The server's counters against what the clients saw: those that left may count either way."""
    ended = server.counts("gapless_requests", "finish_reason")
    refused = server.counts("gapless_requests_refused", "status")
    errors = len(tally.refused)
    told = ended.get("error", 0) + refused.get("503", 0) - server.own_refusals
    bounds = {
        "stop": (ended.get("stop", 0), tally.reasons["stop"]),
        "length": (ended.get("length", 0), tally.reasons["length"]),
        "error": (told, errors),
        "all": (
            sum(ended.values()) + sum(refused.values()) - server.own_refusals,
            sum(tally.kinds.values()) - tally.left,
        ),
    }
    for name, (here, seen) in bounds.items():
        if not seen <= here <= seen + tally.left:
            failures.append(f"metrics: {here} {name}, where clients saw {seen} and {tally.left} had left")
    for status, count in tally.statuses.items():
        if 400 <= status < 500 and refused.get(str(status), 0) != count:
            failures.append(f"metrics: {refused.get(str(status), 0)} refused with {status}, where clients saw {count}")
    return {"ended": ended, "refused": refused, "clients": dict(tally.reasons), "clients_left": tally.left}


def percentiles(values: list[float]) -> dict[str, float]:
    """In seconds."""
    ordered = sorted(values) or [0.0]
    return {f"p{each}": round(ordered[min(len(ordered) - 1, len(ordered) * each // 100)], 3) for each in (50, 90, 99)}


def report(server: Server, options: argparse.Namespace, tally: Tally, watched: Watched) -> dict[str, Any]:
    """As JSON."""
    seconds, failures = watched.now(), list(tally.failures)
    excused = [what for begin, end, what in tally.refused if watched.excuses(begin, end)]
    failures += [f"no engine had died: {what}" for begin, end, what in tally.refused if not watched.excuses(begin, end)]
    left = settle(server)
    if any(left.values()) or None in left.values():
        failures.append(f"not all is given back: {left}")
    longest, at = watched.health
    if watched.unhealthy or longest > options.health_seconds:
        failures.append(f"/health: {watched.unhealthy} times not 200, at most {longest:.2f} s, at {at:.1f} s")
    if watched.most_open < options.crowd:
        failures.append(f"only {watched.most_open} streams were open at once")
    if watched.probes < seconds / 2:
        failures.append(f"/health was asked {watched.probes} times only")
    if not options.tiny and tally.greedy >= 20 and tally.repeated < tally.greedy / 2:
        failures.append(f"only {tally.repeated} of {tally.greedy} answers have their own marker: the test sees nothing")
    fronts = [growth(part) for part in watched.front_lives()]
    lives = {f"front, life {place} of the engine": life for place, life in enumerate(fronts, 1)}
    if (
        (first := fronts[0])
        and (last := fronts[-1])
        and last["last_minute_mib"] - first["second_minute_mib"] > RESTART_MIB
    ):
        failures.append(f"the memory of the front grows with its engines: {first}, {last}")
    lives |= {f"engine {place}": growth(samples) for place, samples in enumerate(watched.engines.values(), 1)}
    for name, life in lives.items() if not options.crowd else ():  # whose KV blocks are used for the first time
        if life and life["last_minute_mib"] - life["second_minute_mib"] > max(
            FLAT_MIB, FLAT_SHARE * life["second_minute_mib"]
        ):
            failures.append(f"the memory of {name} grows: {life}")
    metrics = compare(server, tally, failures) if server.process is not None else None
    return {
        "clients": options.crowd or options.clients,
        "seconds": round(seconds, 1),
        "requests": dict(sorted(tally.kinds.items())),
        "statuses": dict(sorted(tally.statuses.items())),
        "finish_reasons": dict(tally.reasons),
        "left_by_clients": tally.left,
        "tokens_read": tally.tokens,
        "tokens_per_second": round(tally.tokens / seconds, 1),
        "time_to_first_token": percentiles(tally.firsts),
        "time_to_last_token": percentiles(tally.lasts),
        "own_markers": {"greedy_answers": tally.greedy, "with_their_marker": tally.repeated},
        "kills": [{"at": round(at, 1), "ready_after": round(end - at, 1)} for at, end in watched.kills],
        "errors_around_kills": {"all": len(excused), "within_a_stream": tally.told},
        "most_running": watched.most_running,
        "most_waiting": watched.most_waiting,
        "most_open": watched.most_open,
        "preemptions": watched.preemptions,
        "longest_health": {"seconds": round(longest, 3), "at": round(at, 1)},
        "memory": lives,
        "left_at_the_end": left,
        "metrics": metrics,
        "failures": failures[:50],
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Load a server, and see what must hold.")
    parser.add_argument("--url", help="a server that runs; else one is started")
    parser.add_argument("--api-key", default="load-key")
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--disconnects", type=float, default=0.2, help="share of streams that are left")
    parser.add_argument("--cancels", type=float, default=0.05, help="share of whole answers that are not waited for")
    parser.add_argument("--bad", type=float, default=0.1, help="share of bad requests")
    parser.add_argument("--slow", type=float, default=0.05, help="share of slow readers")
    parser.add_argument("--kills", type=int, default=1, help="of the engine's process")
    parser.add_argument("--health-seconds", type=float, default=1.0, help="that /health may take")
    parser.add_argument("--crowd", type=int, default=0, help="so many streams at once in place of all that")
    parser.add_argument("--crowd-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model in place of the demo")
    parser.add_argument("server", nargs="*", help="behind --: options of the server that is started")
    return parser.parse_args()


def main() -> int:
    """The report, and whether all is well."""
    options = parse()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    model = ["--model", tiny_folder(), "--load", "random"] if options.tiny else ["--model", "demo"]
    crowd_rows = ["--max-rows", "256", "--num-blocks", "2000", "--max-open", str(max(1, options.crowd))]
    base = [*model, *SERVER, "--log-interval", "0", *(crowd_rows if options.crowd else ())]
    server = Server([*base, *options.server], key=options.api_key, url=options.url)
    try:
        server.wait_ready()
        tally, watched = asyncio.run((crowd if options.crowd else load)(server, options))
        found = report(server, options, tally, watched)
    finally:
        last = server.stop()
    if server.process is not None and server.process.returncode != 0:
        found["failures"].append(f"the server ended with status {server.process.returncode}: {last}")
    found["failures"] += [f"the server's log: {line}" for line in server.defects[:5]]
    print(json.dumps(found, indent=2))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
