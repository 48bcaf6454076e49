"""The audit of declarations: what a piece of work did not declare can neither matter to it nor be changed by it.

Every known buffer, less what this piece declares of it, is filled with rubbish while it runs, and put back afterwards.
Known is all pinned memory, what the device was told of, and what was declared by anybody so far. A use that was not
declared then changes the outcome, or is found as a change of the rubbish.

Source: the frame rule of separation logic, Reynolds, "Separation logic", LICS 2002.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from gapless.device.base import Access
from gapless.errors import InternalError

_RUBBISH = 1_515_870_810


class Frame:
    """Hides every buffer that it knows from work that does not declare it."""

    def __init__(self) -> None:
        self._buffers: dict[int, tuple[str, torch.Tensor]] = {}

    def know(self, name: str, buffer: torch.Tensor) -> None:
        """Hide this one from now on, whether or not it is ever declared."""
        self._buffers[buffer.data_ptr()] = (name, buffer)

    def run(self, work: Callable[[], None], declared: Sequence[Access], what: str) -> None:
        """Run `work`. Raises InternalError if it writes to what it did not declare for writing."""
        for name, buffer, _, _ in declared:
            self.know(name, buffer)
        hidden: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        fixed: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        untouched: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        used: dict[int, list[Access]] = {}
        for each in declared:
            used.setdefault(each.buffer.data_ptr(), []).append(each)
        for address, (name, buffer) in self._buffers.items():
            uses = used.get(address)
            if uses is None:
                untouched.append((name, buffer, buffer.clone()))
                buffer.fill_(_rubbish(buffer))
                continue
            unused, unwritten = _left_out(buffer, uses), _left_out(buffer, [each for each in uses if each.write])
            kept = buffer[unused].clone()
            buffer[unused] = _rubbish(buffer)
            hidden.append((name, buffer, unused, kept))
            fixed.append((name, buffer, unwritten, buffer[unwritten].clone()))
        try:
            work()
            for name, buffer, _ in untouched:
                same = buffer.isnan() if buffer.is_floating_point() else buffer == _RUBBISH
                if not same.all():
                    raise InternalError(f"{what} wrote to {name} without declaring it")
            for name, buffer, units, before in fixed:
                if not torch.equal(buffer[units].nan_to_num(-1.0), before.nan_to_num(-1.0)):
                    raise InternalError(f"{what} wrote to {name} without declaring it")
        finally:
            for _, buffer, kept in untouched:
                buffer.copy_(kept)
            for _, buffer, units, kept in hidden:
                buffer[units] = kept


def _rubbish(buffer: torch.Tensor) -> float:
    """What it is filled with."""
    return float("nan") if buffer.is_floating_point() else _RUBBISH


def _left_out(buffer: torch.Tensor, uses: Sequence[Access]) -> torch.Tensor:
    """Units of the buffer that none of these uses covers, int64."""
    left = np.ones(buffer.shape[0], dtype=np.bool_)
    for each in uses:
        left[slice(None) if each.units is None else each.units] = False
    return torch.from_numpy(np.flatnonzero(left))
