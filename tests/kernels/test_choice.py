"""The choice of linear kernels: the fastest, once, kept in a file that may also be missing, broken or out of reach."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from gapless.kernels.choice import Kind, LinearChoices
from gapless.kernels.linear import CANDIDATES, LinearTiles

WEIGHT = torch.empty(256, 128, dtype=torch.bfloat16)
KINDS = {Kind.of(WEIGHT, gated=False): [WEIGHT]}


class Clock:
    """Says that the n-th way takes the least time, without running it. Way 0 is torch's product."""

    def __init__(self, best: int) -> None:
        self.best = best
        self.timings = 0

    def __call__(self, work: Callable[[], object]) -> float:
        self.timings += 1
        return abs(self.timings - 1 - self.best)


def prepare(file: Path | None, clock: Clock, sizes: tuple[int, ...] = (8, 16, 32)) -> LinearChoices:
    choices = LinearChoices(file)
    choices.prepare(KINDS, sizes, torch.zeros(8, dtype=torch.int32), clock)
    return choices


def test_the_fastest_way_is_taken_for_all_sizes_that_share_a_tile():
    clock = Clock(2)
    choices = prepare(None, clock, (8, 16))
    assert choices.get(WEIGHT, 8, gated=False) == choices.get(WEIGHT, 16, gated=False) == CANDIDATES[1]
    assert clock.timings == 1 + len(CANDIDATES)


def test_torchs_product_is_taken_where_it_is_the_fastest_and_where_nothing_was_prepared():
    choices = prepare(None, Clock(0))
    assert choices.get(WEIGHT, 8, gated=False) is None
    assert choices.get(WEIGHT, 9, gated=False) is None
    assert choices.get(WEIGHT, 8, gated=True) is None


def test_a_choice_is_kept_and_not_timed_again(tmp_path: Path):
    file = tmp_path / "new" / "linear.json"
    prepare(file, Clock(3))
    clock = Clock(1)
    assert prepare(file, clock).get(WEIGHT, 8, gated=False) == CANDIDATES[2]
    assert clock.timings == 0


@pytest.mark.parametrize("text", ["", "[]", "{", '{"256x128 bfloat16 16": {"old": 1}}', '{"256x128 bfloat16 16": 3}'])
def test_a_file_that_makes_no_sense_is_timed_again_and_mended(tmp_path: Path, text: str):
    file = tmp_path / "linear.json"
    file.write_text(text)
    assert prepare(file, Clock(1)).get(WEIGHT, 8, gated=False) == CANDIDATES[0]
    assert prepare(file, Clock(2)).get(WEIGHT, 8, gated=False) == CANDIDATES[0]


def test_tiles_that_are_no_longer_tried_are_timed_again(tmp_path: Path):
    file = tmp_path / "linear.json"
    prepare(file, Clock(1))
    file.write_text(file.read_text().replace('"num_stages": 5', '"num_stages": 7'))
    assert LinearTiles(64, 128, 1, 7) not in CANDIDATES
    assert prepare(file, Clock(2)).get(WEIGHT, 8, gated=False) == CANDIDATES[1]


def test_a_folder_that_can_not_be_written_does_no_harm(tmp_path: Path):
    (tmp_path / "file").write_text("")
    choices = prepare(tmp_path / "file" / "linear.json", Clock(1))
    assert choices.get(WEIGHT, 8, gated=False) == CANDIDATES[0]


@pytest.mark.parametrize(
    ("weight", "tokens"), [(WEIGHT.float(), 8), (WEIGHT, 513), (WEIGHT[:, :100], 8), (WEIGHT.T, 8)]
)
def test_what_the_kernels_can_not_multiply_is_left_to_torch(weight: torch.Tensor, tokens: int):
    choices, clock = LinearChoices(None), Clock(1)
    choices.prepare({Kind.of(weight, gated=False): [weight]}, [tokens], torch.zeros(8, dtype=torch.int32), clock)
    assert choices.get(weight, tokens, gated=False) is None
    assert clock.timings == 0
