"""Check every kernel against float32 on this GPU, then time them.

    PYTHONPATH=src python scripts/gpu_kernels.py [--sweep]

Times are of kernels inside a captured graph. --sweep also times the attention kernels with other tiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
from torch import Tensor

from gapless.attention import make_attention
from gapless.attention.base import LayerKV
from gapless.attention.scenario import Scenario, make_scenario
from gapless.attention.torch_reference import TorchAttention
from gapless.kernels.paged_decode import decode_tiles, paged_decode
from gapless.kernels.paged_prefill import paged_prefill, prefill_tiles
from gapless.models.layers import TorchOps, make_ops

CUDA = torch.device("cuda")
BFLOAT16 = torch.bfloat16
HEADS, HEAD_DIM = (32, 8), 128
SCALE = HEAD_DIM**-0.5
BOUND = 5e-3  # of the norm of the error


def microseconds(work: Callable[[], object], repeats: int = 10) -> float:
    """Median device time of one call, `repeats` calls to a captured graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            work()
    times = list[float]()
    for _ in range(8):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / repeats)
    return statistics.median(times[2:])


def read_bandwidth() -> float:
    """GB/s of the best of two plain reductions over 4 GiB."""
    words = torch.ones(2**30, dtype=torch.float32, device=CUDA)
    times = [microseconds(lambda: words.sum(), 3), microseconds(lambda: words.amax(), 3)]
    return words.nbytes / min(times) / 1000


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.float() - exact).norm() / exact.norm())


def check_attention(name: str, scenario: Scenario, scale: float) -> bool:
    out = make_attention("triton", CUDA).attend(scenario.q_TND, scenario.kv, scenario.batch, scale)
    kv = LayerKV(scenario.kv.k_BKSD.float(), scenario.kv.v_BKSD.float())
    exact = TorchAttention().attend(scenario.q_TND.float(), kv, scenario.batch, scale)
    return report(name, error(out, exact))


def report(name: str, value: float) -> bool:
    print(f"{'ok  ' if value < BOUND else 'FAIL'} {name}: relative error {value:.1e}")
    return value < BOUND


def check_all() -> bool:
    passed = list[bool]()
    lengths = [1, 16, 100, 1500, 4097, 40, 77, 1333]
    for heads, head_dim in (((32, 8), 128), ((9, 3), 64), ((14, 2), 64), ((4, 4), 256), ((8, 1), 80), ((6, 2), 96)):
        for block_size in (16, 64):
            scenario = make_scenario(
                [1] * 5 + [2, 77, 300],
                lengths,
                heads=heads,
                head_dim=head_dim,
                block_size=block_size,
                dtype=BFLOAT16,
                device=CUDA,
            )
            name = f"attention {heads} x {head_dim}, blocks of {block_size}"
            passed.append(check_attention(name, scenario, head_dim**-0.5))
    return all([*passed, *check_pieces()])


def check_pieces() -> Iterator[bool]:
    ops, exact_ops = make_ops(CUDA), TorchOps()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=CUDA, dtype=BFLOAT16)

    x_TH, residual_TH, weight_H = normal(33, 4096), normal(33, 4096), normal(4096)
    exact = exact_ops.add_rms_norm(x_TH.float(), residual_TH.float(), weight_H.float(), 1e-5)
    yield report("add + rms norm", error(ops.add_rms_norm(x_TH, residual_TH.clone(), weight_H, 1e-5), exact))
    gate_up = normal(33, 28672)
    yield report("silu mul", error(ops.silu_mul(gate_up), exact_ops.silu_mul(gate_up.float())))
    for heads, head_dim, norm in ((HEADS, HEAD_DIM, True), ((9, 3), 64, False), ((4, 4), 80, True)):
        scenario = make_scenario([1, 32], [90, 70], heads=heads, head_dim=head_dim, dtype=BFLOAT16, device=CUDA)
        kv, exact_kv = scenario.kv, LayerKV(scenario.kv.k_BKSD.float(), scenario.kv.v_BKSD.float())
        qkv_TM, norms_2D = normal(33, (heads[0] + 2 * heads[1]) * head_dim), normal(2, head_dim) if norm else None
        rope_PD = torch.randn(100, head_dim, device=CUDA)
        q = ops.rope_append(qkv_TM, norms_2D, 1e-5, rope_PD, kv, scenario.batch)
        norms = None if norms_2D is None else norms_2D.float()
        exact_q = exact_ops.rope_append(qkv_TM.float(), norms, 1e-5, rope_PD, exact_kv, scenario.batch)
        yield report(f"rope + append {heads} x {head_dim}: q", error(q, exact_q))
        yield report("                k cache", error(kv.k_BKSD.nan_to_num(), exact_kv.k_BKSD.nan_to_num()))
        yield report("                v cache", error(kv.v_BKSD.nan_to_num(), exact_kv.v_BKSD.nan_to_num()))


def decode_scenario(batch_size: int, context: int, max_kv: int) -> Scenario:
    return make_scenario(
        [1] * batch_size,
        [context] * batch_size,
        heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=BFLOAT16,
        device=CUDA,
        max_kv=max_kv,
    )


def kv_bytes(batch_size: int, context: int) -> int:
    return batch_size * context * 2 * HEADS[1] * HEAD_DIM * 2


def time_decodes(bandwidth: float) -> list[str]:
    lines, attention = list[str](), make_attention("triton", CUDA)
    for batch_size, context in ((1, 8192), (8, 4096), (32, 1024), (32, 4096), (32, 8192), (256, 1024)):
        scenario = decode_scenario(batch_size, context, min(8192, 4 * context))
        us = microseconds(partial(attention.attend, scenario.q_TND, scenario.kv, scenario.batch, SCALE))
        rate = kv_bytes(batch_size, context) / us / 1000
        lines.append(
            f"decode {batch_size:3} x {context:5}  {us:9.1f} us  {rate:6.0f} GB/s  {rate / bandwidth:4.0%} of read"
        )
    return lines


def time_prefills() -> list[str]:
    lines, attention = list[str](), make_attention("triton", CUDA)
    for queries, length, entries in ((8192, 8192, 1), (2048, 8192, 1), (512, 512, 16), (1024, 1024, 8)):
        scenario = make_scenario(
            [queries] * entries, [length] * entries, heads=HEADS, head_dim=HEAD_DIM, dtype=BFLOAT16, device=CUDA
        )
        us = microseconds(partial(attention.attend, scenario.q_TND, scenario.kv, scenario.batch, SCALE), 2)
        pairs = entries * queries * (length - queries / 2)
        rate = 4 * pairs * HEADS[0] * HEAD_DIM / us / 1e6
        lines.append(f"prefill {entries:2} x {queries:4} of {length:4}  {us:9.1f} us  {rate:5.0f} TFLOP/s")
    return lines


def time_pieces() -> list[str]:
    lines, ops = list[str](), make_ops(CUDA)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=CUDA, dtype=BFLOAT16)

    weight_H, rope_PD = normal(4096), torch.randn(8192, HEAD_DIM, device=CUDA)
    for tokens in (32, 256, 8192):
        x_TH, residual_TH, gate_up, qkv = (normal(tokens, width) for width in (4096, 4096, 28672, 48 * HEAD_DIM))
        few = min(tokens, 256)
        scenario = make_scenario(
            [1] * tokens if tokens == few else [tokens],
            [1000] * tokens if tokens == few else [tokens],
            heads=HEADS,
            head_dim=HEAD_DIM,
            dtype=BFLOAT16,
            device=CUDA,
        )
        norm = microseconds(partial(ops.add_rms_norm, x_TH, residual_TH, weight_H, 1e-5))
        rope = microseconds(partial(ops.rope_append, qkv, None, 1e-5, rope_PD, scenario.kv, scenario.batch))
        silu = microseconds(partial(ops.silu_mul, gate_up))
        lines.append(
            f"{tokens:5} tokens  add+rmsnorm {norm:7.1f} us  rope+append {rope:7.1f} us  silu-mul {silu:7.1f} us"
        )
    return lines


def sweep_decode() -> None:
    """The best tiles at a few sizes; printed as they come."""
    processors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    default = decode_tiles(HEAD_DIM, 2, amd=False)
    for batch_size, context in ((1, 8192), (32, 1024), (32, 8192)):
        scenario = decode_scenario(batch_size, context, 8192)
        out = torch.empty_like(scenario.q_TND)
        results = list[tuple[float, str]]()
        for block_n, warps, stages, programs in itertools.product((32, 64, 128), (2, 4), (3, 5, 7), (2, 4, 8)):
            tiles = dataclasses.replace(
                default, block_n=block_n, num_warps=warps, num_stages=stages, programs_per_processor=programs
            )
            try:
                us = microseconds(
                    partial(
                        paged_decode,
                        scenario.q_TND,
                        out,
                        scenario.kv,
                        scenario.batch,
                        SCALE,
                        processors,
                        tiles,
                    )
                )
            except triton.runtime.errors.OutOfResources:
                continue
            results.append((us, f"block_n {block_n} warps {warps} stages {stages} programs {programs}"))
        print(f"decode {batch_size} x {context}, best first:")
        for us, text in sorted(results)[:6]:
            print(f"  {us:8.1f} us  {kv_bytes(batch_size, context) / us / 1000:6.0f} GB/s  {text}")


def sweep_prefill() -> None:
    scenario = make_scenario([8192], [8192], heads=HEADS, head_dim=HEAD_DIM, dtype=BFLOAT16, device=CUDA)
    out = torch.empty_like(scenario.q_TND)
    default = prefill_tiles(HEAD_DIM, 2, HEADS[0] // HEADS[1], 8192, amd=False)
    results = list[tuple[float, str]]()
    for block_m, block_n, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 5)):
        tiles = dataclasses.replace(default, block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages)
        try:
            us = microseconds(partial(paged_prefill, scenario.q_TND, out, scenario.kv, scenario.batch, SCALE, tiles), 1)
        except triton.runtime.errors.OutOfResources:
            continue
        results.append((us, f"block_m {block_m} block_n {block_n} warps {warps} stages {stages}"))
    print("prefill 8192, best first:")
    for us, text in sorted(results)[:6]:
        print(f"  {us:8.1f} us  {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="also time the attention kernels with other tiles")
    options = parser.parse_args()
    passed = check_all()
    if options.sweep:
        sweep_decode()
        sweep_prefill()
    bandwidth = read_bandwidth()
    lines = [*time_decodes(bandwidth), *time_prefills(), *time_pieces()]
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(
        f"plain read {bandwidth:.0f} GB/s; attention of {HEADS[0]} heads, {HEADS[1]} of keys, of size {HEAD_DIM}, bf16"
    )
    print("\n".join(lines))
    if not passed:
        raise SystemExit("a kernel is off; see FAIL above")


if __name__ == "__main__":
    main()
