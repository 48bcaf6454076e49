"""The linear layers of a decode step on a GPU: torch's products against ours, one by one and as the chain of a step.

PYTHONPATH=src python scripts/gpu_linear.py [--shape llama-8b] [--tokens 32]

Random weights, each layer its own, so that they come from memory and not from the L2. Times are medians of replays of a
captured graph; the share is of a plain read of 4 GiB in the same run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gapless.bench.read_kernel import readers
from gapless.kernels.choice import FLUSH_BYTES, MOST_WEIGHTS, Use, multiply
from gapless.kernels.linear import MOST_TILES, candidates, runs
from gapless.kernels.normed import LayerMaps, Normed
from gapless.kernels.ops import TritonOps
from gapless.weights.hf_config import load_shape

CUDA = torch.device("cuda")
REPLAYS = 9


def seconds_of(work: Callable[[], object]) -> float:
    """The median time of a graph of the work."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    times: list[float] = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def read_rate() -> float:
    """Bytes a second of the fastest plain read of 4 GiB."""
    data = torch.randint(0, 2**31 - 1, (2**30,), dtype=torch.int32, device=CUDA)
    return data.nbytes / min(seconds_of(read) for read in readers(data))


@dataclass(frozen=True)
class Layer:
    qkv: Tensor
    output: Tensor
    gate_up: Tensor
    down: Tensor
    norm_H: Tensor

    @property
    def linear(self) -> list[Tensor]:
        return [self.qkv, self.output, self.down]


class Step:
    """The linear layers of one step, with RMSNorm and SiLU-mul; attention is left out."""

    def __init__(self, shape: str, tokens: int) -> None:
        config = load_shape(shape)
        hidden, width = config.hidden_size, config.intermediate_size
        heads = config.num_heads * config.head_dim
        self.layers = [
            Layer(
                qkv=random(heads + 2 * config.num_kv_heads * config.head_dim, hidden),
                output=random(hidden, heads),
                gate_up=random(2 * width, hidden),
                down=random(hidden, width),
                norm_H=torch.rand(hidden, device=CUDA, dtype=torch.bfloat16) + 0.5,
            )
            for _ in range(config.num_layers)
        ]
        self.head = random(config.vocab_size, hidden)
        self.residual_TH = torch.randn(tokens, hidden, device=CUDA, dtype=torch.bfloat16)
        self.heads_TI = torch.randn(tokens, heads, device=CUDA, dtype=torch.bfloat16)
        self.tokens = tokens

    @property
    def weights(self) -> list[Tensor]:
        return [self.head, *(each for layer in self.layers for each in (*layer.linear, layer.gate_up))]

    def kinds(self) -> dict[str, list[Tensor]]:
        """The weights of each kind; gated ones under a name that says so."""
        kinds = {"head": [self.head]}
        for name in ("qkv", "output", "down", "gate_up"):
            kinds[name] = [getattr(layer, name) for layer in self.layers]
        return kinds

    def run(self, ops: TritonOps) -> Tensor:
        """As the model does it."""
        residual_TH = self.residual_TH.clone()
        x = ops.rms_norm(residual_TH, self.layers[0].norm_H, 1e-5)
        for layer in self.layers:
            ops.linear(x, layer.qkv, None)
            x = ops.add_linear(self.heads_TI, layer.output, None, residual_TH, layer.norm_H, 1e-5)
            gated_TF = ops.gated_linear(x, layer.gate_up, None)
            x = ops.add_linear(gated_TF, layer.down, None, residual_TH, layer.norm_H, 1e-5)
        return ops.linear(ops.rms_norm(residual_TH, self.layers[0].norm_H, 1e-5), self.head, None)

    def run_alone(self, ops: TritonOps) -> None:
        """The products alone, none of which needs another's result."""
        x, heads = Normed(self.residual_TH), Normed(self.heads_TI)
        for layer in self.layers:
            ops.linear(x, layer.qkv, None)
            ops.linear(heads, layer.output, None)
            gated_TF = ops.gated_linear(x, layer.gate_up, None)
            ops.linear(Normed(gated_TF), layer.down, None)
        ops.linear(x, self.head, None)


def random(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, device=CUDA, dtype=torch.bfloat16) / inputs**0.5


def each_kind(step: Step, rate: float) -> None:
    """Every way for every kind, fastest first."""
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=CUDA)
    arrived = torch.zeros(MOST_TILES, dtype=torch.int32, device=CUDA)
    empty = seconds_of(flush.zero_)
    for name, weights in step.kinds().items():
        same, gated = weights[:MOST_WEIGHTS], name == "gate_up"
        if not runs(same[0], step.tokens):
            continue
        use = Use.GATED if gated else Use.PLAIN
        x = Normed(torch.randn(step.tokens, same[0].shape[1], device=CUDA, dtype=torch.bfloat16))
        exact = functional.linear(x.x_TH.float(), same[0].float())
        if gated:
            gate, up = exact.chunk(2, dim=1)
            exact = functional.silu(gate) * up
        rows: list[tuple[float, str]] = []
        for tiles in (None, *candidates(gated=gated, tokens=step.tokens)):

            def work(tiles: object = tiles, same: Sequence[Tensor] = same, x: Normed = x, use: Use = use) -> None:
                flush.zero_()
                for weight in same:
                    multiply(x, weight, None, tiles, arrived, use)  # type: ignore[arg-type]

            seconds = (seconds_of(work) - empty) / len(same)
            out = multiply(x, same[0], None, tiles, arrived, use)
            error = float((out.float() - exact).norm() / exact.norm())
            rows.append((seconds, f"{'torch' if tiles is None else tiles} error {error:.1e}"))
        print(f"\n{name} {same[0].shape[0]} x {same[0].shape[1]}")
        for seconds, text in sorted(rows):
            speed = same[0].nbytes / seconds
            print(f"  {seconds * 1e6:8.2f} us {speed / 1e12:6.3f} TB/s {speed / rate:5.1%}  {text}")


def chains(step: Step, rate: float) -> None:
    """A whole step each way."""
    plain, apart, fused, alone = (TritonOps() for _ in range(4))
    layers = step.layers
    gated, qkv = [layer.gate_up for layer in layers], [layer.qkv for layer in layers]
    added = [weight for layer in layers for weight in (layer.output, layer.down)]
    for ops, may_fuse in ((apart, False), (fused, True)):
        ops.prepare(step.head, LayerMaps(qkv, gated, added), [step.tokens], seconds_of, may_fuse=may_fuse)
    alone.prepare(step.head, LayerMaps([*qkv, *added], gated, []), [step.tokens], seconds_of)
    size = sum(weight.nbytes for weight in step.weights)
    exact = step.run(plain).float()
    print()
    for name, work in {
        "torch's products, norms and SiLU-mul between": lambda: step.run(plain),
        "the fastest of each kind, norms between": lambda: step.run(apart),
        "the same, norms fused": lambda: step.run(fused),
        "torch's products and SiLU-mul alone": lambda: step.run_alone(plain),
        "the fastest of each kind alone": lambda: step.run_alone(alone),
    }.items():
        seconds = seconds_of(work)
        print(f"{name:48} {seconds * 1e3:7.3f} ms {size / seconds / 1e12:6.3f} TB/s {size / seconds / rate:5.1%}")
    print(f"error against torch's: {float((step.run(fused).float() - exact).norm() / exact.norm()):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b")
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    rate = read_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, plain read {rate / 1e12:.3f} TB/s")
    step = Step(options.shape, options.tokens)
    each_kind(step, rate)
    chains(step, rate)


if __name__ == "__main__":
    main()
