"""The Gluon prefill kernel: what it compiles to for Hopper without a GPU, and close to float32 on one."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from gapless.attention import make_attention  # noqa: E402
from gapless.attention.base import LayerKV  # noqa: E402
from gapless.attention.scenario import Scenario, make_scenario, pad_mixed  # noqa: E402
from gapless.attention.torch_reference import TorchAttention  # noqa: E402
from gapless.attention.triton_paged import choose_prefill, gluon_kernels  # noqa: E402
from gapless.bench.prefill import ATTENTION_KERNELS  # noqa: E402
from gapless.kernels.gluon_prefill import KEYS, SHORT, gluon_prefill, prefill_kernel, runs  # noqa: E402
from gapless.kernels.paged_prefill import paged_prefill  # noqa: E402
from gapless.models.layers import TorchOps, make_ops  # noqa: E402
from support.effort import and_thoroughly  # noqa: E402

SHARED_BYTES = 227 * 1024
CUDA = torch.device("cuda")
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
BOUND = 5e-3  # of the norm; rounding the answer alone to bfloat16 costs 1.7e-3
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


def compiled(head_dim: int, group: int, block_size: int, block_n: int, dtype: str) -> Any:
    constants = {"KV_HEADS": 8, "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_N": block_n, "STAGES": KEYS // block_n}
    boxes = f"tensordesc<{dtype}[{block_size}, 64],{gl.NVMMASharedLayout(128, 16, 2)!r}>"
    types = {
        **dict.fromkeys(constants, "constexpr"),
        **dict.fromkeys(("k_cache", "v_cache"), boxes),
        **dict.fromkeys(("q_TND", "out_TND"), f"*{dtype}"),
        **dict.fromkeys(("table_stride", "q_stride", "num_decodes", "num_entries"), "i32"),
        "scale_log2": "fp32",
    }
    names: list[str] = prefill_kernel.arg_names
    signature = {name: types.get(name, "*i32") for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name == "q_stride"
    }
    source = GluonASTSource(fn=prefill_kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def loop_over_keys(cubin: Path, products: int) -> list[str]:
    """The instructions of the shortest loop with so many products and a softmax: the one without masks."""
    command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels, code, bodies = dict[str, int](), list[str](), list[list[str]]()
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*\w+\*/\s+(.*);", line):
            code.append(instruction[1])
    for end, instruction in enumerate(code):
        target = re.search(r"\bBRA\b.*(\.L_x_\d+)", instruction)
        if target and labels[target[1]] <= end:
            bodies.append(code[labels[target[1]] : end + 1])
    return min((body for body in bodies if count("HGMMA", body) == products and count("EX2", body)), key=len)


def count(word: str, code: list[str]) -> int:
    return sum(word in instruction for instruction in code)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "group", "block_size", "dtype", "block_n"),
    and_thoroughly(
        [(128, 4, 16, "bf16", 128), (64, 7, 64, "fp16", 64)],
        [(128, 4, 16, "bf16", 64), (128, 1, 32, "fp16", 64), (128, 8, 64, "bf16", 128), (64, 3, 16, "bf16", 128)],
    ),
)
def test_it_compiles_to_products_that_run_while_the_softmax_is_taken(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    head_dim: int,
    group: int,
    block_size: int,
    dtype: str,
    block_n: int,
):
    monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    kernel = compiled(head_dim, group, block_size, block_n, dtype)
    assert kernel.metadata.shared <= SHARED_BYTES
    log = capsys.readouterr().out
    assert "spill" in log
    assert "C75" not in log, "ptxas makes products wait for each other"

    (tmp_path / "cubin").write_bytes(kernel.asm["cubin"])
    hot = loop_over_keys(tmp_path / "cubin", (head_dim + block_n) // 16)
    last = max(at for at, instruction in enumerate(hot) if "HGMMA" in instruction)
    scores, sums = (at for at, instruction in enumerate(hot) if "DEPBAR" in instruction)
    assert last < scores
    assert count("EX2", hot[scores:sums]) == count("EX2", hot)
    assert count("STL", hot) + count("LDL", hot) == 0


def test_the_installed_triton_has_what_it_needs():
    gluon = gluon_kernels()
    assert gluon is not None
    assert (gluon.prefill, gluon.prefills) == (gluon_prefill, runs)


def test_a_triton_without_gluon_keeps_the_triton_kernel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gapless.kernels.gluon_prefill", None)
    assert gluon_kernels.__wrapped__() is None


def test_a_device_without_its_products_keeps_the_triton_kernel():
    scenario = make_scenario([20], [20], heads=(8, 2), head_dim=128, dtype=BFLOAT16)
    assert choose_prefill(scenario.q_TND, scenario.kv) is paged_prefill


def test_the_prefill_bench_counts_it_as_attention():
    assert prefill_kernel.__name__ in ATTENTION_KERNELS


def exact_attention(scenario: Scenario, scale: float) -> Tensor:
    kv = LayerKV(scenario.kv.k_BKSD.float(), scenario.kv.v_BKSD.float())
    return TorchAttention().attend(scenario.q_TND.float(), kv, scenario.batch, scale)


def relative_error(out: Tensor, exact: Tensor) -> float:
    return float((out.float() - exact).norm() / exact.norm())


def attend(scenario: Scenario, scale: float) -> Tensor:
    """Sevens where nothing was written."""
    assert runs(scenario.q_TND, scenario.kv)
    out_TND = torch.full_like(scenario.q_TND, 7.0)
    gluon_prefill(scenario.q_TND, out_TND, scenario.kv, scenario.batch, scale)
    return out_TND


def ragged(seed: int, longest: int) -> tuple[list[int], list[int]]:
    """Queries and lengths of two decodes and a dozen chunks, one of them a whole prompt."""
    choose = random.Random(seed)
    lengths = [choose.randint(2, longest) for _ in range(13)]
    queries = [choose.randint(2, min(length, 400)) for length in lengths[:-1]]
    return [1, 1, *queries, lengths[-1]], [1, longest, *lengths]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("longest", [SHORT, 3000])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"),
    [
        ((4, 4), 128, 32),
        ((9, 3), 64, 16),
        ((9, 3), 128, 64),
        ((32, 8), 128, 16),
        ((14, 2), 64, 64),
        ((7, 1), 128, 16),
        ((8, 1), 128, 64),
        ((16, 2), 64, 32),
    ],
)
def test_ragged_chunks_stay_close_to_float32_and_have_the_same_bits_again(
    heads: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype, longest: int
):
    scale = head_dim**-0.5
    for seed in range(3):
        queries, lengths = ragged(seed, longest)
        scenario = make_scenario(
            queries, lengths, heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype, device=CUDA, seed=seed
        )
        out_TND, exact = attend(scenario, scale), exact_attention(scenario, scale)
        for begin, end in zip(scenario.batch.query_start_E1[2:-1], scenario.batch.query_start_E1[3:], strict=True):
            assert relative_error(out_TND[begin:end], exact[begin:end]) < BOUND
        assert bool((out_TND[:2] == 7.0).all())
        assert all(torch.equal(attend(scenario, scale), out_TND) for _ in range(5))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(("heads", "head_dim"), [((32, 8), 128), ((9, 3), 64)])
@pytest.mark.parametrize("padding", [(0, 1, 1), (14, 4, 0), (3, 130, 700)])
def test_padding_changes_no_bit_of_a_chunk(heads: tuple[int, int], head_dim: int, padding: tuple[int, int, int]):
    decodes, entries, tokens = padding
    queries, lengths = ragged(5, 2000)
    scenario = make_scenario(queries, lengths, heads=heads, head_dim=head_dim, dtype=BFLOAT16, device=CUDA)
    larger, at_T = pad_mixed(scenario, decodes=decodes, entries=entries, tokens=tokens)
    padded = torch.full_like(larger.q_TND, torch.nan)
    padded[at_T] = scenario.q_TND
    scale = head_dim**-0.5
    out_TND = attend(replace(larger, q_TND=padded), scale)
    assert torch.equal(out_TND[at_T], attend(scenario, scale))
    assert bool((out_TND[len(at_T) + decodes :] == 7.0).all())


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("max_kv", [SHORT, 3000])
def test_a_captured_step_follows_lengths_that_change_between_replays(max_kv: int):
    """Between kernels that start before the one before them has ended."""
    sizes = {"heads": (32, 8), "head_dim": 128, "dtype": BFLOAT16, "device": CUDA, "max_kv": max_kv}
    make = partial(make_scenario, **sizes)
    mixes = [  # 2 decodes and 600 tokens in chunks, the last of which may be none
        ([1, 1, 200, 150, 250], [700, 3, 200, 900, 251]),
        ([1, 1, 2, 598, 0], [1, 1000, 1000, 598, 1]),
        ([1, 1, 600, 0, 0], [64, 65, 1024, 1, 1]),
        ([1, 1, 64, 64, 472], [100, 17, 64, 128, 900]),
    ]
    scenario = make(*mixes[0])
    attention, ops, batch = make_attention("triton", CUDA), make_ops(CUDA), scenario.batch
    assert choose_prefill(scenario.q_TND, scenario.kv) is gluon_prefill
    weight_H = torch.ones(32 * 128, dtype=BFLOAT16, device=CUDA)

    def run() -> tuple[Tensor, Tensor]:
        out_TND = attention.attend(scenario.q_TND, scenario.kv, batch, 0.1)
        return out_TND, ops.rms_norm(out_TND.flatten(1), weight_H, 0.0).x_TH

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TND, out_TH = run()
    for seed, mix in enumerate(mixes):
        new = make(*mix, seed=seed)
        scenario.q_TND.copy_(new.q_TND)
        scenario.kv.k_BKSD.copy_(new.kv.k_BKSD)
        scenario.kv.v_BKSD.copy_(new.kv.v_BKSD)
        for name in ("rows_E", "query_start_E1", "kv_len_E", "block_table_RC"):
            getattr(batch, name).copy_(getattr(new.batch, name))
        out_TND.fill_(torch.nan)
        graph.replay()
        exact = exact_attention(new, 0.1).flatten(1)
        assert relative_error(out_TND.flatten(1), exact) < BOUND
        assert relative_error(out_TH, TorchOps().rms_norm(exact, weight_H.float(), 0.0).x_TH) < BOUND
