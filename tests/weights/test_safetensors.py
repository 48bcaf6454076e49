"""Folders of safetensors files, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gapless.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from gapless.weights.safetensors import INDEX, SINGLE, iter_safetensors
from gapless.weights.safetensors_write import write_safetensors

A, B = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), torch.ones(4)


def shards(folder: Path, weight_map: dict[str, object] | None = None) -> Path:
    save_file({"a": A}, str(folder / "one.safetensors"))
    save_file({"b": B}, str(folder / "two.safetensors"))
    index = {"weight_map": weight_map or {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    return dict(iter_safetensors(folder))


def test_one_file_is_read_with_dtypes_as_stored(tmp_path: Path):
    save_file({"a": A, "b": B}, str(tmp_path / SINGLE))
    found = read(tmp_path)
    assert found.keys() == {"a", "b"}
    assert found["a"].dtype == torch.bfloat16
    assert torch.equal(found["a"], A)


def test_shards_are_read_by_their_index(tmp_path: Path):
    found = read(shards(tmp_path))
    assert torch.equal(found["a"], A)
    assert torch.equal(found["b"], B)


def test_a_missing_shard_is_named_before_anything_is_read(tmp_path: Path):
    (shards(tmp_path) / "two.safetensors").unlink()
    with pytest.raises(CorruptModelError, match=r"two\.safetensors is missing"):
        next(iter_safetensors(tmp_path))


def test_a_shard_without_the_promised_tensor_is_named(tmp_path: Path):
    shards(tmp_path, {"a": "one.safetensors", "c": "two.safetensors"})
    with pytest.raises(CorruptModelError, match=r"two\.safetensors lacks the tensor c"):
        read(tmp_path)


@pytest.mark.parametrize("outside", ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "one.bin", "..", 3])
def test_an_index_can_not_lead_out_of_the_folder(tmp_path: Path, outside: object):
    (tmp_path / "model").mkdir()
    save_file({"a": A}, str(tmp_path / "one.safetensors"))
    shards(tmp_path / "model", {"a": outside})
    with pytest.raises(CorruptModelError, match="not the name of a"):
        read(tmp_path / "model")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 1}'])
def test_a_broken_index_is_named(tmp_path: Path, text: str):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CorruptModelError, match=INDEX):
        read(tmp_path)


def test_damage_at_any_place_of_the_header_and_every_truncation_is_noticed_or_harmless(tmp_path: Path):
    path = tmp_path / SINGLE
    save_file({"a": A, "b": B}, str(path))
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptModelError, match=SINGLE):
            read(tmp_path)
    for at in range(len(whole) - 28):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x11]) + whole[at + 1 :])
        try:
            read(tmp_path)
        except CorruptModelError as error:
            assert SINGLE in str(error)  # noqa: PT017


def test_pickled_weights_are_refused_with_what_to_do(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedModelError, match="convert them to safetensors"):
        read(tmp_path)


def test_a_folder_without_weights_is_not_a_model(tmp_path: Path):
    with pytest.raises(ModelNotFoundError, match=SINGLE):
        read(tmp_path)


def test_a_file_written_in_parts_reads_back_the_same(tmp_path: Path):
    values = torch.randn(10, 3)
    halves = values.to(torch.float16)
    write_safetensors(
        tmp_path / SINGLE,
        {"x": ("float32", (10, 3)), "y": ("float16", (10, 3)), "z": ("bfloat16", (2,))},
        [
            ("x", iter([values[:4].numpy(), values[4:].numpy()])),
            ("y", iter([halves.numpy()])),
            ("z", iter([torch.tensor([1.5, -2.0], dtype=torch.bfloat16).view(torch.uint16).numpy()])),
        ],
    )
    found = read(tmp_path)
    assert torch.equal(found["x"], values)
    assert torch.equal(found["y"], halves)
    assert found["z"].tolist() == [1.5, -2.0]
