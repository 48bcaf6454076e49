"""Where converted models are kept, and how a folder there is made whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gapless.errors import ModelError

_HASHED_BYTES = 2**20
_STALE_SECONDS = 24 * 3600
_UNFINISHED = ".unfinished-"


def cache_folder() -> Path:
    """GAPLESS_CACHE, else XDG_CACHE_HOME/gapless, else ~/.cache/gapless. The folder may not exist yet."""
    if own := os.environ.get("GAPLESS_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "gapless"
    return Path.home() / ".cache" / "gapless"


def content_key(path: Path, version: str) -> str:
    """Identifies a file by its size, its time of change and its first MiB, together with what is made of it."""
    stat = path.stat()
    digest = hashlib.sha256(f"{version} {stat.st_size} {stat.st_mtime_ns} ".encode())
    with path.open("rb") as file:
        digest.update(file.read(_HASHED_BYTES))
    return digest.hexdigest()[:20]


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The cache's folder `name`, filled by `build` if it is not there yet.

    `build` fills a temporary folder that is renamed at the end, so nobody ever sees half of it: not after Ctrl-C, not
    from a second process (both build, the first to finish wins). Raises ModelError when the cache can not be written.
    """
    final = cache_folder() / name
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(final.parent)
        unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=final.parent))
        try:
            build(unfinished)
            _publish(unfinished, final)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelError(
            f"the converted model can not be written to {final.parent}: {reason}; "
            "set GAPLESS_CACHE to a folder with room"
        ) from error
    return final


def _publish(unfinished: Path, final: Path) -> None:
    unfinished.chmod(0o755)
    try:
        unfinished.rename(final)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not final.is_dir():
            raise


def _remove_stale(folder: Path) -> None:
    """What a killed process left behind."""
    for left in folder.glob(_UNFINISHED + "*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
