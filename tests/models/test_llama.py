"""The family computes what transformers computes, however a sequence is cut into steps, through the paged cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gapless.attention import make_attention
from gapless.attention.base import LayerKV
from gapless.attention.scenario import batch_of, shuffled_block_table
from gapless.config import ModelConfig
from gapless.errors import CorruptModelError, UnsupportedModelError
from gapless.kernels.normed import Normed
from gapless.models.base import Model
from gapless.models.layers import Linear, TorchOps
from gapless.models.llama import LlamaModel
from gapless.models.registry import build_model

CPU = torch.device("cpu")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BLOCK_SIZE = 16
COLUMNS = 4
Pair = tuple[ModelConfig, Any]
Step = Sequence[tuple[int, int]]  # (row, tokens), entries with one token first


def load(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> LlamaModel:
    attention = make_attention(None, device)
    return LlamaModel.load(
        config, tensors, device=device, dtype=dtype, attention=attention, max_position=config.max_position
    )


def tensors_of(oracle: Any, config: ModelConfig) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(oracle.state_dict())
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


class Run:
    """A model with a cache of its own, poisoned, and the sequences that are fed to it step by step."""

    def __init__(self, model: Model, sequences: Sequence[Tensor], device: torch.device = CPU) -> None:
        self.model, self.sequences = model, sequences
        self.done = [0] * len(sequences)
        self.logits: list[list[Tensor]] = [[] for _ in sequences]
        self.table_RC = shuffled_block_table(len(sequences), COLUMNS, torch.Generator().manual_seed(0), device)
        num_blocks = len(sequences) * COLUMNS + 1
        layers = model.kv_spec.allocate(num_blocks, BLOCK_SIZE, torch.float32, device)
        self.kv = [LayerKV(layer.k_BKSD.fill_(torch.nan), layer.v_BKSD.fill_(torch.nan)) for layer in layers]

    def step(self, entries: Step) -> None:
        rows, counts = zip(*entries, strict=True)
        tokens = torch.cat([self.sequences[row][self.done[row] : self.done[row] + count] for row, count in entries])
        for row, count in entries:
            self.done[row] += count
        batch = batch_of(rows, counts, [self.done[row] for row in rows], self.table_RC)
        with torch.inference_mode():
            logits_TV = self.model.logits(self.model.forward(tokens.to(batch.rows_E), self.kv, batch))
        for row, part in zip(rows, logits_TV.split(list(counts)), strict=True):
            self.logits[row].append(part.cpu())

    def compare(self, oracle: Any) -> None:
        for row, sequence in enumerate(self.sequences):
            with torch.no_grad():
                expected = oracle(sequence[None, : self.done[row]]).logits[0]
            torch.testing.assert_close(torch.cat(self.logits[row]), expected, rtol=1e-4, atol=1e-4)


def random_sequences(lengths: Sequence[int], vocab: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocab, (length,), generator=generator) for length in lengths]


STEPS: dict[str, tuple[list[int], list[Step]]] = {
    "prompts whole": ([37, 11], [[(0, 37), (1, 11)]]),
    "uneven chunks between decodes": (
        [50, 23, 9],
        [
            [(1, 7)],
            [(2, 4), (0, 17)],
            [(1, 1), (2, 5), (0, 9)],
            [(0, 1), (1, 15)],
            [(0, 23)],
        ],
    ),
    "decodes after a prefill": ([30, 12, 20], [[(0, 22), (1, 4), (2, 12)], *[[(2, 1), (0, 1), (1, 1)]] * 8]),
    "decodes from the first token": ([9, 1], [[(1, 1), (0, 1)], *[[(0, 1)]] * 8]),
}  # fmt: skip


@pytest.mark.parametrize("device_name", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("name", STEPS)
def test_logits_equal_transformers(pair: Pair, name: str, device_name: str):
    config, oracle = pair
    lengths, steps = STEPS[name]
    device = torch.device(device_name)
    model = load(config, tensors_of(oracle, config).items(), device=device)
    run = Run(model, random_sequences(lengths, config.vocab_size), device)
    for step in steps:
        run.step(step)
    assert run.done == lengths
    run.compare(oracle)


def test_tensors_may_come_in_any_order_with_harmless_extras_and_in_another_dtype(pair: Pair):
    config, oracle = pair
    tensors = tensors_of(oracle, config)
    extras = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "model.rotary_emb.inv_freq": torch.ones(1),
    }
    if config.tie_embeddings:
        extras["lm_head.weight"] = torch.zeros(1)
    stored = {name: tensor.double() for name, tensor in tensors.items()}
    reversed_order = [*extras.items(), *reversed(stored.items())]
    first = Run(load(config, tensors.items()), random_sequences([6], config.vocab_size))
    second = Run(load(config, reversed_order), random_sequences([6], config.vocab_size))
    for run in (first, second):
        run.step([(0, 6)])
    assert torch.equal(first.logits[0][0], second.logits[0][0])


def test_a_missing_tensor_is_a_corrupt_model(pair: Pair):
    config, oracle = pair
    tensors = tensors_of(oracle, config)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CorruptModelError, match=r"missing.*layers\.1\.mlp\.up_proj\.weight"):
        load(config, tensors.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.odd", r"model\.layers\.0\.odd.*not belong"),
        ("model.norm.weight", r"model\.norm\.weight.*shape \[3\].*\[48\]"),
    ],
)
def test_an_unknown_or_wrongly_shaped_tensor_is_a_corrupt_model(pair: Pair, name: str, message: str):
    config, oracle = pair
    with pytest.raises(CorruptModelError, match=message):
        load(config, {**tensors_of(oracle, config), name: torch.ones(3)}.items())


def test_a_repeated_tensor_is_a_corrupt_model(pair: Pair):
    config, oracle = pair
    tensors = list(tensors_of(oracle, config).items())
    with pytest.raises(CorruptModelError, match="twice"):
        load(config, [tensors[0], *tensors])


def test_bfloat16_stays_close_to_float32(pair: Pair):
    config, oracle = pair
    tensors = tensors_of(oracle, config)
    sequences = random_sequences([12], config.vocab_size)
    exact = Run(load(config, tensors.items()), sequences)
    rounded = Run(load(config, tensors.items(), torch.bfloat16), sequences)
    rounded.kv = [LayerKV(layer.k_BKSD.bfloat16(), layer.v_BKSD.bfloat16()) for layer in rounded.kv]
    for run in (exact, rounded):
        run.step([(0, 11)])
        run.step([(0, 1)])
    difference = torch.cat(rounded.logits[0]).float() - torch.cat(exact.logits[0])
    assert difference.norm() < 0.05 * torch.cat(exact.logits[0]).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_packing_a_linear_map_does_not_change_it(dtype: torch.dtype, bias: bool):
    generator = torch.Generator().manual_seed(0)
    plain = Linear(
        torch.randn(33, 20, generator=generator).to(dtype),
        torch.randn(33, generator=generator).to(dtype) if bias else None,
    )
    packed, ops = plain.pack(), TorchOps()
    for tokens in (1, 7, 300):
        x_TI = torch.randn(tokens, 20, generator=generator).to(dtype)
        torch.testing.assert_close(ops.linear(Normed(x_TI), *packed.weights), ops.linear(Normed(x_TI), *plain.weights))


def test_the_registry_builds_every_supported_architecture(pair: Pair):
    config, oracle = pair
    model = build_model(
        config,
        tensors_of(oracle, config).items(),
        device=CPU,
        dtype=torch.float32,
        attention=make_attention(None, CPU),
        max_position=64,
    )
    assert (model.vocab_size, model.max_position, model.eos_token_ids) == (97, 64, (2,))
    assert model.kv_spec.num_layers == config.num_layers


def test_an_unsupported_architecture_is_named_with_those_that_are():
    config = ModelConfig(
        architecture="MambaForCausalLM",
        vocab_size=8,
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=8,
        rms_norm_eps=1e-5,
        max_position=8,
    )
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        build_model(config, [], device=CPU, dtype=torch.float32, attention=make_attention(None, CPU), max_position=8)
