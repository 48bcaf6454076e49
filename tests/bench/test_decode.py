"""`gapless bench decode` on the CPU, and what it computes from its runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.conftest import Ran
from gapless.bench.decode import DecodeRun, Workload, summary
from gapless.bench.floors import DecodeFloor

Gapless = Callable[..., Ran]
SMALL = ["--device", "cpu", "--requests", "3", "--prompt-len", "5", "--new-tokens", "9", "--repeat", "2"]


def test_runs_alternate_and_are_held_against_the_floor_of_the_same_run(gapless: Gapless, model: Path):
    ran = gapless("bench", "decode", "--shape", str(model), *SMALL, "--lookahead", "2", "--compare", "0", "--json")
    assert ran.status == 0, ran.err
    found = json.loads(ran.out.splitlines()[-1])
    assert [result["lookahead"] for result in found["results"]] == [2, 0]
    assert found["tokens_equal"]
    assert {"device", "torch", "command", "host"} <= set(found["environment"])
    floor = found["floor"]
    assert floor["read_rate"] > 0
    for result in found["results"]:
        assert len(result["runs"]) == 2
        assert result["floor_ratio"] == pytest.approx(result["median_seconds"] / floor["seconds"])
        assert result["cost_per_million_tokens"] is None
        assert result["trace"] is None
    assert found["environment"]["torch"] in ran.out.splitlines()[1]


def test_median_spread_floor_ratio_and_cost():
    runs = [
        DecodeRun(lookahead=1, seconds=seconds, busy_share=busy, checksum=7)
        for seconds, busy in ((2.0, 0.5), (4.0, 0.9), (3.0, 0.7))
    ]
    floor = DecodeFloor(weight_bytes=1, kv_bytes=1.0, read_rate=1.0, seconds=2.0)
    work = Workload(requests=10, prompt_len=5, new_tokens=600)
    result = summary(runs, work, floor, None, 2.40)
    assert (result.median_seconds, result.spread_seconds, result.busy_share) == (3.0, 2.0, 0.7)
    assert result.tokens_per_second == 2000.0
    assert result.floor_ratio == 1.5
    assert result.cost_per_million_tokens == pytest.approx(2.40 * (3.0 / 3600) / 6000 * 1e6)
    assert summary(runs, work, floor, None, None).cost_per_million_tokens is None


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--lookahead", "17"], "--lookahead"),
        (["--compare", "-1"], "--compare"),
        (["--price-per-hour", "-1"], "--price-per-hour"),
        (["--new-tokens", "70000"], "has a context of 65536"),
        (["--kernel-trace"], "needs a GPU"),
    ],
)
def test_what_can_not_be_measured_is_refused(gapless: Gapless, model: Path, argv: list[str], said: str):
    ran = gapless("bench", "decode", "--shape", str(model), *SMALL, *argv)
    assert ran.status == 2
    assert said in ran.err
