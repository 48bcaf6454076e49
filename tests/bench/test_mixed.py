"""`gapless bench mixed` on the CPU, and the loads it draws."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cli.conftest import Ran
from gapless.bench.mixed import Arrivals, MixedLoad
from gapless.errors import ConfigError

Gapless = Callable[..., Ran]


def load(seed: int = 0, rate: float = 5.0, requests: int = 4000) -> MixedLoad:
    return MixedLoad(rate=rate, requests=requests, max_prompt_len=3200, max_new_tokens=20, seed=seed)


def test_a_seed_fixes_the_load_and_another_gives_another():
    one, same, other = Arrivals.draw(load()), Arrivals.draw(load()), Arrivals.draw(load(seed=1))
    for name in ("at", "prompt_lens", "new_tokens"):
        assert np.array_equal(getattr(one, name), getattr(same, name))
        assert not np.array_equal(getattr(one, name), getattr(other, name))


def test_arrivals_are_poisson_and_lengths_even_on_a_logarithmic_scale():
    drawn = Arrivals.draw(load())
    gaps = np.diff(drawn.at)
    assert drawn.at[0] == 0.0
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.1)
    assert gaps.std() == pytest.approx(1 / 5, rel=0.1)
    assert 100 <= drawn.prompt_lens.min() < 110
    assert 3000 < drawn.prompt_lens.max() <= 3200
    assert np.median(drawn.prompt_lens) == pytest.approx(math.sqrt(100 * 3200), rel=0.1)
    assert (drawn.new_tokens.min(), drawn.new_tokens.max()) == (1, 20)


def test_with_an_infinite_rate_all_come_at_once():
    assert not Arrivals.draw(load(rate=math.inf)).at.any()


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_rate_that_lets_nothing_arrive_is_refused(rate: float):
    with pytest.raises(ConfigError, match="rate must be above 0"):
        load(rate=rate)


def test_every_token_of_every_request_is_timed(gapless: Gapless, model: Path):
    options = ["--rate", "100", "--requests", "20", "--max-prompt-len", "64", "--max-new-tokens", "12"]
    more = ["--repeat", "2", "--max-rows", "4", "--kv-cache-memory", "1M", "--device", "cpu", "--json"]
    ran = gapless("bench", "mixed", "--shape", str(model), *options, *more)
    assert ran.status == 0, ran.err
    found = json.loads(ran.out.splitlines()[-1])
    assert [result["lookahead"] for result in found["results"]] == [0, 1]
    wanted = Arrivals.draw(MixedLoad(rate=100.0, requests=20, max_prompt_len=64, max_new_tokens=12, seed=0))
    for result in found["results"]:
        for run in result["runs"]:
            assert run["tokens_per_second"] * run["seconds"] == pytest.approx(wanted.new_tokens.sum())
            assert run["seconds"] >= wanted.at[-1]
            assert 0 < run["batch_mean"] <= 4
            assert run["batch_occupancy"] == run["batch_mean"] / 4
            assert run["ttft_p50"] <= run["ttft_p99"]
            assert 0 < run["inter_token_p50"] <= run["inter_token_p99"]


def test_a_load_longer_than_the_context_is_refused(gapless: Gapless, model: Path):
    ran = gapless("bench", "mixed", "--shape", str(model), "--device", "cpu", "--max-prompt-len", "65530")
    assert ran.status == 2
    assert "has a context of 65536" in ran.err
