"""A virtual environment for each client, under .clients/, made anew when its requirements change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CLIENTS = ROOT / ".clients"

# What pip says of a package that its index does not have; of an index that does not answer it says the other, too.
_NOT_THERE = "No matching distribution found"
_NO_ANSWER = "Retrying ("


class ClientError(Exception):
    """A client failed, or got what it should not."""


class NotInstalledError(ClientError):
    """Its packages can not be had here."""


def environment(name: str) -> Path:
    """Its folder of programs, with what scripts/clients/NAME.txt lists. Raises NotInstalledError."""
    folder, wanted = CLIENTS / name, (HERE / f"{name}.txt").read_text()
    stamp = folder / "installed.txt"
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        for line in wanted.splitlines():  # one after the other: torch first, as the build that the index offers
            done = subprocess.run([*pip, line], stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode != 0:
                kind = NotInstalledError if _NOT_THERE in done.stderr and _NO_ANSWER not in done.stderr else ClientError
                raise kind(f"pip can not install {line}: {done.stderr.strip()}")
        stamp.write_text(wanted)
    return folder / "bin"


def variables(**more: str) -> dict[str, str]:
    """The environment of a client: no hub, no telemetry, and nothing of this one's Python."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GAPLESS_"))}
    return kept | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", **more}
