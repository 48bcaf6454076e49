"""Writing one .safetensors file piece by piece: the library's own writer wants all tensors in memory at once.

The format is a length (u64), a JSON header and the bytes: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gapless.config import Dtype
from gapless.errors import InternalError

_NAMES: dict[Dtype, tuple[str, int]] = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}


def write_safetensors(
    path: Path,
    layout: Mapping[str, tuple[Dtype, tuple[int, ...]]],
    pieces: Iterable[tuple[str, Iterator[np.ndarray[Any, Any]]]],
) -> None:
    """Write the tensors of `layout` (name -> dtype and shape) in its order; `pieces` gives each one's rows in parts.

    Memory stays at one part. The file is on the disk when this returns. Raises OSError, InternalError for parts that
    do not add up to the layout.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    sizes: dict[str, int] = {}
    at = 0
    for name, (dtype, shape) in layout.items():
        code, width = _NAMES[dtype]
        sizes[name] = width * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, at + sizes[name]]}
        at += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (expected, size), (name, parts) in zip(sizes.items(), pieces, strict=True):
            written = sum(file.write(np.ascontiguousarray(part).data) for part in parts)
            if name != expected or written != size:
                raise InternalError(f"{name}: {written} bytes written where {expected} has {size}")
        file.flush()
        os.fsync(file.fileno())
