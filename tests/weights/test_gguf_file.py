"""The GGUF header reader, against the package's own reader on whole files and on its own on damaged ones."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader

from gapless.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from gapless.weights.gguf import convert_gguf
from gapless.weights.gguf_file import GGUFFile
from weights.tiny import write_gguf

START = b"GGUF" + struct.pack("<I", 3)


def test_metadata_and_tensors_are_those_that_the_package_reads(tmp_path: Path):
    write_gguf(tmp_path / "m.gguf", kind=Kind.Q4_0, extra={"a.flag": True, "a.floats": [0.5, 2.0], "a.ints": [3, -4]})
    ours, theirs = GGUFFile(tmp_path / "m.gguf"), GGUFReader(tmp_path / "m.gguf")
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = ours.metadata[key]
            assert value == (pytest.approx(field.contents()) if isinstance(value, float) else field.contents()), key
    assert ours.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert (found.offset, found.size, found.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert ours.rows(found, 0, 1).tobytes() == tensor.data.reshape(-1)[: tensor.data.shape[-1]].tobytes()


def test_a_float_is_the_shortest_decimal_of_its_32_bits(tmp_path: Path):
    write_gguf(tmp_path / "m.gguf")
    assert GGUFFile(tmp_path / "m.gguf").metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5


def test_every_truncation_is_noticed(tmp_path: Path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    header = GGUFFile(path).tensors["token_embd.weight"].offset
    for size in [*range(0, header, 37), header, header + 1000, len(whole) - 33]:
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptModelError, match=r"m\.gguf"):
            GGUFFile(path)


def test_random_damage_to_the_header_is_noticed_or_harmless(tmp_path: Path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    header = GGUFFile(path).tensors["token_embd.weight"].offset
    chance = random.Random(0)
    seen = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(header)] = chance.choice([0, 255, chance.randrange(256)])
        path.write_bytes(damaged)
        try:
            GGUFFile(path)
        except (CorruptModelError, UnsupportedModelError):
            seen += 1
    assert seen > 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "can not be read"),
        (b"GGML" + bytes(100), "does not start with GGUF"),
        (START + struct.pack("<QQ", 0, 2**63), "truncated or damaged"),
        (START + struct.pack("<QQ", 2**63, 0), "truncated or damaged"),
        (START + struct.pack("<QQQ", 0, 1, 2**63) + bytes(50), "truncated or damaged"),
        (START + struct.pack("<QQQ1sI", 0, 1, 1, b"k", 77) + bytes(50), "unknown type 77"),
        (START + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 0, 2**62) + bytes(50), "truncated or damaged"),
        (START + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 8, 2**62) + bytes(50), "truncated or damaged"),
        (START + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 9, 1) + bytes(50), "array of unknown type 9"),
        (START + struct.pack("<QQQ1sIB", 0, 1, 1, b"\xff", 0, 1) + bytes(50), "not UTF-8"),
        (START + struct.pack("<QQ", 0, 2) + 2 * struct.pack("<Q1sIB", 1, b"k", 0, 1), "is there twice"),
        (START + struct.pack("<QQQ1sI", 1, 0, 1, b"t", 9) + bytes(99), "9 dimensions"),
        (START + struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 0, 0, 0) + bytes(99), "impossible shape"),
        (START + struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 33, 8, 0) + bytes(99), "impossible shape"),
        (START + struct.pack("<QQQ1sIQQIQ", 1, 0, 1, b"t", 2, 2**40, 2**40, 0, 0) + bytes(99), "t ends at byte"),
        (START + struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 4, 0, 2**63) + bytes(99), "t ends at byte"),
    ],
)
def test_lies_in_the_header_are_refused_at_once(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CorruptModelError, match=message):
        GGUFFile(tmp_path / "m.gguf")


def test_versions_and_tensor_types_that_are_not_known_are_unsupported(tmp_path: Path):
    path = tmp_path / "m.gguf"
    for content in (
        b"GGUF" + struct.pack("<I", 1) + bytes(99),
        b"GGUF" + struct.pack(">I", 3) + bytes(99),
        START + struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 4, 999, 0) + bytes(99),
    ):
        path.write_bytes(content)
        with pytest.raises(UnsupportedModelError):
            GGUFFile(path)


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path):
    with pytest.raises(ModelNotFoundError, match="no file"):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(ModelNotFoundError, match="no file"):
        convert_gguf(tmp_path / "none.gguf")
