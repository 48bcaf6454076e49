"""The header of a GGUF file, read with every count, length and offset checked against the file's size.

The gguf package's own reader trusts the counts it finds: a damaged file can make it loop without end. The layout is
public: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gapless.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_FLOAT32 = 6


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One stored tensor. `shape` is in torch's order, rows first; `size` counts bytes from `offset` in the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int


class GGUFFile:
    """An open GGUF file: `metadata` by key, `tensors` by name, and the bytes of a tensor's rows.

    Raises ModelNotFoundError, CorruptModelError, and UnsupportedModelError for a version or a type not known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise ModelNotFoundError(f"there is no file {path}") from error
        except (OSError, ValueError) as error:  # ValueError: the file is empty
            raise CorruptModelError(f"{path} can not be read as a GGUF file: {error}") from error
        header = _Cursor(self._bytes, path)
        tensor_count, metadata_count = _counts(header)
        self.metadata: dict[str, object] = {}
        for _ in range(metadata_count):
            key = header.text()
            if key in self.metadata:
                raise CorruptModelError(f"{path}: the key {key} is there twice")
            self.metadata[key] = header.value(header.scalar(_U32))
        listed = [_tensor_info(header) for _ in range(tensor_count)]
        self.tensors = self._placed(listed, header.position)

    def rows(self, tensor: GGUFTensor, first: int, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """Bytes of `count` rows from row `first` on, [rows, bytes of a row]; a vector is one row."""
        rows = math.prod(tensor.shape[:-1])
        width = tensor.size // rows
        flat = np.frombuffer(self._bytes, np.uint8, count * width, tensor.offset + first * width)
        return flat.reshape(count, width)

    def _placed(self, listed: list[GGUFTensor], header_end: int) -> dict[str, GGUFTensor]:
        """Offsets from the start of the file instead of the data's, each tensor checked to lie within the file."""
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 2**20:
            raise CorruptModelError(f"{self.path}: general.alignment must be a power of two, not {alignment!r}")
        start = -(-header_end // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for tensor in listed:
            offset = start + tensor.offset
            if tensor.name in tensors:
                raise CorruptModelError(f"{self.path}: the tensor {tensor.name} is there twice")
            if offset + tensor.size > len(self._bytes):
                raise CorruptModelError(
                    f"{self.path} is truncated: {tensor.name} ends at byte {offset + tensor.size}, "
                    f"the file at {len(self._bytes)}"
                )
            tensors[tensor.name] = GGUFTensor(tensor.name, tensor.shape, tensor.kind, offset, tensor.size)
        return tensors


class _Cursor:
    """Reads little-endian values one after the other and never past the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0

    def take(self, size: int) -> int:
        """Step over `size` bytes; the position before them."""
        before = self.position
        if size > len(self.data) - before:
            raise CorruptModelError(f"{self.path} is truncated or damaged: its header runs past the end of the file")
        self.position = before + size
        return before

    def scalar(self, kind: struct.Struct) -> int:
        (value,) = kind.unpack_from(self.data, self.take(kind.size))
        return value

    def text(self) -> str:
        size = self.scalar(_U64)
        at = self.take(size)
        try:
            return self.data[at : at + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptModelError(f"{self.path} is damaged: a text in its header is not UTF-8") from error

    def value(self, kind: int) -> object:
        """A metadata value: int, float, bool, str, or a list of one of them."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(self.scalar(_U32), self.scalar(_U64))
        if kind not in _SCALARS:
            raise CorruptModelError(f"{self.path} is damaged: its header has a value of unknown type {kind}")
        return _short_float(self.scalar(_SCALARS[kind])) if kind == _FLOAT32 else self.scalar(_SCALARS[kind])

    def _array(self, kind: int, count: int) -> list[object]:
        if kind == _STRING:
            if count > (len(self.data) - self.position) // _U64.size:
                self.take(len(self.data) + 1)
            return [self.text() for _ in range(count)]
        scalar = _SCALARS.get(kind)
        if scalar is None:
            raise CorruptModelError(f"{self.path} is damaged: its header has an array of unknown type {kind}")
        at = self.take(count * scalar.size)
        values = np.frombuffer(self.data, np.dtype(scalar.format), count, at)
        return values.tolist()


def _counts(header: _Cursor) -> tuple[int, int]:
    """Number of tensors and of metadata values."""
    at = header.take(len(_MAGIC))
    if header.data[at : at + len(_MAGIC)] != _MAGIC:
        raise CorruptModelError(f"{header.path} is not a GGUF file: it does not start with GGUF")
    version = header.scalar(_U32)
    if version not in (2, 3):
        raise UnsupportedModelError(
            f"{header.path}: GGUF version {version} is not supported (2 and 3 in little-endian order are)"
        )
    return header.scalar(_U64), header.scalar(_U64)


def _tensor_info(header: _Cursor) -> GGUFTensor:
    name = header.text()
    dimensions = header.scalar(_U32)
    if not 1 <= dimensions <= 4:
        raise CorruptModelError(f"{header.path}: {name} has {dimensions} dimensions")
    columns_first = [header.scalar(_U64) for _ in range(dimensions)]
    number = header.scalar(_U32)
    offset = header.scalar(_U64)
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise UnsupportedModelError(f"{header.path}: {name} has the unknown type {number}") from error
    block, block_bytes = GGML_QUANT_SIZES[kind]
    elements = math.prod(columns_first)
    if elements == 0 or columns_first[0] % block:
        raise CorruptModelError(f"{header.path}: {name} has the impossible shape {columns_first} for {kind.name}")
    return GGUFTensor(name, tuple(reversed(columns_first)), kind, offset, elements // block * block_bytes)


def _short_float(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for 9.99999974e-06."""
    return float(str(np.float32(value)))
