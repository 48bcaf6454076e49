"""`gapless bench prefill` on the CPU, and the share of attention in made-up parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.conftest import Ran
from gapless.bench.floors import linear_operations
from gapless.bench.prefill import ATTENTION_KERNELS, attention_share
from gapless.bench.trace import Part
from gapless.weights.hf_config import load_shape

Gapless = Callable[..., Ran]


def test_lengths_are_measured_against_matrix_products_of_the_same_run(gapless: Gapless, model: Path):
    options = ["--device", "cpu", "--tokens", "60", "--repeat", "2", "--json"]
    ran = gapless("bench", "prefill", "--shape", str(model), "--prompt-len", "20", "--prompt-len", "100", *options)
    assert ran.status == 0, ran.err
    found = json.loads(ran.out.splitlines()[-1])
    assert [(each["prompt_len"], each["requests"]) for each in found["results"]] == [(20, 3), (100, 1)]
    assert found["matrix_rate"] > 0
    for each in found["results"]:
        tokens = each["requests"] * each["prompt_len"]
        operations = linear_operations(load_shape(model), tokens, each["requests"])
        assert each["tokens_per_second"] == pytest.approx(tokens / each["median_seconds"])
        assert each["linear_share"] == pytest.approx(operations / each["median_seconds"] / found["matrix_rate"])
        assert each["attention_share"] is None


def test_a_run_has_eight_full_steps_of_the_usual_lengths(gapless: Gapless, model: Path):
    ran = gapless("bench", "prefill", "--shape", str(model), "--device", "cpu", "--repeat", "1", "--json")
    assert ran.status == 0, ran.err
    found = json.loads(ran.out.splitlines()[-1])["results"]
    assert [(each["prompt_len"], each["requests"]) for each in found] == [(512, 4), (2048, 1), (8192, 1)]


def test_a_prompt_that_leaves_no_room_for_a_token_is_refused(gapless: Gapless, model: Path):
    ran = gapless("bench", "prefill", "--shape", str(model), "--device", "cpu", "--prompt-len", "65536")
    assert ran.status == 2
    assert "has a context of 65536" in ran.err
    assert gapless("bench", "prefill", "--shape", str(model), "--device", "cpu", "--kernel-trace").status == 2


def test_attention_is_told_by_the_names_of_its_kernels():
    parts = [Part("prefill_kernel", 30.0), Part("void at::native::reduce_kernel<512, 1>", 20.0), Part("nvjet", 50.0)]
    assert attention_share(parts) == pytest.approx(0.3)


def test_the_attention_kernels_have_the_names_that_are_looked_for():
    pytest.importorskip("triton")
    from gapless.kernels.paged_decode import decode_kernel, reduce_kernel
    from gapless.kernels.paged_prefill import prefill_kernel

    assert {each.__name__ for each in (decode_kernel, reduce_kernel, prefill_kernel)} == ATTENTION_KERNELS
