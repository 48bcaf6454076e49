# pyright: reportCallIssue=false, reportArgumentType=false
"""Check every kernel against float32 on this GPU, then time them.

    PYTHONPATH=src python scripts/gpu_kernels.py [--sweep] [--decode] [--before FILE] [--flashinfer]

Times are of kernels inside a captured graph. --sweep also times the attention kernels with other tiles; --decode leaves
out what is not decode attention; --before times another paged_decode.py beside ours, for example one that
`git show REVISION:src/gapless/kernels/paged_decode.py` printed.

--flashinfer times FlashInfer's attention beside ours on the same caches, see gpu_flashinfer.py. It plans on the host,
which a step whose lengths have changed needs again: that is outside of its times, and printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor
from torch.nn import functional

from gapless.attention import make_attention
from gapless.attention.base import AttentionBatch, HeadRotation, LayerKV
from gapless.attention.scenario import Scenario, batch_of, make_scenario
from gapless.attention.torch_reference import TorchAttention
from gapless.bench.ceilings import read_rate
from gapless.device import open_device
from gapless.kernels.paged_decode import DecodeTiles, decode_tiles, paged_decode
from gapless.kernels.paged_prefill import paged_prefill, prefill_tiles
from gapless.kernels.rms_norm import add_rms_norm
from gapless.kernels.silu_mul import silu_mul
from gapless.models.layers import TorchOps, make_ops

if TYPE_CHECKING:
    from gpu_flashinfer import Attend

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
    """GB/s of kernels that only read."""
    with closing(open_device("cuda")) as device:
        return read_rate(device) / 1e9


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


def check_decodes() -> bool:
    """Decodes alone: ragged, some past what one program does, in a graph's limit far above them."""
    lengths, passed = [1, 16, 100, 1500, 8192, 40, 77, 1333] * 4, list[bool]()
    for heads, head_dim in ((HEADS, HEAD_DIM), SMALL, QWEN, ONE, WIDE, ((8, 1), 80)):
        scenario = make_scenario(
            [1] * len(lengths), lengths, heads=heads, head_dim=head_dim, dtype=BFLOAT16, device=CUDA, max_kv=16384
        )
        passed.append(check_attention(f"decode {heads} x {head_dim}", scenario, head_dim**-0.5))
    return all(passed)


def check_pieces() -> Iterator[bool]:
    ops, exact_ops = make_ops(CUDA), TorchOps()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=CUDA, dtype=BFLOAT16)

    x_TH, residual_TH, weight_H = normal(33, 4096), normal(33, 4096), normal(4096)
    exact = exact_ops.rms_norm(x_TH.float() + residual_TH.float(), weight_H.float(), 1e-5).x_TH
    yield report("add + rms norm", error(add_rms_norm(x_TH, residual_TH.clone(), weight_H, 1e-5), exact))
    gate_up = normal(33, 28672)
    gate, up = gate_up.float().chunk(2, dim=1)
    yield report("silu mul", error(silu_mul(gate_up), functional.silu(gate) * up))
    for heads, head_dim, norm in ((HEADS, HEAD_DIM, True), ((9, 3), 64, False), ((4, 4), 80, True)):
        scenario = make_scenario([1, 32], [90, 70], heads=heads, head_dim=head_dim, dtype=BFLOAT16, device=CUDA)
        kv, exact_kv = scenario.kv, LayerKV(scenario.kv.k_BKSD.float(), scenario.kv.v_BKSD.float())
        qkv_TM, norms_2D = normal(33, (heads[0] + 2 * heads[1]) * head_dim), normal(2, head_dim) if norm else None
        rope_PD = torch.randn(100, head_dim, device=CUDA)
        q = ops.rope_append(qkv_TM, HeadRotation(norms_2D, 1e-5, rope_PD), kv, scenario.batch)
        norms = None if norms_2D is None else norms_2D.float()
        exact_q = exact_ops.rope_append(qkv_TM.float(), HeadRotation(norms, 1e-5, rope_PD), exact_kv, scenario.batch)
        yield report(f"rope + append {heads} x {head_dim}: q", error(q, exact_q))
        yield report("                k cache", error(kv.k_BKSD.nan_to_num(), exact_kv.k_BKSD.nan_to_num()))
        yield report("                v cache", error(kv.v_BKSD.nan_to_num(), exact_kv.v_BKSD.nan_to_num()))


@dataclass(frozen=True)
class DecodeWork:
    """Decode steps over several layers' caches, more of them than the L2 cache holds."""

    q_END: Tensor
    layers: list[LayerKV]
    batch: AttentionBatch
    nbytes: int  # of keys and values that a layer reads

    def microseconds(self, decode: Callable[[Tensor, LayerKV, AttentionBatch], object]) -> float:
        """Of one layer, with its share of what a step does once."""

        def all_layers() -> None:
            batch = dataclasses.replace(self.batch)  # a step of its own: nothing kept of another is used
            for kv in self.layers:
                decode(self.q_END, kv, batch)

        return microseconds(all_layers, 1) / len(self.layers)


def decode_work(lengths: list[int], heads: tuple[int, int], head_dim: int, max_kv: int) -> DecodeWork:
    """Shuffled blocks of 16 tokens; at most 32 layers and 24 GiB."""
    columns = [-(-length // 16) for length in lengths]
    table_RC = torch.zeros(len(lengths) + 1, max_kv // 16, dtype=torch.int32)
    for row, blocks in enumerate((torch.randperm(sum(columns)) + 1).split(columns)):
        table_RC[row, : len(blocks)] = blocks
    batch = batch_of(range(len(lengths)), [1] * len(lengths), lengths, table_RC.to(CUDA), max_kv=max_kv)
    shape = (2, sum(columns) + 1, heads[1], 16, head_dim)
    num_layers = max(1, min(32, 24 * 2**30 // (2 * math.prod(shape))))
    layers = [LayerKV(*torch.randn(shape, dtype=BFLOAT16, device=CUDA).unbind(0)) for _ in range(num_layers)]
    q_END = torch.randn(len(lengths), heads[0], head_dim, dtype=BFLOAT16, device=CUDA)
    return DecodeWork(q_END, layers, batch, sum(lengths) * 4 * heads[1] * head_dim)


SMALL, QWEN, ONE, WIDE = ((9, 3), 64), ((14, 2), 64), ((4, 1), 128), ((4, 4), 256)
RAGGED = [256] * 15 + [8192] + [256] * 16
DECODES: dict[str, tuple[list[int], tuple[tuple[int, int], int], int]] = {
    "1 x 8192": ([8192], (HEADS, HEAD_DIM), 8192),
    "8 x 4096": ([4096] * 8, (HEADS, HEAD_DIM), 8192),
    "32 x 300": ([300] * 32, (HEADS, HEAD_DIM), 8192),
    "32 x 1024": ([1024] * 32, (HEADS, HEAD_DIM), 8192),
    "32 x 1024, graph for 131072": ([1024] * 32, (HEADS, HEAD_DIM), 131072),
    "32 x 900 to 1303": ([900 + 13 * row for row in range(32)], (HEADS, HEAD_DIM), 8192),
    "32 x 4096": ([4096] * 32, (HEADS, HEAD_DIM), 8192),
    "32 x 8192": ([8192] * 32, (HEADS, HEAD_DIM), 8192),
    "1 x 8192 + 31 x 256": (RAGGED, (HEADS, HEAD_DIM), 8192),
    "256 x 256": ([256] * 256, (HEADS, HEAD_DIM), 8192),
    "256 x 1024": ([1024] * 256, (HEADS, HEAD_DIM), 8192),
    "32 x 1024, 9/3 of 64": ([1024] * 32, SMALL, 8192),
    "256 x 512, 9/3 of 64": ([512] * 256, SMALL, 8192),
    "64 x 1024, 14/2 of 64": ([1024] * 64, QWEN, 8192),
    "32 x 1024, 4/1 of 128": ([1024] * 32, ONE, 8192),
    "32 x 1024, 4/4 of 256": ([1024] * 32, WIDE, 8192),
}  # rows x context, (heads, head size), max_kv of the graph


def processors() -> int:
    return torch.cuda.get_device_properties(CUDA).multi_processor_count


def load_before(path: str) -> Callable[..., None]:
    """paged_decode of another revision's file."""
    spec = importlib.util.spec_from_file_location("paged_decode_before", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.paged_decode


def time_decodes(bandwidth: float, before: Callable[..., None] | None, flashinfer: bool) -> Iterator[str]:
    for name, (lengths, (heads, head_dim), max_kv) in DECODES.items():
        work = decode_work(lengths, heads, head_dim, max_kv)
        attention, scale = make_attention("triton", CUDA), head_dim**-0.5

        def old(q_END: Tensor, kv: LayerKV, batch: AttentionBatch, scale: float = scale) -> None:
            assert before is not None
            before(q_END, torch.empty_like(q_END), kv, batch, scale, processors())

        ours = partial(attention.attend, scale=scale)
        line = f"decode {name:28}"

        def rate(us: float, nbytes: int = work.nbytes) -> str:
            return f"{nbytes / us / 1000:6.0f} GB/s  {nbytes / us / 1000 / bandwidth:4.0%} of read"

        for decode in (ours,) if before is None else (old, ours):
            us = work.microseconds(decode)
            line += f"  {us:8.1f} us  {rate(us)}"
        yield line
        if flashinfer:
            from gpu_flashinfer import beside, decode_ways

            def time(attend: Attend, work: DecodeWork = work) -> float:
                return work.microseconds(lambda q_END, kv, _: attend(q_END, kv))

            ways = decode_ways(work.q_END, work.layers[0], work.batch, scale)
            yield from beside(ways, time, rate, ours(work.q_END, work.layers[0], work.batch).float())


PREFILLS: dict[str, tuple[int, int, int, tuple[tuple[int, int], int]]] = {
    "1 x 8192": (1, 8192, 8192, (HEADS, HEAD_DIM)),
    "1 x 2048 of 8192": (1, 2048, 8192, (HEADS, HEAD_DIM)),
    "8 x 1024": (8, 1024, 1024, (HEADS, HEAD_DIM)),
    "16 x 512": (16, 512, 512, (HEADS, HEAD_DIM)),
    "1 x 8192, 9/3 of 64": (1, 8192, 8192, SMALL),
    "16 x 512, 9/3 of 64": (16, 512, 512, SMALL),
}  # entries, queries of each, tokens of each, (heads, head size)


def time_prefills(flashinfer: bool) -> Iterator[str]:
    attention = make_attention("triton", CUDA)
    for name, (entries, queries, length, (heads, head_dim)) in PREFILLS.items():
        scenario = make_scenario(
            [queries] * entries, [length] * entries, heads=heads, head_dim=head_dim, dtype=BFLOAT16, device=CUDA
        )
        operations, scale = 4 * entries * queries * (length - queries / 2) * heads[0] * head_dim, head_dim**-0.5
        q_TND, kv, batch = scenario.q_TND, scenario.kv, scenario.batch
        us = microseconds(partial(attention.attend, q_TND, kv, batch, scale), 2)

        def rate(us: float, operations: float = operations) -> str:
            return f"{operations / us / 1e6:6.0f} TFLOP/s"

        yield f"prefill {name:27}  {us:8.1f} us  {rate(us)}"
        if flashinfer:
            from gpu_flashinfer import beside, prefill_ways

            def time(attend: Attend, q_TND: Tensor = q_TND, kv: LayerKV = kv) -> float:
                return microseconds(partial(attend, q_TND, kv), 2)

            exact = attention.attend(q_TND, kv, batch, scale).float()
            yield from beside(prefill_ways(q_TND, kv, batch, scale), time, rate, exact)


def time_pieces() -> Iterator[str]:
    ops = make_ops(CUDA)

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
        norm = microseconds(partial(add_rms_norm, x_TH, residual_TH, weight_H, 1e-5))
        rope = microseconds(
            partial(ops.rope_append, qkv, HeadRotation(None, 1e-5, rope_PD), scenario.kv, scenario.batch)
        )
        silu = microseconds(partial(silu_mul, gate_up))
        yield f"{tokens:5} tokens  add+rmsnorm {norm:7.1f} us  rope+append {rope:7.1f} us  silu-mul {silu:7.1f} us"


def sweep_decode() -> None:
    """The best tiles at a few sizes; printed as they come."""
    default = decode_tiles(HEAD_DIM, 2, HEADS[0] // HEADS[1], amd=False)
    arrived_P = torch.zeros(65536, dtype=torch.int32, device=CUDA)
    for name in ("1 x 8192", "32 x 1024", "32 x 8192", "1 x 8192 + 31 x 256"):
        lengths, (heads, head_dim), max_kv = DECODES[name]
        work = decode_work(lengths, heads, head_dim, max_kv)
        results = list[tuple[float, str]]()
        for (block_n, warps), stages, programs in itertools.product(
            ((16, 1), (32, 1), (32, 2), (64, 4)), (2, 3, 4), (2, 4, 6, 11)
        ):
            tiles = dataclasses.replace(
                default, block_n=block_n, num_warps=warps, num_stages=stages, programs_per_processor=programs
            )

            def decode(q_END: Tensor, kv: LayerKV, batch: AttentionBatch, tiles: DecodeTiles = tiles) -> None:
                paged_decode(q_END, torch.empty_like(q_END), kv, batch, SCALE, processors(), tiles, arrived_P)

            try:
                us = work.microseconds(decode)
            except triton.runtime.errors.OutOfResources:
                continue
            results.append((us, f"block_n {block_n} warps {warps} stages {stages} programs {programs}"))
        print(f"decode {name}, best first:")
        for us, text in sorted(results)[:6]:
            print(f"  {us:8.1f} us  {work.nbytes / us / 1000:6.0f} GB/s  {text}")


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
    print("prefill 8192 by the kernel in Triton, best first:")
    for us, text in sorted(results)[:6]:
        print(f"  {us:8.1f} us  {text}")


def compile_flashinfer() -> float:
    """Seconds, for all head sizes of DECODES."""
    if importlib.util.find_spec("flashinfer") is None:
        raise SystemExit("--flashinfer needs pip install flashinfer-python==0.6.18.post1")
    import gpu_flashinfer

    return gpu_flashinfer.compile_modules(sorted({head_dim for _, (_, head_dim), _ in DECODES.values()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="also time the attention kernels with other tiles")
    parser.add_argument("--decode", action="store_true", help="leave out what is not decode attention")
    parser.add_argument("--before", metavar="FILE", help="another paged_decode.py to time beside ours")
    parser.add_argument("--flashinfer", action="store_true", help="time FlashInfer's attention beside ours")
    options = parser.parse_args()
    seconds = compile_flashinfer() if options.flashinfer else 0.0
    passed = check_decodes() if options.decode else check_all()
    if options.sweep:
        sweep_decode()
        if not options.decode:
            sweep_prefill()
    bandwidth = read_bandwidth()
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    if options.before:
        print(f"decodes: first {options.before}, then ours")
    if options.flashinfer:
        print(f"FlashInfer {importlib.metadata.version('flashinfer-python')}, {seconds:.0f} s of compiling")
    print(
        f"plain read {bandwidth:.0f} GB/s; attention of {HEADS[0]} heads, {HEADS[1]} of keys, of size {HEAD_DIM}, bf16"
    )
    before = load_before(options.before) if options.before else None
    for line in time_decodes(bandwidth, before, options.flashinfer):
        print(line, flush=True)
    for line in () if options.decode else itertools.chain(time_prefills(options.flashinfer), time_pieces()):
        print(line, flush=True)
    if not passed:
        raise SystemExit("a kernel is off; see FAIL above")


if __name__ == "__main__":
    main()
