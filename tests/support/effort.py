"""How much the tests do. `make test` keeps to what every change needs; with THOROUGH=1 they do all of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest

THOROUGH = os.environ.get("THOROUGH", "0") != "0"


def effort(usual: int, thorough: int) -> int:
    """So many rounds, steps or cases."""
    return thorough if THOROUGH else usual


def and_thoroughly(usual: Sequence[Any], more: Sequence[Any]) -> list[Any]:
    """Cases for `parametrize`: `more` only with THOROUGH=1."""
    rare = [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.thorough) for case in more]
    return [*usual, *rare]
