"""Prints the table of docs/correctness.md."""

import torch

from support.sim.faults import table

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
