"""Tensors from a folder of .safetensors files, one at a time; nothing here unpickles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gapless.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from gapless.weights.fields import Fields, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def iter_safetensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor (on the CPU, in its stored dtype, mapped from the file) of every tensor in the folder.

    Reads model.safetensors, or the shards that model.safetensors.index.json names. A tensor's memory is the file's
    own: copy what has to outlive a change of the file.
    Raises CorruptModelError for a shard that is missing, truncated, damaged, outside of the folder or without a
    tensor that the index promises; UnsupportedModelError for a folder with pickled weights only; ModelNotFoundError.
    """
    if (folder / SINGLE).exists():
        yield from _read(folder / SINGLE, None)
    elif (folder / INDEX).exists():
        for path, names in _shards(folder).items():
            yield from _read(path, names)
    else:
        raise _nothing_here(folder)


def _read(path: Path, names: list[str] | None) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a file, or those named. The library checks each offset against the header and the file's size."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            present = set(file.keys())
            for name in sorted(present) if names is None else names:
                if name not in present:
                    raise CorruptModelError(f"{path} lacks the tensor {name} that {INDEX} promises")
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise CorruptModelError(f"{path} is damaged or incomplete: {error}") from error
    except OSError as error:
        raise CorruptModelError(f"{path} can not be read: {error.strerror or error}") from error


def _shards(folder: Path) -> dict[Path, list[str]]:
    """Shard -> names of its tensors, in the index's order."""
    index = Fields(read_json(folder / INDEX), str(folder / INDEX))
    weight_map = index.table("weight_map")
    if weight_map is None:
        raise index.missing("weight_map")
    shards: dict[Path, list[str]] = {}
    for name, file in weight_map.raw.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CorruptModelError(f"{index.where}: {file!r} is not the name of a .safetensors file in this folder")
        shards.setdefault(folder / file, []).append(name)
    for path in shards:
        if not path.is_file():
            raise CorruptModelError(f"{path.name} is missing from {folder}, but {INDEX} names it")
    return shards


def _nothing_here(folder: Path) -> ModelNotFoundError | UnsupportedModelError:
    pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if pickled:
        return UnsupportedModelError(
            f"{folder} holds only pickled weights ({pickled[0].name}), which can run code when loaded: "
            "convert them to safetensors first"
        )
    return ModelNotFoundError(f"there is neither {SINGLE} nor {INDEX} in {folder}")
