"""The read kernel under Triton's interpreter; run by test_read_kernel.py."""

from __future__ import annotations

import pytest
import torch

from gapless.bench.ceilings import PIECE
from gapless.bench.read_kernel import TILES, readers


@pytest.mark.parametrize("way", range(len(TILES)))
def test_every_number_is_read_once(way: int):
    data = torch.randint(-(2**31), 2**31, (PIECE // 4,), dtype=torch.int32)
    sums = readers(data)[way]().long()
    assert int(sums.sum() - data.sum()) % 2**32 == 0
    assert sums.count_nonzero() == sums.numel()
