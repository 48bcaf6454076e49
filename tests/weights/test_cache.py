"""The cache of converted models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gapless.weights.cache import build_once, cache_folder


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GAPLESS_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("GAPLESS_CACHE")
    assert cache_folder() == tmp_path / "b" / "gapless"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "c" / ".cache" / "gapless"


def test_an_interrupt_leaves_nothing_behind_and_the_next_try_succeeds():
    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once("room/model", interrupted)
    assert list((cache_folder() / "room").iterdir()) == []
    folder = build_once("room/model", lambda folder: (folder / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_what_another_process_finished_first_is_taken():
    def slower(folder: Path) -> None:
        (folder / "slower").touch()
        build_once("model", lambda other: (other / "faster").touch())

    folder = build_once("model", slower)
    assert [path.name for path in folder.iterdir()] == ["faster"]
    assert list(cache_folder().iterdir()) == [folder]


def test_old_leftovers_of_killed_processes_are_swept():
    for name, age in (("old", 0), ("new", None)):
        (cache_folder() / f".unfinished-{name}").mkdir(parents=True)
        if age is not None:
            os.utime(cache_folder() / f".unfinished-{name}", (age, age))
    build_once("model", lambda _: None)
    assert sorted(path.name for path in cache_folder().iterdir()) == [".unfinished-new", "model"]
