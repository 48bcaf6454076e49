"""Pinned memory as the host sees it: what would not be booked is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Never

import numpy as np
import torch
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

from gapless.errors import InternalError

if TYPE_CHECKING:
    from gapless.device.sim.device import SimDevice


class TrackedArray(NDArrayOperatorsMixin):
    """Stands in for a numpy array, which it deliberately is not: numpy and torch can not get at its memory.

    Subscripts, operators, ufuncs, copy, tolist, fill and iteration are booked as uses of the whole pinned buffer. A
    slice or a reshape is tracked like the buffer that it is a part of, and no use yet; np.asarray gives a read-only
    copy. Other methods of arrays and numpy functions raise InternalError.

    Not seen: what the host does to the torch tensor that `Device.pinned` returned, and to device memory.
    """

    def __init__(self, tensor: torch.Tensor, name: str, owner: SimDevice, part: NDArray[Any] | None = None) -> None:
        self._tensor = tensor
        self._name = name
        self._owner = owner
        self._memory = tensor.numpy() if part is None else part
        self._base = self._memory if part is None else part.base  # of every view, however many views lie between

    @property
    def size(self) -> int:
        return self._memory.size

    @property
    def shape(self) -> tuple[int, ...]:
        return self._memory.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._memory.dtype

    def __len__(self) -> int:
        return len(self._memory)

    def __getitem__(self, key: Any) -> Any:
        part = self._memory[key]
        if isinstance(part, np.ndarray) and part.base is self._base:
            return TrackedArray(self._tensor, self._name, self._owner, part)
        self._use(write=False)
        return self._memory[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._use(write=True)
        self._memory[key] = value

    def __iter__(self) -> Iterator[Any]:
        return iter(self.copy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise InternalError(f"a plain view of {self._name} would not be booked")
        self._use(write=False)
        array = np.array(self._memory, dtype)
        array.setflags(write=bool(copy))  # what is written to a copy that nobody asked for would be lost
        return array

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = (), **options: Any) -> Any:
        if method != "__call__":
            raise self._refused(f"{ufunc.__name__}.{method}")
        read = [each.copy() if isinstance(each, TrackedArray) else each for each in inputs]
        for each in out:
            if isinstance(each, TrackedArray):
                each._use(write=True)
        written = tuple(each._memory if isinstance(each, TrackedArray) else each for each in out)
        result = ufunc(*read, out=written or None, **options)
        return result if not out else out[0] if len(out) == 1 else out

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Never:
        raise self._refused(function.__name__)

    def __getattr__(self, name: str) -> Never:
        raise AttributeError(name) if name.startswith("__") else self._refused(name)

    def reshape(self, *shape: int) -> TrackedArray:
        part = self._memory.reshape(*shape)
        if part.base is not self._base:
            raise self._refused("a reshape that copies")
        return TrackedArray(self._tensor, self._name, self._owner, part)

    def copy(self) -> NDArray[Any]:
        return self.__array__(copy=True)

    def tolist(self) -> list[Any]:
        return self.copy().tolist()

    def fill(self, value: Any) -> None:
        self[...] = value

    def _use(self, *, write: bool) -> None:
        self._owner.host_uses(self._tensor, self._name, write=write)

    def _refused(self, what: str) -> InternalError:
        return InternalError(f"{what} on {self._name} would not be booked: use a subscript or take a copy()")
