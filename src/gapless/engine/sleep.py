"""Device memory that is given back and taken again, under the same tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Lent:
    """The memory of one tensor and of its views. On the CPU it is never given back."""

    def __init__(self, tensor: Tensor, *, keep: bool) -> None:
        """keep: its contents, on the host; else they are zero afterwards."""
        self._storage = tensor.untyped_storage()
        self._bytes = self._storage.nbytes()
        self._device = tensor.device
        self._keep = keep
        self._copy: Tensor | None = None
        self._given = False

    def give_back(self) -> None:
        if self._given:
            return
        if self._keep:
            self._copy = self._view().cpu()
        self._storage.resize_(0)
        self._given = True

    def take_again(self) -> None:
        """Does nothing if it has it. Raises torch.OutOfMemoryError if somebody else has."""
        if not self._given:
            return
        self._storage.resize_(self._bytes)
        self._given = False
        if self._copy is None:
            self._view().zero_()
        else:
            self._view().copy_(self._copy)
            self._copy = None

    def _view(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(self._storage)


def lend(tensors: Iterable[Tensor], *, keep: bool) -> list[Lent]:
    """Each memory once, however many of the tensors lie in it."""
    found: dict[int, Lent] = {}
    for tensor in tensors:
        if tensor.device.type != "cpu":
            found.setdefault(tensor.untyped_storage().data_ptr(), Lent(tensor, keep=keep))
    return list(found.values())


def give_back(lent: Iterable[Lent]) -> None:
    for each in lent:
        each.give_back()


def take_again(lent: Iterable[Lent]) -> None:
    for each in lent:
        each.take_again()
