"""The Gluon decode kernel: what it compiles to for Hopper without a GPU, and close to float32 on one."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from gapless.attention.base import HeadRotation, LayerKV, cache_lines  # noqa: E402
from gapless.attention.scenario import Scenario, make_scenario  # noqa: E402
from gapless.attention.torch_reference import TorchAttention  # noqa: E402
from gapless.bench.prefill import ATTENTION_KERNELS  # noqa: E402
from gapless.kernels.gluon_decode import GluonDecodeTiles, decode_kernel, decode_tiles, gluon_decode, runs  # noqa: E402
from gapless.kernels.rms_norm import add_rms_norm  # noqa: E402
from gapless.models.layers import TorchOps  # noqa: E402

SHARED_BYTES, RESERVED_BYTES = 228 * 1024, 1024  # of a processor; of them, each program's that it does not see
CUDA = torch.device("cuda")
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
BOUND = 5e-3  # of the norm; rounding the answer alone to bfloat16 costs 1.7e-3
MULTIPROCESSORS = 132
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


def compiled(
    head_dim: int,
    heads: tuple[int, int],
    block_size: int,
    dtype: str,
    tiles: GluonDecodeTiles,
    *,
    rotate: bool,
    norm: bool,
) -> Any:
    group = heads[0] // heads[1]
    constants = {
        "KV_HEADS": heads[1],
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "BLOCK_N": tiles.block_n,
        "STAGES": tiles.stages,
        "ENTRIES_TILE": 256,
        "HEADS_TILE": triton.next_power_of_2(group),
        "MERGE": 4,
        "EARLY": rotate,
        "ROTATE": rotate,
        "NORM": norm,
        "DEPENDENT": True,
    }
    boxes = f"tensordesc<{dtype}[{min(block_size, tiles.block_n)}, 64],{gl.NVMMASharedLayout(128, 16, 2)!r}>"
    types = {
        **dict.fromkeys(constants, "constexpr"),
        **dict.fromkeys(("k_cache", "v_cache"), boxes),
        **dict.fromkeys(("q_END", "k_BKSD", "v_BKSD", "out_END", "qk_norm_2D"), f"*{dtype}"),
        **dict.fromkeys(("rope_PD", "partial_UGD", "partial_lse_UG"), "*fp32"),
        **dict.fromkeys(("table_stride", "q_stride", "entries", "wanted", "min_span"), "i32"),
        **dict.fromkeys(("scale_log2", "eps"), "fp32"),
    }
    names: list[str] = decode_kernel.arg_names
    signature = {name: types.get(name, "*i32") for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name == "q_stride"
    }
    source = GluonASTSource(fn=decode_kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": 1, "enable_fp_fusion": True, "launch_pdl": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "heads", "entries", "block_size", "dtype", "rotate", "norm", "programs"),
    [
        (64, (9, 3), 256, 16, "bf16", True, False, 6),
        (128, (32, 8), 32, 16, "bf16", True, True, 4),
        (64, (14, 2), 512, 64, "fp16", False, False, 9),
    ],
)
def test_it_compiles_to_bulk_copies_asked_for_before_the_wait_and_to_programs_that_fit_side_by_side(
    tmp_path: Path,
    head_dim: int,
    heads: tuple[int, int],
    entries: int,
    block_size: int,
    dtype: str,
    rotate: bool,
    norm: bool,
    programs: int,
):
    tiles = decode_tiles(head_dim, entries * heads[1], MULTIPROCESSORS)
    kernel = compiled(head_dim, heads, block_size, dtype, tiles, rotate=rotate, norm=norm)
    assert (kernel.metadata.shared + RESERVED_BYTES) * programs <= SHARED_BYTES

    (tmp_path / "cubin").write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(tmp_path / "cubin")]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    def places(word: str) -> list[int]:
        return [at for at, line in enumerate(code) if word in line]

    [wait] = places("ACQBULK")
    boxes = head_dim // 64 * max(1, tiles.block_n // block_size)
    early = sum(at < wait for at in places("UTMALDG"))
    assert early == (2 * boxes * tiles.stages if rotate else 0)
    assert not places("LDGSTS")
    assert not places("LDL")
    assert len(places("LDSM")) >= 2 * 2 * head_dim * tiles.block_n * 2 // 512  # 8 x 8 matrices, four at a time


def test_the_benches_count_it_as_attention():
    assert decode_kernel.__name__ in ATTENTION_KERNELS


def test_a_device_without_bulk_copies_keeps_the_triton_kernel():
    scenario = make_scenario([1], [20], heads=(8, 2), head_dim=128, dtype=BFLOAT16)
    assert not runs(scenario.q_TND, scenario.q_TND, scenario.kv, scenario.batch, MULTIPROCESSORS)


@pytest.mark.parametrize(("pairs", "stages"), [(96, 2), (528, 2), (529, 4), (792, 4), (793, 3), (1188, 3), (1189, 2)])
def test_its_ring_is_as_deep_as_lets_all_pairs_be_on_the_processors_at_once(pairs: int, stages: int):
    assert decode_tiles(64, pairs, MULTIPROCESSORS).stages == stages


def ragged(seed: int, entries: int, longest: int) -> list[int]:
    choose = random.Random(seed)
    edges = [1, 15, 16, 17, 31, 32, 33, 64, 65, 128, longest]
    return [*edges, *[choose.randint(1, longest) for _ in range(entries - len(edges))]]


def in_float32(kv: LayerKV) -> LayerKV:
    return LayerKV(kv.k_BKSD.float(), kv.v_BKSD.float())


def relative_error(out: Tensor, exact: Tensor) -> float:
    return float((out.float() - exact).norm() / exact.norm())


def worst_error(out: Tensor, exact: Tensor) -> float:
    out, exact = out.float().flatten(1), exact.flatten(1)
    return float(((out - exact).norm(dim=1) / exact.norm(dim=1)).max())


def decode(q_END: Tensor, scenario: Scenario, heads: int, rotation: HeadRotation | None = None) -> Tensor:
    entries, _, head_dim = q_END.shape
    out_END = torch.full((entries, heads, head_dim), 7.0, dtype=q_END.dtype, device=CUDA)
    assert runs(q_END, out_END, scenario.kv, scenario.batch, MULTIPROCESSORS)
    scale = head_dim**-0.5
    gluon_decode(q_END, out_END, scenario.kv, scenario.batch, scale, MULTIPROCESSORS, rotation=rotation)
    return out_END


SHAPES = [
    ((9, 3), 64, 16),
    ((4, 4), 64, 64),
    ((14, 2), 64, 32),
    ((32, 8), 64, 16),
    ((32, 8), 128, 16),
    ((16, 1), 128, 64),
    ((16, 8), 128, 32),
]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
@pytest.mark.parametrize(("heads", "head_dim", "block_size"), SHAPES)
def test_ragged_decodes_stay_close_to_float32_and_have_the_same_bits_again(
    heads: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype
):
    for seed, longest in enumerate((200, 900, 8192)):
        lengths = ragged(seed, 40, longest)
        scenario = make_scenario(
            [1] * 40,
            lengths,
            heads=heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype,
            device=CUDA,
            padding=3,
        )
        out_END = decode(scenario.q_TND, scenario, heads[0])
        q_END, kv = scenario.q_TND.float(), in_float32(scenario.kv)
        exact = TorchAttention().attend(q_END, kv, scenario.batch, head_dim**-0.5)
        assert relative_error(out_END[:40], exact[:40]) < BOUND
        assert worst_error(out_END[:40], exact[:40]) < 4 * BOUND
        assert all(torch.equal(decode(scenario.q_TND, scenario, heads[0])[:40], out_END[:40]) for _ in range(5))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("heads", "head_dim", "block_size"), SHAPES)
def test_new_keys_and_values_are_written_and_seen_behind_a_kernel_that_has_not_ended(
    heads: tuple[int, int], head_dim: int, block_size: int, norm: bool
):
    """In a graph that is replayed at other lengths, with NaN where the new tokens belong."""
    (num_heads, num_kv_heads), entries, longest = heads, 24, 1500
    width = (num_heads + 2 * num_kv_heads) * head_dim
    generator = torch.Generator(CUDA).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=CUDA).bfloat16()

    def scenario_of(seed: int) -> Scenario:
        lengths = ragged(seed, entries, longest)[::-1] if seed else ragged(seed, entries, longest)
        return make_scenario(
            [1] * entries,
            lengths,
            heads=heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=BFLOAT16,
            device=CUDA,
            seed=seed,
            padding=2,
            max_kv=longest,
        )

    scenario = scenario_of(0)
    batch, kv = scenario.batch, scenario.kv
    x_TM, weight_M = normal(entries + 2, width), normal(width)
    norms_2D = normal(2, head_dim) if norm else None
    rotation = HeadRotation(norms_2D, 1e-5, torch.randn(longest, head_dim, generator=generator, device=CUDA))
    exact_rotation = HeadRotation(None if norms_2D is None else norms_2D.float(), 1e-5, rotation.rope_PD)

    def run() -> Tensor:
        qkv_TM = add_rms_norm(None, x_TM, weight_M, 1e-5)
        return decode(qkv_TM.view(entries + 2, -1, head_dim), scenario, num_heads, rotation)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_END = run()
    for seed in range(3):
        new = scenario_of(seed)
        for name in ("rows_E", "kv_len_E", "token_rows_T", "positions_T", "block_table_RC"):
            getattr(batch, name).copy_(getattr(new.batch, name))
        kv.k_BKSD.copy_(new.kv.k_BKSD)
        kv.v_BKSD.copy_(new.kv.v_BKSD)
        lines = cache_lines(kv, batch)
        for cache in (kv.k_BKSD, kv.v_BKSD):
            cache.view(-1, head_dim)[lines] = torch.nan
        exact_kv = in_float32(new.kv)
        qkv_TM = add_rms_norm(None, x_TM, weight_M, 1e-5).float()
        q_END = TorchOps().rope_append(qkv_TM, exact_rotation, exact_kv, new.batch)
        exact = TorchAttention().attend(q_END, exact_kv, new.batch, head_dim**-0.5)
        graph.replay()
        assert relative_error(out_END[:entries], exact[:entries]) < 2 * BOUND
        for ours, wanted in ((kv.k_BKSD[1:], exact_kv.k_BKSD[1:]), (kv.v_BKSD[1:], exact_kv.v_BKSD[1:])):
            assert torch.equal(ours.isnan(), wanted.isnan())
            assert relative_error(ours.nan_to_num(), wanted.nan_to_num()) < BOUND
