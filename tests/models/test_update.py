"""New weights in the place of the old ones: the same bits as of a model that was loaded with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gapless.errors import CorruptModelError
from gapless.models.llama import LlamaModel
from models.test_llama import Pair, Run, load, tensors_of


def logits(model: LlamaModel) -> Tensor:
    run = Run(model, [torch.arange(1, 20), torch.arange(30, 35)])
    run.step([(1, 5), (0, 12)])
    run.step([(0, 7)])
    return torch.cat([torch.cat(parts) for parts in run.logits])


def other(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor * 0.5 + 0.1 * torch.sin(torch.arange(tensor.numel()).view_as(tensor))
        for name, tensor in tensors.items()
    }


def test_all_weights_can_be_replaced(pair: Pair):
    config, oracle = pair
    old = tensors_of(oracle, config)
    model, new = load(config, old.items()), other(old)
    before, fresh = logits(model), logits(load(config, new.items()))
    model.check_weights(new)
    model.update_weights(new)
    assert torch.equal(logits(model), fresh)
    assert not torch.equal(fresh, before)
    model.update_weights({name: tensor.double() for name, tensor in old.items()})
    assert torch.equal(logits(model), before)


def test_some_of_them_can_be_replaced(pair: Pair):
    config, oracle = pair
    old = tensors_of(oracle, config)
    model = load(config, old.items())
    part = {name: tensor for name, tensor in other(old).items() if "layers.1" in name or "embed" in name}
    model.update_weights(part)
    assert torch.equal(logits(model), logits(load(config, {**old, **part}.items())))


def test_wrong_ones_are_named_and_nothing_is_changed(pair: Pair):
    config, oracle = pair
    old = tensors_of(oracle, config)
    model = load(config, old.items())
    before = logits(model)
    with pytest.raises(CorruptModelError, match=r"'model.layers.9.mlp.up_proj.weight' does not belong"):
        model.check_weights({"model.layers.9.mlp.up_proj.weight": torch.zeros(1)})
    with pytest.raises(CorruptModelError, match=r"'model.norm.weight' has shape \[3\]"):
        model.check_weights({**other(old), "model.norm.weight": torch.zeros(3)})
    assert torch.equal(logits(model), before)
