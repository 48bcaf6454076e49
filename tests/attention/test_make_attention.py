"""Which backend a name and a device give."""

from __future__ import annotations

import pytest
import torch

from gapless.attention import make_attention
from gapless.errors import ConfigError

CPU = torch.device("cpu")


def test_the_cpu_gets_the_torch_backend():
    assert make_attention(None, CPU).name == "torch"
    assert make_attention("torch", CPU).name == "torch"


def test_an_unknown_name_is_refused_with_the_names_that_exist():
    with pytest.raises(ConfigError, match=r"torch, triton, not 'flash'"):
        make_attention("flash", CPU)


def test_triton_on_the_cpu_is_refused():
    with pytest.raises(ConfigError, match="CUDA"):
        make_attention("triton", CPU)
