"""Predicted step times follow from the costs in closed form where nothing varies."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from gapless.bench.predict import predict
from gapless.cli.program import app


@pytest.mark.parametrize("lookahead", [0, 1, 2, 4])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0, 1.5])
def test_a_step_takes_what_its_slowest_loop_takes(lookahead: int, ratio: float):
    """The device, the host, or once around host, copies and device, shared by the steps in flight."""
    device, copy = 1e-3, 1e-5
    host = ratio * device
    found = predict(lookahead, host=host, device=device, copy=copy, steps=60)
    want = max(device, host, (host + device + 2 * copy) / (lookahead + 1))
    assert found.step_seconds == pytest.approx(want, rel=1e-3)
    assert found.idle_share == pytest.approx(1 - device / want, abs=1e-3)


def test_a_second_step_ahead_helps_when_the_hosts_cost_varies():
    one, two = (predict(ahead, host=9e-4, device=1e-3, jitter=0.5, steps=300) for ahead in (1, 2))
    assert two.idle_share < 0.7 * one.idle_share


def test_a_seed_decides_the_prediction():
    def share(seed: int) -> float:
        return predict(1, host=1e-3, device=1e-3, jitter=0.5, steps=60, seed=seed).idle_share

    assert share(1) == share(1) != share(2)


def test_the_command_prints_a_line_for_each_case_and_json():
    command = ["bench", "predict", "--host-us", "500", "--device-us", "1000", "--steps", "30", "--json"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    *table, last = shown.output.strip().splitlines()
    assert len(table) == 1 + 3
    rows = json.loads(last)["rows"]
    assert [row["lookahead"] for row in rows] == [0, 1, 2]
    assert rows[0]["idle_share"] == pytest.approx(1 / 3, abs=1e-3)
