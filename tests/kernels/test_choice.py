"""The choice of linear kernels: the fastest, once, kept in a file that may also be missing, broken or out of reach."""

from __future__ import annotations

import _thread
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gapless.kernels import choice
from gapless.kernels.choice import Kind, Launch, LinearChoices, Use, compile_all
from gapless.kernels.linear import CANDIDATES, LinearTiles, candidates
from gapless.kernels.wide_tiles import WIDE_CANDIDATES, WideTiles

HEAD = torch.empty(256, 128, dtype=torch.bfloat16)
GATED = torch.empty(512, 128, dtype=torch.bfloat16)
ADDED = torch.empty(128, 256, dtype=torch.bfloat16)
NUM_CANDIDATES = len(candidates(gated=False, tokens=16))
SLOW = 1000.0


class Clock:
    """Says what each timing takes, without running anything. They come in this order: nothing; ours, one after the
    other; the norm alone, of a map that RMSNorm follows; torch's."""

    def __init__(self, times: Sequence[float]) -> None:
        self.times = iter([*times])
        self.timings = 0

    def __call__(self, work: Callable[[], object]) -> float:
        self.timings += 1
        return next(self.times)


def fastest(best: int, *, torch_takes: float = SLOW) -> Clock:
    """Our way number `best` takes 1."""
    return Clock([0.0, *(1.0 if way == best else 5.0 + way for way in range(NUM_CANDIDATES)), torch_takes])


def prepare(file: Path | None, clock: Clock, sizes: tuple[int, ...] = (8, 16)) -> LinearChoices:
    choices = LinearChoices(file)
    head = Kind.of(HEAD, Use.PLAIN)
    choices.prepare(head, {head: [HEAD]}, sizes, torch.zeros(8, dtype=torch.int32), clock, may_fuse=True)
    return choices


def test_the_fastest_way_is_taken_for_all_sizes_up_to_a_power_of_two():
    clock = fastest(1)
    choices = prepare(None, clock)
    assert choices.get(HEAD, 8, Use.PLAIN) == choices.get(HEAD, 16, Use.PLAIN) == CANDIDATES[1]
    assert clock.timings == 2 + NUM_CANDIDATES


def test_torchs_product_is_taken_where_it_is_the_fastest_and_where_nothing_was_prepared():
    choices = prepare(None, fastest(0, torch_takes=0.5))
    assert choices.get(HEAD, 8, Use.PLAIN) is None
    assert choices.get(HEAD, 9, Use.PLAIN) is None
    assert choices.get(HEAD, 8, Use.GATED) is None


# per map of the layers: (ours, torch's with the kernel behind it, the norm); whether norms are fused; and if not, whose
FUSING = {
    "ours are faster": ([(1, 2, 0), (1, 2, 0.5), (1, 2, 0.5)], True, None),
    "slower by less than the norms": ([(1, 1, 0), (1.3, 1, 0.5), (1.3, 1.7, 0.5)], True, None),
    "slower by more than the norms": ([(1, 2, 0), (1.6, 1.2, 0.5), (1.6, 1.2, 0.5)], False, [True, False, False]),
    "one is much slower": ([(9, 2, 0), (1, 2, 0.5), (1, 2, 0.5)], False, [False, True, True]),
}


@pytest.mark.parametrize("may_fuse", [True, False])
@pytest.mark.parametrize("name", FUSING)
def test_norms_are_fused_where_the_layer_gains_by_it(name: str, may_fuse: bool):
    times, fused, ours = FUSING[name]
    out = torch.empty(128, 128, dtype=torch.bfloat16)
    head = Kind.of(HEAD, Use.PLAIN)
    maps: list[tuple[Tensor, Use]] = [(GATED, Use.GATED), (ADDED, Use.ADDED), (out, Use.ADDED)]
    readings = [0.0, *[SLOW] * NUM_CANDIDATES, 1.0]  # the head is torch's
    for (weight, use), (us, torch_us, norm) in zip(maps, times, strict=True):
        count = len(candidates(gated=use == Use.GATED, tokens=16))
        readings += [0.0, us, *[SLOW] * (count - 1), *([norm] if use == Use.ADDED else []), torch_us]
        assert weight.dtype == torch.bfloat16
    kinds = {head: [HEAD], **{Kind.of(weight, use): [weight] for weight, use in maps}}
    choices, clock = LinearChoices(None), Clock(readings)
    choices.prepare(head, kinds, [5], torch.zeros(8, dtype=torch.int32), clock, may_fuse=may_fuse)
    assert clock.timings == len(readings)
    assert choices.fused == (frozenset([5]) if fused and may_fuse else frozenset())
    assert choices.get(HEAD, 5, Use.PLAIN) is None
    if fused and may_fuse:
        assert all(choices.get(weight, 5, use) is not None for weight, use in maps)
    elif ours is not None:
        assert [choices.get(weight, 5, use) is not None for weight, use in maps] == ours


def test_a_choice_is_kept_and_not_timed_again(tmp_path: Path):
    file = tmp_path / "new" / "linear.json"
    prepare(file, fastest(2))
    clock = fastest(0)
    assert prepare(file, clock).get(HEAD, 8, Use.PLAIN) == CANDIDATES[2]
    assert clock.timings == 0


NAME = "256x128 plain bfloat16 16"
GOOD_TILES = {"out_tile": 64, "in_tile": 128, "split": 1, "num_stages": 5}
WRONG_TIME = {"tiles": GOOD_TILES, "ours": "x", "torch": 1.0}
NO_SENSE = [
    "",
    "[]",
    "{",
    *(json.dumps({NAME: entry}) for entry in ({"old": 1}, 3, {"tiles": {"a": 1}}, {"tiles": 7}, WRONG_TIME)),
]


@pytest.mark.parametrize("text", NO_SENSE)
def test_a_file_that_makes_no_sense_is_timed_again_and_mended(tmp_path: Path, text: str):
    file = tmp_path / "linear.json"
    file.write_text(text)
    assert prepare(file, fastest(0)).get(HEAD, 8, Use.PLAIN) == CANDIDATES[0]
    assert prepare(file, fastest(1)).get(HEAD, 8, Use.PLAIN) == CANDIDATES[0]


TALL = candidates(gated=False, tokens=256)[0]
LONG = torch.empty(256, 2048, dtype=torch.bfloat16)


def prepare_wide(file: Path | None, clock: Clock, *, wide: bool = True, also: tuple[int, ...] = ()) -> LinearChoices:
    choices, head = LinearChoices(file), Kind.of(LONG, Use.PLAIN)
    arrived = torch.zeros(8, dtype=torch.int32)
    choices.prepare(head, {head: [LONG]}, [256], arrived, clock, may_fuse=True, wide=wide, also=also)
    return choices


def times_at_256(fastest: LinearTiles | WideTiles, *, wide: bool = True) -> Clock:
    ways = Kind.of(LONG, Use.PLAIN).ways(256, wide=wide)
    return Clock([0.0, *(1.0 if tiles == fastest else SLOW for tiles in ways), SLOW])


@pytest.mark.parametrize("fastest", [TALL, WIDE_CANDIDATES[1]])
def test_wide_tiles_are_timed_beside_the_others_and_kept_as_what_they_are(
    tmp_path: Path, fastest: LinearTiles | WideTiles
):
    file, clock = tmp_path / "linear.json", times_at_256(fastest)
    assert prepare_wide(file, clock).get(LONG, 256, Use.PLAIN) == fastest
    assert clock.timings == 2 + len(candidates(gated=False, tokens=256)) + len(WIDE_CANDIDATES)
    again = Clock([])
    assert prepare_wide(file, again).get(LONG, 256, Use.PLAIN) == fastest
    assert again.timings == 0


def test_a_file_from_before_wide_tiles_is_timed_again_where_they_run_and_good_where_they_do_not(tmp_path: Path):
    file = tmp_path / "linear.json"
    prepare_wide(file, times_at_256(TALL, wide=False), wide=False)
    assert "stages" not in file.read_text().replace("num_stages", "")
    assert prepare_wide(file, times_at_256(WIDE_CANDIDATES[0])).get(LONG, 256, Use.PLAIN) == WIDE_CANDIDATES[0]
    assert prepare_wide(file, Clock([]), wide=False).get(LONG, 256, Use.PLAIN) == TALL


def test_wide_tiles_are_not_tried_where_they_do_not_run_or_tokens_are_few():
    assert not any(isinstance(tiles, WideTiles) for tiles in Kind.of(LONG, Use.PLAIN).ways(256, wide=False))
    assert not any(isinstance(tiles, WideTiles) for tiles in Kind.of(LONG, Use.PLAIN).ways(64, wide=True))
    assert Kind.of(HEAD, Use.PLAIN).ways(256, wide=False) == candidates(gated=False, tokens=256)


def test_wide_tiles_are_tried_alone_where_inputs_are_few():
    assert Kind.of(HEAD, Use.PLAIN).ways(256, wide=True) == [*WIDE_CANDIDATES]
    assert Kind.of(HEAD, Use.PLAIN).ways(64, wide=True) == candidates(gated=False, tokens=64)


def test_other_sizes_take_the_choice_of_their_class_or_else_torchs_product():
    clock = times_at_256(WIDE_CANDIDATES[0])
    choices = prepare_wide(None, clock, also=(130, 256, 257, 2000))
    assert clock.timings == 2 + len(candidates(gated=False, tokens=256)) + len(WIDE_CANDIDATES)
    assert choices.get(LONG, 130, Use.PLAIN) == choices.get(LONG, 256, Use.PLAIN) == WIDE_CANDIDATES[0]
    assert choices.get(LONG, 257, Use.PLAIN) is choices.get(LONG, 2000, Use.PLAIN) is None


def test_other_sizes_fuse_norms_where_their_class_does():
    head = Kind.of(HEAD, Use.PLAIN)
    kinds = {head: [HEAD, HEAD], Kind.of(ADDED, Use.ADDED): [ADDED]}
    count = NUM_CANDIDATES - 1
    plain, added = [0.0, 1.2, *[SLOW] * count, 1.0], [0.0, 1.0, *[SLOW] * count, 0.5, 1.5]
    choices, clock, arrived = LinearChoices(None), Clock([*plain, *added]), torch.zeros(8, dtype=torch.int32)
    choices.prepare(head, kinds, [5], arrived, clock, may_fuse=True, also=[13, 40])
    assert choices.fused == frozenset([5, 13])
    assert choices.get(ADDED, 13, Use.ADDED) == CANDIDATES[0]
    assert choices.get(ADDED, 40, Use.ADDED) is None


def test_tiles_that_are_no_longer_tried_are_timed_again(tmp_path: Path):
    file = tmp_path / "linear.json"
    prepare(file, fastest(0))
    file.write_text(file.read_text().replace('"num_stages": 5', '"num_stages": 7'))
    assert LinearTiles(64, 128, 1, 7) not in CANDIDATES
    assert prepare(file, fastest(1)).get(HEAD, 8, Use.PLAIN) == CANDIDATES[1]


def test_a_folder_that_can_not_be_written_does_no_harm(tmp_path: Path):
    (tmp_path / "file").write_text("")
    choices = prepare(tmp_path / "file" / "linear.json", fastest(0))
    assert choices.get(HEAD, 8, Use.PLAIN) == CANDIDATES[0]


@pytest.mark.parametrize(("weight", "tokens"), [(HEAD.float(), 8), (HEAD, 1025), (HEAD[:, :100], 8), (HEAD.T, 8)])
def test_what_the_kernels_can_not_multiply_is_left_to_torch(weight: Tensor, tokens: int):
    choices, clock = LinearChoices(None), fastest(0)
    kind = Kind.of(weight, Use.PLAIN)
    choices.prepare(kind, {kind: [weight]}, [tokens], torch.zeros(8, dtype=torch.int32), clock, may_fuse=True)
    assert choices.get(weight, tokens, Use.PLAIN) is None
    assert clock.timings == 0


def test_a_map_of_the_layers_that_has_the_heads_shape_is_ours_where_norms_are_fused():
    head = Kind.of(HEAD, Use.PLAIN)
    kinds = {head: [HEAD, HEAD], Kind.of(ADDED, Use.ADDED): [ADDED]}
    count = NUM_CANDIDATES - 1
    plain, added = [0.0, 1.2, *[SLOW] * count, 1.0], [0.0, 1.0, *[SLOW] * count, 0.5, 1.5]
    choices = LinearChoices(None)
    choices.prepare(head, kinds, [5], torch.zeros(8, dtype=torch.int32), Clock([*plain, *added]), may_fuse=True)
    assert choices.fused == frozenset([5])
    assert choices.get(HEAD, 5, Use.PLAIN) is not None


def side_by_side(arch: int, shared_bytes: int) -> dict[str, Any]:
    script = Path(__file__).with_name("side_by_side.py")
    command = [sys.executable, str(script), str(arch), str(shared_bytes)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_equal_kernels_are_compiled_once_and_none_is_unloaded():
    """Two maps of different shape take the same kernels."""
    assert side_by_side(90, 232_448) == {"load": 5, "launch": 10, "ways": [[0, 1, 2, 3, 4]] * 2}


def test_ways_that_do_not_run_on_a_device_are_left_out():
    """Less than half the shared memory, as on sm_120."""
    found = side_by_side(120, 101_376)
    first, second = found["ways"]
    assert first == second
    assert 0 < len(first) == found["load"] < 5


def test_a_kind_of_which_no_way_runs_is_torchs(monkeypatch: pytest.MonkeyPatch):
    def drop(launches: Sequence[Launch], device: torch.device) -> None:
        for launch in launches:
            launch.trial.ways.remove(launch.tiles)

    monkeypatch.setattr(choice, "compile_all", drop)
    choices, head = LinearChoices(None), Kind.of(HEAD, Use.PLAIN)
    choices.prepare(head, {head: [HEAD]}, [8], torch.zeros(8, dtype=torch.int32), Clock([]), may_fuse=True)
    assert choices.get(HEAD, 8, Use.PLAIN) is None


def test_ctrl_c_ends_the_compiling_after_the_kernels_in_hand(monkeypatch: pytest.MonkeyPatch):
    class Slow:
        launched = 0

        def launch(self, tiles: LinearTiles | WideTiles) -> None:
            self.launched += 1
            if self.launched == 1:
                _thread.interrupt_main()
            time.sleep(0.05)

    def no_device(_index: object) -> None: ...

    monkeypatch.setattr(torch.accelerator, "set_device_index", no_device)
    monkeypatch.setattr(choice, "MOST_THREADS", 1)
    slow: Any = Slow()
    with pytest.raises(KeyboardInterrupt):
        compile_all([Launch(slow, CANDIDATES[0], (number,)) for number in range(40)], torch.device("cuda"))
    assert slow.launched < 40


def test_processes_that_share_a_file_keep_each_others_entries(tmp_path: Path):
    file, other = tmp_path / "linear.json", torch.empty(1024, 128, dtype=torch.bfloat16)
    first = fastest(0)

    def other_process(work: Callable[[], object]) -> float:
        if not first.timings:
            prepare_only(other, file, fastest(1))
        return first(work)

    prepare_only(HEAD, file, other_process)
    assert set(json.loads(file.read_text())) == {NAME, "1024x128 plain bfloat16 16"}
    before = file.stat().st_mtime_ns
    prepare_only(HEAD, file, Clock([]))
    assert file.stat().st_mtime_ns == before


def prepare_only(weight_OI: Tensor, file: Path, clock: Callable[[Callable[[], object]], float]) -> None:
    choices, head = LinearChoices(file), Kind.of(weight_OI, Use.PLAIN)
    choices.prepare(head, {head: [weight_OI]}, [8], torch.zeros(8, dtype=torch.int32), clock, may_fuse=True)
