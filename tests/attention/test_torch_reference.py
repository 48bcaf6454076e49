"""TorchAttention against dense attention worked out in float64 one query at a time."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gapless.attention.base import KVSpec, LayerKV
from gapless.attention.scenario import Scenario, batch_of, make_scenario, shuffled_block_table
from gapless.attention.torch_reference import TorchAttention

CPU = torch.device("cpu")


def dense_attention(scenario: Scenario, scale: float) -> Tensor:
    """Every query by itself, with the keys and values of its sequence read one token at a time."""
    batch, kv = scenario.batch, scenario.kv
    size = kv.block_size
    group = scenario.q_TND.shape[1] // kv.k_BKSD.shape[1]
    outs = list[Tensor]()
    for token, (row, position) in enumerate(zip(batch.token_rows_T.tolist(), batch.positions_T.tolist(), strict=True)):
        places = [(int(batch.block_table_RC[row, p // size]), p % size) for p in range(position + 1)]
        k_LND = torch.stack([kv.k_BKSD[b, :, s] for b, s in places]).double().repeat_interleave(group, dim=1)
        v_LND = torch.stack([kv.v_BKSD[b, :, s] for b, s in places]).double().repeat_interleave(group, dim=1)
        weights_LN = ((k_LND * scenario.q_TND[token].double()).sum(-1) * scale).softmax(dim=0)
        outs.append((weights_LN.unsqueeze(-1) * v_LND).sum(0))
    return torch.stack(outs)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    decodes = draw(st.lists(st.integers(1, 40), max_size=4))
    chunks = draw(st.lists(st.tuples(st.integers(2, 20), st.integers(0, 30)), min_size=not decodes, max_size=3))
    kv_heads, group = draw(st.sampled_from([(3, 3), (1, 4), (2, 7), (2, 1)]))
    return make_scenario(
        [1] * len(decodes) + [queries for queries, _ in chunks],
        decodes + [queries + cached for queries, cached in chunks],
        heads=(kv_heads * group, kv_heads),
        head_dim=draw(st.sampled_from([2, 8, 80])),
        block_size=draw(st.sampled_from([1, 4, 16])),
        seed=draw(st.integers(0, 2**32)),
        max_kv=draw(st.none() | st.integers(50, 90)),
    )


@given(scenarios())
@settings(max_examples=40, deadline=None)
def test_it_agrees_with_dense_attention_for_any_mix_of_entries(scenario: Scenario):
    out_TND = TorchAttention().attend(scenario.q_TND, scenario.kv, scenario.batch, scale=0.3)
    assert out_TND.is_contiguous()
    torch.testing.assert_close(out_TND.double(), dense_attention(scenario, 0.3), rtol=1e-5, atol=1e-5)


def test_a_long_chunk_after_a_short_context_agrees():
    scenario = make_scenario([515], [520], heads=(2, 1), head_dim=4)
    out_TND = TorchAttention().attend(scenario.q_TND, scenario.kv, scenario.batch, scale=0.5)
    torch.testing.assert_close(out_TND.double(), dense_attention(scenario, 0.5), rtol=1e-5, atol=1e-5)


def test_decodes_of_very_different_lengths_keep_their_places():
    lengths = [3, 400, 1, 90, 16, 17, 250, 64]
    scenario = make_scenario([1] * len(lengths), lengths, heads=(4, 2), head_dim=8)
    out_TND = TorchAttention().attend(scenario.q_TND, scenario.kv, scenario.batch, scale=0.5)
    torch.testing.assert_close(out_TND.double(), dense_attention(scenario, 0.5), rtol=1e-5, atol=1e-5)


def test_padding_on_the_scratch_row_leaves_the_other_entries_alone():
    plain = make_scenario([1, 1], [7, 30], heads=(4, 2), head_dim=8)
    padded = make_scenario([1, 1], [7, 30], heads=(4, 2), head_dim=8, padding=3)
    q_TND = torch.cat((plain.q_TND, padded.q_TND[2:]))
    out_TND = TorchAttention().attend(q_TND, padded.kv, padded.batch, scale=0.5)
    # the same seed gives both scenarios the same cache
    torch.testing.assert_close(out_TND[:2], TorchAttention().attend(plain.q_TND, plain.kv, plain.batch, scale=0.5))


def test_half_precision_is_summed_in_float32():
    scenario = make_scenario([1, 5], [600, 40], heads=(4, 2), head_dim=16, dtype=torch.bfloat16)
    out_TND = TorchAttention().attend(scenario.q_TND, scenario.kv, scenario.batch, scale=0.25)
    assert out_TND.dtype == torch.bfloat16
    torch.testing.assert_close(out_TND.double(), dense_attention(scenario, 0.25), rtol=2**-8, atol=1e-4)


def test_append_writes_strided_views_to_their_places_and_nothing_else():
    kv = LayerKV(torch.full((9, 2, 4, 8), torch.nan), torch.full((9, 2, 4, 8), torch.nan))
    table_RC = shuffled_block_table(2, 4, torch.Generator().manual_seed(1), CPU)
    batch = batch_of([1, 0], [1, 6], [3, 9], table_RC)
    both = torch.randn(7, 4, 8)
    TorchAttention().append(both[:, :2], both[:, 2:], kv, batch)
    for token, (row, position) in enumerate([(1, 2), *[(0, p) for p in range(3, 9)]]):
        block, offset = int(table_RC[row, position // 4]), position % 4
        assert torch.equal(kv.k_BKSD[block, :, offset], both[token, :2])
        assert torch.equal(kv.v_BKSD[block, :, offset], both[token, 2:])
    assert int((~kv.k_BKSD.isnan()).sum()) == 7 * 2 * 8


def test_the_cache_of_a_spec_has_the_contract_layout():
    spec = KVSpec(num_layers=2, num_kv_heads=3, head_dim=8)
    layers = spec.allocate(5, 16, torch.float32, CPU)
    assert [layer.k_BKSD.shape for layer in layers] == [(5, 3, 16, 8)] * 2
    assert all(layer.k_BKSD.is_contiguous() and layer.v_BKSD.is_contiguous() for layer in layers)
