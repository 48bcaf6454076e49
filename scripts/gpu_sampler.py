"""On a GPU: the Triton sampler against the torch reference, then its time per step inside a graph.

    python scripts/gpu_sampler.py [--block 4096] [--tile-warps 8] [--choose-warps 16]

Exits with 1 if a token differs. The table comes last; times are microseconds per call.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
import triton

from gapless.sampling.base import SamplingTables
from gapless.sampling.rng import seed_words
from gapless.sampling.torch_sampler import TorchSampler
from gapless.sampling.triton_sampler import TritonSampler

VOCABS = (49152, 128256)
ENTRIES = (1, 32, 256)
# name: temperature, top_k, top_p, min_p
MODES = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "random": (1.0, 0, 1.0, 0.0),
    "min_p": (1.0, 0, 1.0, 0.05),
    "top_p": (1.0, 0, 0.9, 0.0),
    "top_k": (1.0, 50, 1.0, 0.0),
    "k+p": (0.7, 50, 0.9, 0.0),
}
CALLS_PER_GRAPH = 20


def logits_of(kind: str, entries: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """flat: a nucleus of most of the vocabulary. peaked: what a language model gives, a few likely tokens."""
    logits_EV = torch.randn(entries, vocab, device="cuda")
    if kind == "peaked":
        logits_EV = logits_EV * 2.0
        logits_EV[:, ::997] += 8.0
    return logits_EV.to(dtype)


def tables_of(rows: int, modes: list[str]) -> SamplingTables:
    tables = SamplingTables.allocate(rows + 1, torch.device("cuda"))
    for row in range(rows):
        temperature, top_k, top_p, min_p = MODES[modes[row % len(modes)]]
        tables.temperature_R[row] = temperature
        tables.top_k_R[row] = top_k
        tables.top_p_R[row] = top_p
        tables.min_p_R[row] = min_p
        tables.seed_R2[row] = torch.tensor(seed_words(row * 0x9E3779B97F4A7C15 % 2**64), dtype=torch.int32)
    return tables


def microseconds(sampler: TritonSampler, logits_EV: torch.Tensor, tables: SamplingTables) -> float:
    rows_E = torch.arange(logits_EV.shape[0], dtype=torch.int32, device="cuda")
    positions_E = rows_E + 100

    def calls() -> None:
        for _ in range(CALLS_PER_GRAPH):
            sampler.sample(logits_EV, rows_E, positions_E, tables, all_greedy=False)

    calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    times: list[float] = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS_PER_GRAPH)
    return sorted(times[2:])[len(times[2:]) // 2]


def differences(sampler: TritonSampler, logits_EV: torch.Tensor, tables: SamplingTables) -> int:
    rows_E = torch.arange(logits_EV.shape[0], dtype=torch.int32, device="cuda")
    wrong = 0
    for position in (0, 1000):
        arguments = (logits_EV, rows_E, rows_E + position, tables)
        tokens_E = sampler.sample(*arguments, all_greedy=False)
        wrong += int((tokens_E != TorchSampler().sample(*arguments, all_greedy=False)).sum())
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--block", type=int, default=TritonSampler().block)
    parser.add_argument("--tile-warps", type=int, default=TritonSampler().tile_warps)
    parser.add_argument("--choose-warps", type=int, default=TritonSampler().choose_warps)
    options = parser.parse_args()
    sampler = TritonSampler(options.block, options.tile_warps, options.choose_warps)
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, vars(options))

    wrong = 0
    for vocab in VOCABS:
        for entries in ENTRIES:
            for dtype in (torch.bfloat16, torch.float32, torch.float16):
                for kind in ("flat", "peaked"):
                    tables = tables_of(entries, list(MODES))
                    if entries == 1:
                        tables = tables_of(1, ["k+p"])
                    found = differences(sampler, logits_of(kind, entries, vocab, dtype), tables)
                    wrong += found
                    if found:
                        print(f"DIFFERS: {found} tokens, V={vocab} E={entries} {dtype} {kind}")
    cpu_logits_EV = logits_of("peaked", 12, 49152, torch.bfloat16)
    cpu_tables = tables_of(12, list(MODES))
    rows_E = torch.arange(12, dtype=torch.int32, device="cuda")
    on_gpu_E = sampler.sample(cpu_logits_EV, rows_E, rows_E, cpu_tables, all_greedy=False)
    names = ("temperature_R", "top_k_R", "top_p_R", "min_p_R", "seed_R2")
    on_cpu_E = TorchSampler().sample(
        cpu_logits_EV.cpu(),
        rows_E.cpu(),
        rows_E.cpu(),
        SamplingTables(**{name: getattr(cpu_tables, name).cpu() for name in names}),
        all_greedy=False,
    )
    cpu_wrong = int((on_gpu_E.cpu() != on_cpu_E).sum())

    lines = [f"{'V':>7} {'E':>4} {'logits':>7} " + " ".join(f"{mode:>8}" for mode in [*MODES, "mixed"])]
    for vocab in VOCABS:
        for entries in ENTRIES:
            for kind in ("flat", "peaked"):
                logits_EV = logits_of(kind, entries, vocab, torch.bfloat16)
                cells = [
                    microseconds(sampler, logits_EV, tables_of(entries, modes))
                    for modes in [*([mode] for mode in MODES), list(MODES)]
                ]
                lines.append(f"{vocab:>7} {entries:>4} {kind:>7} " + " ".join(f"{cell:8.1f}" for cell in cells))
    print(f"tokens that differ from the torch reference: {wrong} on the GPU, {cpu_wrong} on the CPU")
    print("\n".join(lines))
    return 1 if wrong or cpu_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
