"""On a GPU: the Triton sampler against the torch reference, then its time per step inside a graph.

    python scripts/gpu_sampler.py [--block 4096] [--programs 128] [--tile-warps 8] ...   (the fields of SamplerTiles)

Exits with 1 if a token differs. The table comes last; times are microseconds per call.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
import triton

from gapless.sampling.base import SamplingTables
from gapless.sampling.rng import seed_words
from gapless.sampling.torch_sampler import TorchSampler
from gapless.sampling.triton_sampler import SamplerTiles, TritonSampler

TIMED = ((32, 128256), (256, 128256), (1024, 49152), (1, 128256))
COMPARED = (
    (24, 128256, torch.bfloat16),
    (40, 49152, torch.bfloat16),
    (24, 50257, torch.float32),
    (200, 4001, torch.float16),
)
MIXES = 6
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


def seeds(rows: int) -> torch.Tensor:
    return torch.tensor([seed_words(row * 0x9E3779B97F4A7C15 % 2**64) for row in range(rows)], dtype=torch.int32)


def tables_of(rows: int, modes: list[str]) -> SamplingTables:
    tables = SamplingTables.allocate(rows, torch.device("cuda"))
    parameters = torch.tensor([MODES[modes[row % len(modes)]] for row in range(rows)])
    for column, table in enumerate((tables.temperature_R, tables.top_k_R, tables.top_p_R, tables.min_p_R)):
        table.copy_(parameters[:, column])
    tables.seed_R2.copy_(seeds(rows))
    return tables


def random_tables(rows: int, vocab: int) -> SamplingTables:
    tables = SamplingTables.allocate(rows, torch.device("cuda"))

    def fill(table: torch.Tensor, values: list[float]) -> None:
        table.copy_(torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), (rows,))])

    fill(tables.temperature_R, [0.0, 1e-35, 1e-3, 0.3, 0.7, 1.0, 1.0, 2.0, 100.0])
    fill(tables.top_k_R, [0, 0, 0, 1, 2, 50, 1000, vocab // 3, vocab - 1, vocab])
    fill(tables.top_p_R, [1.0, 1.0, 1e-12, 0.3, 0.9, 0.99, 1 - 2**-24])
    fill(tables.min_p_R, [0.0, 0.0, 0.05, 1.0])
    tables.seed_R2.copy_(seeds(rows))
    return tables


def hard_rows(logits_EV: torch.Tensor) -> torch.Tensor:
    """The same with rows of ties, of infinities, sorted, and too close together to be cut apart."""
    logits_EV[3] = logits_EV[3].round()
    logits_EV[4] = 1.5
    logits_EV[5, ::2] = -torch.inf
    logits_EV[6] = -torch.inf
    logits_EV[7] = logits_EV[7].sort(descending=True).values
    logits_EV[8, logits_EV.shape[1] // 5 :] = torch.finfo(logits_EV.dtype).min
    logits_EV[9] *= 1e-3
    logits_EV[9, :5] = -3.0
    return logits_EV


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


def differences(sampler: TritonSampler, logits_EV: torch.Tensor, tables: SamplingTables, position: int) -> list[int]:
    """Entries whose tokens differ from the reference's on the GPU."""
    rows_E = torch.arange(logits_EV.shape[0], dtype=torch.int32, device="cuda")
    arguments = (logits_EV, rows_E, rows_E + position, tables)
    tokens_E = sampler.sample(*arguments, all_greedy=False)
    return (tokens_E != TorchSampler().sample(*arguments, all_greedy=False)).nonzero().flatten().tolist()


def main() -> int:
    parser = argparse.ArgumentParser()
    for name, value in asdict(SamplerTiles()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    options = vars(parser.parse_args())
    sampler = TritonSampler(SamplerTiles(**options))
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, options)

    wrong = 0
    for entries, vocab, dtype in COMPARED:
        for mix in range(MIXES):
            kind = ("flat", "peaked")[mix % 2]
            logits_EV = hard_rows(logits_of(kind, entries, vocab, dtype))
            tables = random_tables(entries, vocab)
            for entry in differences(sampler, logits_EV, tables, 1000 * mix):
                wrong += 1
                parameters = [f"{name} {table[entry].tolist()}" for name, table in tables.by_name()]
                print(f"DIFFERS: entry {entry} of V={vocab} {dtype} {kind} mix {mix}:", ", ".join(parameters))
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
    for entries, vocab in TIMED:
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
