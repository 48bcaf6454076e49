"""Products with packed weights: few sizes, whatever the number of tokens, and the numbers of a plain product."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from gapless.models.layers import LARGEST_PRODUCT, Linear, packed_linear, product_tokens


def test_a_product_takes_few_more_tokens_than_there_are_and_one_of_few_numbers():
    taken = [product_tokens(tokens) for tokens in range(LARGEST_PRODUCT + 1)]
    assert all(tokens <= size <= tokens * 9 / 8 for tokens, size in enumerate(taken))
    assert len(set(taken)) == 1 + 8 + 8 * 7  # none, eight, and eight in each doubling from 8 to 1,024


@pytest.mark.parametrize("tokens", [0, 1, 9, 100, LARGEST_PRODUCT, LARGEST_PRODUCT + 1, 2 * LARGEST_PRODUCT + 19])
@pytest.mark.parametrize("biased", [False, True])
def test_a_packed_product_is_the_plain_one(tokens: int, biased: bool):
    generator = torch.Generator().manual_seed(tokens)
    plain = Linear(torch.randn(48, 32, generator=generator), torch.randn(48, generator=generator) if biased else None)
    packed = plain.pack()
    if not packed.weight_OI.is_mkldnn:
        pytest.skip("this build of torch has no packed products")
    x_TI = torch.randn(tokens, 32, generator=generator)
    y_TO = packed_linear(x_TI, packed.weight_OI, packed.bias_O)
    assert y_TO.is_contiguous()
    torch.testing.assert_close(y_TO, functional.linear(x_TI, *plain.weights), rtol=1e-5, atol=1e-5)
