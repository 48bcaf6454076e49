"""Which kernel multiplies with each kind of weights at each number of tokens: timed at start-up, kept in a file.

Kinds are told apart by shape, so layers share a choice. A file belongs to one device model and one set of versions;
equal files give equal kernels, and so equal bits.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from gapless.kernels.linear import (
    ALL_CANDIDATES,
    MOST_TOKENS,
    LinearTiles,
    candidates,
    gated_linear,
    linear,
    runs,
    tokens_tile,
)
from gapless.kernels.normed import Normed
from gapless.kernels.silu_mul import silu_mul

TORCH_HANDICAP = 1.05  # torch's product can not take the norm along, which costs a kernel
FLUSH_BYTES = 128 * 2**20  # more than any L2
MOST_WEIGHTS = 8  # of a kind, multiplied one after the other in a timing
_log = logging.getLogger(__name__)

Seconds = Callable[[Callable[[], object]], float]
"""Captures work as a graph and times its replay."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Weights of one shape and use."""

    outputs: int
    inputs: int
    gated: bool

    @classmethod
    def of(cls, weight_OI: Tensor, *, gated: bool) -> Kind:
        return cls(weight_OI.shape[0], weight_OI.shape[1], gated)


class LinearChoices:
    """Tiles by kind and number of tokens; None is torch's product. What was not prepared is torch's."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._tiles: dict[tuple[Kind, int], LinearTiles | None] = {}

    def get(self, weight_OI: Tensor, tokens: int, *, gated: bool) -> LinearTiles | None:
        return self._tiles.get((Kind.of(weight_OI, gated=gated), tokens))

    def prepare(
        self, weights: Mapping[Kind, Sequence[Tensor]], sizes: Sequence[int], arrived: Tensor, seconds_of: Seconds
    ) -> None:
        """Choose for steps of each of these numbers of tokens. Numbers that share a tile share the choice."""
        known = self._read()
        flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=arrived.device)
        for kind, same in weights.items():
            classes: dict[int, list[int]] = {}
            for size in sizes:
                if runs(same[0], size):
                    classes.setdefault(tokens_tile(size), []).append(size)
            for tile, members in classes.items():
                name = f"{kind.outputs}x{kind.inputs}{' gated' if kind.gated else ''} {str(same[0].dtype)[6:]} {tile}"
                if name not in known:
                    known[name] = _fastest(kind, same[:MOST_WEIGHTS], max(members), arrived, flush, seconds_of)
                    _log.info("linear map %s: %s", name, known[name])
                self._tiles.update({(kind, size): known[name] for size in members})
        self._write(known)

    def _read(self) -> dict[str, LinearTiles | None]:
        if self._file is None or not self._file.exists():
            return {}
        try:
            entries = json.loads(self._file.read_text())
            known = {name: None if tiles is None else LinearTiles(**tiles) for name, tiles in entries.items()}
            return {name: tiles for name, tiles in known.items() if tiles is None or tiles in ALL_CANDIDATES}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            _log.warning("%s is of no use (%s): timing again", self._file, error)
            return {}

    def _write(self, known: dict[str, LinearTiles | None]) -> None:
        if self._file is None:
            return
        entries = {name: None if tiles is None else asdict(tiles) for name, tiles in sorted(known.items())}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._file.parent, delete=False) as unfinished:
                json.dump(entries, unfinished, indent=1)
            os.replace(unfinished.name, self._file)
        except OSError as error:
            _log.warning("the choice of kernels could not be kept: %s", error)


def _fastest(
    kind: Kind, weights: Sequence[Tensor], tokens: int, arrived: Tensor, flush: Tensor, seconds_of: Seconds
) -> LinearTiles | None:
    assert tokens <= MOST_TOKENS
    x_TI = torch.randn(tokens, kind.inputs, device=weights[0].device).to(weights[0].dtype)

    def seconds(tiles: LinearTiles | None) -> float:
        def work() -> None:
            flush.zero_()
            for weight_OI in weights:
                multiply(Normed(x_TI), weight_OI, None, tiles, arrived, gated=kind.gated)

        return seconds_of(work)

    ways = [None, *candidates(gated=kind.gated, tokens=tokens)]
    times = {way: seconds(way) for way in ways}
    return min(ways, key=lambda way: times[way] * (TORCH_HANDICAP if way is None else 1.0))


def multiply(
    x: Normed, weight_OI: Tensor, bias_O: Tensor | None, tiles: LinearTiles | None, arrived: Tensor, *, gated: bool
) -> Tensor:
    """One map the way that was chosen."""
    if tiles is None:
        assert x.squares is None
        out_TO = functional.linear(x.x_TH, weight_OI, bias_O)
        return silu_mul(out_TO) if gated else out_TO
    if gated:
        return gated_linear(x, weight_OI, bias_O, tiles)
    return linear(x, weight_OI, bias_O, tiles, arrived)
