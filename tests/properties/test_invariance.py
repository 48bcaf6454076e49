"""PROPERTY 19: in deterministic mode the logits that a token is sampled from have the same bits in any company, at any
lookahead and chunking, over a prefix from the cache, and after a preemption."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gapless.attention import make_attention
from gapless.config import EngineConfig, ModelConfig
from gapless.device.cpu import CpuDevice
from gapless.engine.admission import Admission, ModelFacts
from gapless.engine.build import build_loop
from gapless.models.layers import make_ops
from gapless.models.llama import LlamaModel
from gapless.outcome import Committed
from gapless.params import SamplingParams
from gapless.sampling.torch_sampler import TorchSampler
from gapless.weights.random import random_weights

CPU = torch.device("cpu")
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=211,
    hidden_size=200,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=50,
    intermediate_size=1000,
    rms_norm_eps=1e-5,
    max_position=128,
)
SHARED = [7 * place % 211 for place in range(32)]
PROMPTS = [[*SHARED, 5, 6], [*SHARED, 8], [9], [*SHARED[:20], 3], list(range(60)), [4, 4, 4, 4, 4, 4, 4]]
NEW_TOKENS = 18
ALONE = EngineConfig(lookahead=0, max_rows=1, device="cpu", num_blocks=64, block_size=8, prefix_cache=False)
CROWDS = {
    "synchronous": EngineConfig(lookahead=0, max_rows=8, device="cpu", num_blocks=64, block_size=8),
    "one ahead, small chunks": EngineConfig(max_rows=4, max_batch_tokens=7, device="cpu", num_blocks=64, block_size=8),
    "two ahead, scarce blocks": EngineConfig(
        lookahead=2, max_rows=6, max_batch_tokens=40, device="cpu", num_blocks=14, block_size=8
    ),
    "three ahead, two rows": EngineConfig(lookahead=3, max_rows=2, max_batch_tokens=33, device="cpu", num_blocks=40),
}
Logits = dict[tuple[int, int], Tensor]  # by the request's seed and the token's position


class RecordingSampler(TorchSampler):
    """Keeps what each token was sampled from."""

    def __init__(self) -> None:
        self.logits: Logits = {}

    def sample(self, logits_EV: Tensor, rows_E: Tensor, positions_E: Tensor, *args: Any, **options: Any) -> Tensor:
        seeds: list[list[int]] = args[0].seed_R2[rows_E.long()].tolist()
        for seed, position, logits_V in zip(seeds, positions_E.tolist(), logits_EV, strict=True):
            before = self.logits.setdefault((seed[0], position), logits_V.clone())
            assert torch.equal(before, logits_V)
        return super().sample(logits_EV, rows_E, positions_E, *args, **options)


def generate(config: EngineConfig, seeds: Sequence[int]) -> tuple[Logits, dict[int, list[int]], int]:
    """What the tokens of PROMPTS[seed - 1] were sampled from, the tokens of each request, and how often one was
    preempted."""
    model = LlamaModel.load(
        MODEL,
        random_weights(MODEL, CPU, torch.float32, 1),
        device=CPU,
        dtype=torch.float32,
        attention=make_attention(None, CPU, deterministic=True),
        max_position=MODEL.max_position,
        ops=make_ops(CPU, deterministic=True),
    )
    sampler, tokens = RecordingSampler(), defaultdict[int, list[int]](list)
    loop, limits = build_loop(model, config, CpuDevice(), sampler, torch.float32)
    admission, seed_of = Admission(limits, ModelFacts(model.vocab_size, model.eos_token_ids), 0), dict[int, int]()

    def publish(committed: Committed) -> None:
        for request_id, token in zip(committed.request_ids.tolist(), committed.tokens.tolist(), strict=True):
            tokens[seed_of[request_id]].append(token)

    loop.publish = publish
    for seed in seeds:
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=NEW_TOKENS, ignore_eos=True)
        request = admission.make_request(PROMPTS[seed - 1], params)
        seed_of[request.request_id] = seed
        loop.scheduler.add(request)
    while loop.has_work:
        loop.step()
    preemptions = loop.scheduler.stats.preemptions
    loop.close()
    return sampler.logits, tokens, preemptions


@pytest.fixture(scope="module")
def alone() -> tuple[Logits, dict[int, list[int]]]:
    logits, tokens = Logits(), dict[int, list[int]]()
    for seed in range(1, len(PROMPTS) + 1):
        own, said, _ = generate(ALONE, [seed])
        logits |= own
        tokens |= said
    return logits, tokens


@pytest.mark.parametrize("name", CROWDS)
def test_logits_and_tokens_are_those_of_each_request_alone(name: str, alone: tuple[Logits, dict[int, list[int]]]):
    logits, tokens, preemptions = generate(CROWDS[name], list(range(len(PROMPTS), 0, -1)))
    assert tokens == alone[1]
    assert logits.keys() == alone[0].keys()
    assert all(torch.equal(each, alone[0][key]) for key, each in logits.items())
    assert preemptions > 0 or "scarce" not in name
