"""What deterministic mode costs on this GPU: decode steps and prompts of a shape on random weights, both ways.

    PYTHONPATH=src python scripts/gpu_invariant.py [--shape llama-8b] [--rows 32] [--context 600 ...] [--prompt 512 ...]

Decode steps are graphs of the forward pass and the logits, with the linear kernels that a start-up would choose for the
fast way; the two alternate. Prompts are one chunk without a graph. Medians.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import closing

import torch
from torch import Tensor

from gapless.attention import make_attention
from gapless.attention.base import LayerKV
from gapless.attention.scenario import batch_of
from gapless.bench.ceilings import matrix_rate
from gapless.bench.floors import layer_products, linear_operations
from gapless.device import open_device
from gapless.models.layers import make_ops
from gapless.models.llama import LlamaModel
from gapless.weights.hf_config import load_shape
from gapless.weights.random import random_weights

CUDA, DTYPE, BLOCK_SIZE, REPEATS = torch.device("cuda"), torch.bfloat16, 16, 15


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def seconds(*works: Callable[[], object]) -> list[float]:
    """Median device time of each; they take turns."""
    times: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    for _ in range(REPEATS):
        for work, own in zip(works, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            own.append(begin.elapsed_time(end) / 1e3)
    return [statistics.median(own) for own in times]


def make_models(shape: str, max_position: int) -> tuple[LlamaModel, LlamaModel]:
    """The fast way and the deterministic one, on the same weights."""
    config = load_shape(shape)
    fast, slow = (
        (make_attention(None, CUDA, deterministic=each), make_ops(CUDA, deterministic=each)) for each in (False, True)
    )
    tensors = random_weights(config, CUDA, DTYPE, 0)
    model = LlamaModel.load(
        config, tensors, device=CUDA, dtype=DTYPE, attention=fast[0], max_position=max_position, ops=fast[1]
    )
    return model, LlamaModel(config, model.weights, attention=slow[0], ops=slow[1], max_position=max_position)


def step_of(
    model: LlamaModel, kv: list[LayerKV], counts: list[int], lengths: list[int], logits: Callable[[Tensor], Tensor]
) -> Callable[[], object]:
    """Entries that compute the last tokens of their sequences; `logits` takes the hidden states whose logits count."""
    rows, columns = len(lengths), -(-max(lengths) // BLOCK_SIZE)
    table_RC = (torch.arange(rows * columns, dtype=torch.int32, device=CUDA) + 1).view(rows, columns)
    batch = batch_of(range(rows), counts, lengths, table_RC)
    tokens_T = torch.randint(model.vocab_size, (sum(counts),), dtype=torch.int32, device=CUDA)
    return lambda: model.logits(logits(model.forward(tokens_T, kv, batch)))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, nargs="*", default=[600, 2048])
    parser.add_argument("--prompt", type=int, nargs="*", default=[512, 2048, 8192])
    args = parser.parse_args()
    contexts, prompts, rows = args.context, args.prompt, args.rows
    config, longest = load_shape(args.shape), max(*contexts, *prompts)
    models = make_models(args.shape, longest)
    models[0].prepare([rows], lambda work: seconds(capture(work).replay)[0])
    blocks = max(
        *(rows * -(-context // BLOCK_SIZE) for context in contexts), *(-(-each // BLOCK_SIZE) for each in prompts)
    )
    kv = models[0].kv_spec.allocate(blocks + 1, BLOCK_SIZE, DTYPE, CUDA)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.shape}")
    for context in contexts:
        steps = [step_of(model, kv, [1] * rows, [context] * rows, lambda hidden_TH: hidden_TH) for model in models]
        graphs = [capture(step) for step in steps]
        fast, slow = seconds(*(graph.replay for graph in graphs))
        print(f"decode {rows} x {context}: {fast * 1e3:.3f} ms, deterministic {slow * 1e3:.3f} ms, {slow / fast:.3f} x")
    with closing(open_device("cuda")) as device:
        for prompt in prompts:
            rate = matrix_rate(device, layer_products(config), prompt, DTYPE)
            steps = [step_of(model, kv, [prompt], [prompt], lambda hidden_TH: hidden_TH[-1:]) for model in models]
            fast, slow = seconds(*steps)
            shares = [linear_operations(config, prompt, 1) / time / rate for time in (fast, slow)]
            print(
                f"prompt of {prompt}: {fast * 1e3:.2f} ms, {shares[0]:.1%} of the matrix rate, "
                f"deterministic {slow * 1e3:.2f} ms, {shares[1]:.1%}, {slow / fast:.3f} x"
            )


if __name__ == "__main__":
    main()
