"""Files that a command writes: whether they can be written, before there is anything to lose, and whose fault it is."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from gapless.errors import ConfigError


def check_target(path: Path, what: str) -> None:
    """Whether a file can be written there; it is left as it is. Raises ConfigError."""
    if path.is_dir():
        raise ConfigError(f"the {what} {path} is a folder, not a file")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent} for the {what}")
    there = path.exists()
    if there and not path.is_file():
        return  # to open a pipe may wait, or be seen by its reader
    try:
        path.open("ab").close()
    except OSError as error:
        raise ConfigError(f"the {what} {path} may not be written: {error.strerror}") from error
    if not there:
        path.unlink()


@contextmanager
def naming(file: object) -> Generator[None]:
    """An OSError of the block, such as that of a full disk, names the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
