"""Typed look-ups in metadata that a model brings along: what is missing or nonsensical is named in the error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from gapless.errors import CorruptModelError, ModelNotFoundError

MAX_JSON_BYTES = 256 * 2**20  # the largest real tokenizer.json is about 35 MB


class Fields:
    """Reads typed values from `raw`; `where` names the file in errors. None counts as absent, as in config.json."""

    def __init__(self, raw: Mapping[str, object], where: str) -> None:
        self.raw = raw
        self.where = where

    def integer(self, name: str, default: int | None = None, *, low: int = 1, high: int = 2**31 - 1) -> int:
        """An integer within [low, high]. Raises CorruptModelError."""
        value = self.raw.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.missing(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.bad(name, f"an integer between {low} and {high}")
        return value

    def number(self, name: str, default: float | None = None, *, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number above `low` and at most `high`. Raises CorruptModelError."""
        value = self.raw.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.missing(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
            raise self.bad(name, f"a number above {low:g} and at most {high:g}")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A finite number, or None where there is none. Raises CorruptModelError."""
        value = self.raw.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.bad(name, "a finite number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false. Raises CorruptModelError."""
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.bad(name, "true or false")
        return value

    def text(self, name: str) -> str | None:
        """A string, or None where there is none. Raises CorruptModelError."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, str):
            raise self.bad(name, "a string")
        return value

    def items(self, name: str) -> list[object] | None:
        """A list, or None where there is none. Raises CorruptModelError."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, list):
            raise self.bad(name, "a list")
        return cast("list[object] | None", value)

    def table(self, name: str) -> Fields | None:
        """A nested object, or None where there is none. Raises CorruptModelError."""
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.bad(name, "an object")
        return Fields(cast("dict[str, object]", value), f"{self.where}: {name}")

    def ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One token id or a list of them, each below vocab_size; () where there is none. Raises CorruptModelError."""
        value = self.raw.get(name)
        if value is None:
            return ()
        listed: list[object] = cast("list[object]", value) if isinstance(value, list) else [value]
        found: list[int] = []
        for each in listed:
            if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < vocab_size:
                raise self.bad(name, f"token ids below the vocabulary size {vocab_size}")
            found.append(each)
        return tuple(dict.fromkeys(found))

    def missing(self, name: str) -> CorruptModelError:
        """The error for a field that has to be there."""
        return CorruptModelError(f"{self.where}: {name} is missing")

    def bad(self, name: str, wanted: str) -> CorruptModelError:
        """The error for a field with a value that makes no sense."""
        return CorruptModelError(f"{self.where}: {name} must be {wanted}, not {_short(self.raw.get(name))}")


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises ModelNotFoundError if there is no file, CorruptModelError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CorruptModelError(f"{path} is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"there is no {path.name} in {path.parent}") from error
    except OSError as error:
        raise CorruptModelError(f"{path} can not be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptModelError(f"{path} is not valid JSON") from error
    if not isinstance(value, dict):
        raise CorruptModelError(f"{path} must hold a JSON object")
    return cast("dict[str, object]", value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
