"""Which kernel multiplies with each kind of weights at each number of tokens: timed at start-up, kept in a file.

Kinds are told apart by shape and use, so layers share a choice. A file belongs to one device model and one set of
versions; equal files give equal kernels, and so equal bits.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gapless.kernels.linear import (
    ALL_CANDIDATES,
    LARGEST_TILE,
    MOST_TILES,
    LinearTiles,
    add_linear,
    candidates,
    gated_linear,
    linear,
    runs,
    token_class,
)
from gapless.kernels.normed import Normed
from gapless.kernels.rms_norm import add_rms_norm
from gapless.kernels.silu_mul import silu_mul
from gapless.kernels.wide_tiles import ALL_WIDE_CANDIDATES, ALONE_INPUTS, WideTiles, wide_candidates

FLUSH_BYTES = 128 * 2**20  # more than any L2
MOST_WEIGHTS = 8  # of a kind, multiplied one after the other in a timing
MOST_THREADS = 16  # that compile
ROUNDS = 4  # of them in a timing, each behind a flush: small kernels take a few microseconds each
_EPS = 1e-5
_log = logging.getLogger(__name__)

Tiles = LinearTiles | WideTiles
_EVER_TRIED: set[Tiles] = {*ALL_CANDIDATES, *ALL_WIDE_CANDIDATES}
Seconds = Callable[[Callable[[], object]], float]
"""Captures work as a graph and times its replay."""


class Use(StrEnum):
    PLAIN = "plain"
    GATED = "gated"  # SiLU-mul of the product follows
    ADDED = "added"  # the product is added to the residual, and RMSNorm follows


@dataclass(frozen=True, slots=True)
class Kind:
    """Weights of one shape and use."""

    outputs: int
    inputs: int
    use: Use

    @classmethod
    def of(cls, weight_OI: Tensor, use: Use) -> Kind:
        return cls(weight_OI.shape[0], weight_OI.shape[1], use)

    def ways(self, tokens: int, *, wide: bool) -> Sequence[Tiles]:
        """What is worth timing for this class of tokens."""
        gated = self.use == Use.GATED
        apart = wide_candidates(outputs=self.outputs, inputs=self.inputs, gated=gated, tokens=tokens) if wide else []
        return apart if apart and self.inputs <= ALONE_INPUTS else [*candidates(gated=gated, tokens=tokens), *apart]


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one kind at one number of tokens, in microseconds: our fastest tiles, and torch's product with the kernel for
    what follows it. `norm` is that kernel alone where it is RMSNorm, which ours need too where norms are not fused."""

    tiles: Tiles
    ours: float
    torch: float
    norm: float = 0.0

    @classmethod
    def of(cls, tiles: dict[str, int], **times: float) -> Timing:
        microseconds = {name: float(time) for name, time in times.items()}
        return cls(WideTiles(**tiles) if "stages" in tiles else LinearTiles(**tiles), **microseconds)

    def tiles_apart(self) -> Tiles | None:
        """The faster way where norms have kernels of their own; None is torch's product."""
        return self.tiles if self.ours + self.norm < self.torch else None


class LinearChoices:
    """Tiles by kind and number of tokens; None is torch's product. What was not prepared is torch's."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._tiles: dict[tuple[Kind, int], Tiles | None] = {}
        self.fused: frozenset[int] = frozenset()
        """Numbers of tokens at which the norms are part of the products."""

    def get(self, weight_OI: Tensor, tokens: int, use: Use) -> Tiles | None:
        return self._tiles.get((Kind.of(weight_OI, use), tokens))

    def prepare(
        self,
        head: Kind,
        weights: Mapping[Kind, Sequence[Tensor]],
        sizes: Collection[int],
        arrived: Tensor,
        seconds_of: Seconds,
        *,
        may_fuse: bool,
        wide: bool = False,
        also: Collection[int] = (),
    ) -> None:
        """Choose for steps of each of these numbers of tokens.

        weights  the head's and those of all layers, by kind. Their numbers count where norms are fused or not.
        wide     whether the kernels of wide_linear.py run here
        also     more numbers of tokens, for which nothing is timed: they take what was chosen for one of `sizes` that
                 shares their class, or else torch's products
        """
        known = self._read()
        classes: dict[int, list[int]] = {}
        for size in sizes:
            classes.setdefault(token_class(size), []).append(size)
        trials = {
            (tokens, kind): _Trial(kind, same[:MOST_WEIGHTS], kind.ways(tokens, wide=wide), tokens, max(timed))
            for tokens, timed in classes.items()
            for kind, same in weights.items()
            if runs(same[0], tokens)
        }
        unknown = [trial for trial in trials.values() if trial.name not in known]
        if unknown:
            compile_all([launch for trial in unknown for launch in trial.launches()], arrived.device)
            flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=arrived.device)
            new = {trial.name: trial.measure(arrived, flush, seconds_of) for trial in unknown if trial.ways}
            for name, timing in new.items():
                _log.info("linear map %s: %s", name, timing)
            known |= new
            self._write(new)
        for tokens, timed in classes.items():
            members = [*timed, *(size for size in also if token_class(size) == tokens)]
            timings = {
                kind: known[trial.name] for (of, kind), trial in trials.items() if of == tokens and trial.name in known
            }
            counts = {kind: len(same) - (kind == head) for kind, same in weights.items()}
            layers = {kind: count for kind, count in counts.items() if count}
            fuse = may_fuse and _fusing_pays(layers, timings)
            if fuse:
                self.fused |= frozenset(members)
            for kind, timing in timings.items():
                tiles = timing.tiles if fuse and kind in layers else timing.tiles_apart()
                self._tiles.update({(kind, size): tiles for size in members})

    def _read(self) -> dict[str, Timing]:
        if self._file is None:
            return {}
        try:
            if not self._file.exists():
                return {}
            entries: dict[str, dict[str, Any]] = json.loads(self._file.read_text())
            known = {name: Timing.of(**entry) for name, entry in entries.items()}
            return {name: timing for name, timing in known.items() if timing.tiles in _EVER_TRIED}
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            _log.warning("%s is of no use (%s): timing again", self._file, error)
            return {}

    def _write(self, new: dict[str, Timing]) -> None:
        """Add these to what the file has by now, which other processes may have written to."""
        if self._file is None:
            return
        entries = {name: asdict(timing) for name, timing in sorted({**self._read(), **new}.items())}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._file.parent, delete=False) as unfinished:
                json.dump(entries, unfinished, indent=1)
            os.chmod(unfinished.name, 0o644)
            os.replace(unfinished.name, self._file)
        except OSError as error:
            _log.warning("the choice of kernels could not be kept: %s", error)


def _fusing_pays(layers: Mapping[Kind, int], timings: Mapping[Kind, Timing]) -> bool:
    """Whether our kernels for all maps of the layers, norms in them, beat the faster way of each with norms apart."""
    if not layers or not all(kind in timings for kind in layers):
        return False
    fused = apart = 0.0
    for kind, count in layers.items():
        timing = timings[kind]
        fused += count * timing.ours
        apart += count * min(timing.ours + timing.norm, timing.torch)
    return fused < apart


class _Trial:
    """Ways to multiply with weights of one kind, to be timed with so many tokens for all of a class.

    name  under which the timing is kept
    ways  those that compile and fit, as far as it is known
    """

    def __init__(
        self, kind: Kind, weights: Sequence[Tensor], ways: Sequence[Tiles], token_class: int, tokens: int
    ) -> None:
        wide = " wide" if any(isinstance(tiles, WideTiles) for tiles in ways) else ""
        dtype = str(weights[0].dtype)[6:]
        self.name = f"{kind.outputs}x{kind.inputs} {kind.use} {dtype} {token_class}{wide}"
        self.ways = list(ways)
        self._kind, self._weights, self._tokens = kind, weights, tokens

    def launches(self) -> list[Launch]:
        return [Launch(self, tiles, self._kernel(tiles)) for tiles in self.ways]

    def launch(self, tiles: Tiles) -> None:
        """One way once, with memory of its own. A tile's tokens take the same kernel as more of them."""
        arrived = torch.zeros(MOST_TILES, dtype=torch.int32, device=self._weights[0].device)
        self._multiply_by(tiles, arrived, min(self._tokens, LARGEST_TILE))(self._weights[0])

    def _kernel(self, tiles: Tiles) -> tuple[object, ...]:
        size = self._kind.inputs if isinstance(tiles, WideTiles) else tiles.tokens(self._tokens)
        return tiles, self._kind.use, size

    def measure(self, arrived: Tensor, flush: Tensor, seconds_of: Seconds) -> Timing:
        def microseconds(work: Callable[[Tensor], object] | None) -> float:
            def all_of_them() -> None:
                for _ in range(ROUNDS):
                    flush.zero_()
                    for weight_OI in self._weights if work else ():
                        assert work is not None
                        work(weight_OI)

            return seconds_of(all_of_them) * 1e6 / (ROUNDS * len(self._weights))

        empty = microseconds(None)
        times = {tiles: microseconds(self._multiply_by(tiles, arrived, self._tokens)) - empty for tiles in self.ways}
        best = min(times, key=lambda tiles: times[tiles])
        norm = 0.0
        if self._kind.use == Use.ADDED:
            _, residual_TO, norm_O = self._operands(self._tokens)
            norm = microseconds(lambda _: add_rms_norm(residual_TO, residual_TO, norm_O, _EPS)) - empty
        torchs = microseconds(self._multiply_by(None, arrived, self._tokens)) - empty
        return Timing(best, times[best], torchs, norm)

    def _operands(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, and a residual and its norm's weights where there is one."""
        kind, device, dtype = self._kind, self._weights[0].device, self._weights[0].dtype
        x_TI = torch.randn(tokens, kind.inputs, device=device).to(dtype)
        residual_TO = torch.zeros(tokens, kind.outputs if kind.use == Use.ADDED else 0, device=device, dtype=dtype)
        return x_TI, residual_TO, torch.ones(residual_TO.shape[1], device=device, dtype=dtype)

    def _multiply_by(self, tiles: Tiles | None, arrived: Tensor, tokens: int) -> Callable[[Tensor], object]:
        x_TI, residual_TO, norm_O = self._operands(tokens)
        use = self._kind.use

        def work(weight_OI: Tensor) -> None:
            if use == Use.ADDED and tiles is not None:
                multiply_and_add(x_TI, weight_OI, None, residual_TO, norm_O, _EPS, tiles, arrived)
                return
            out = multiply(Normed(x_TI), weight_OI, None, tiles, arrived, use)
            if use == Use.ADDED:
                add_rms_norm(out, residual_TO, norm_O, _EPS)

        return work


class Launch(NamedTuple):
    """A first launch, which compiles. kernel: equal for launches of the same kernel, or of some that differ."""

    trial: _Trial
    tiles: Tiles
    kernel: tuple[object, ...]


def compile_all(launches: Sequence[Launch], device: torch.device) -> None:
    """Launch these once, side by side: compiling is most of a cold start's time. Ways that fail are dropped.

    Launches of one kernel follow each other: side by side, each would compile it, and unload what another has launched.
    """
    if device.type != "cuda":
        return
    alike: dict[tuple[object, ...], list[Launch]] = {}
    for launch in launches:
        alike.setdefault(launch.kernel, []).append(launch)

    def run(same: Sequence[Launch]) -> None:
        torch.accelerator.set_device_index(device)
        for launch in same:
            try:
                launch.trial.launch(launch.tiles)
            except torch.OutOfMemoryError:
                continue  # it may fit when it is timed
            except Exception as error:  # noqa: BLE001 - whatever the compiler says, the other ways are still there
                _log.warning("%s can not run here: %s", launch.tiles, error)
                launch.trial.ways.remove(launch.tiles)

    pool = ThreadPoolExecutor(max_workers=min(MOST_THREADS, len(os.sched_getaffinity(0))))
    try:
        wait([pool.submit(run, same) for same in alike.values()])
    finally:
        pool.shutdown(cancel_futures=True)


def multiply(
    x: Normed, weight_OI: Tensor, bias_O: Tensor | None, tiles: Tiles | None, arrived: Tensor, use: Use
) -> Tensor:
    """One map the way that was chosen, without the norm that may follow."""
    if tiles is None:
        assert x.squares is None
        out_TO = functional.linear(x.x_TH, weight_OI, bias_O)
        return silu_mul(out_TO) if use == Use.GATED else out_TO
    if isinstance(tiles, WideTiles):
        from gapless.kernels.wide_linear import wide_gated_linear, wide_linear

        return (wide_gated_linear if use == Use.GATED else wide_linear)(x, weight_OI, bias_O, tiles)
    if use == Use.GATED:
        return gated_linear(x, weight_OI, bias_O, tiles)
    return linear(x, weight_OI, bias_O, tiles, arrived)


def multiply_and_add(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor,
    norm_O: Tensor,
    eps: float,
    tiles: Tiles,
    arrived: Tensor,
) -> Normed:
    """Add the product to the residual in place, and return the sum on its way to RMSNorm."""
    if isinstance(tiles, WideTiles):
        from gapless.kernels.wide_linear import wide_add_linear

        return wide_add_linear(x_TI, weight_OI, bias_O, residual_TO, norm_O, eps, tiles)
    return add_linear(x_TI, weight_OI, bias_O, residual_TO, norm_O, eps, tiles, arrived)
