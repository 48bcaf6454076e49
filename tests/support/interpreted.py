"""Triton's interpreter, without looking for its builtins anew at each call of a device function: half of its time.

Call after TRITON_INTERPRET is set and before a kernel runs. It changes a private function of Triton 3.8, and nothing
where there is none.
"""

from __future__ import annotations

import inspect
from typing import Any


def look_for_builtins_once() -> None:
    from triton.language import core
    from triton.runtime import interpreter

    private: Any = interpreter
    if not hasattr(private, "_patch_builtin"):
        return
    known: dict[Any, list[tuple[str, Any]]] = {}

    def patch(package: Any, builder: Any, scope: Any) -> None:
        if package not in known:
            known[package] = [each for each in inspect.getmembers(package) if core.is_builtin(each[1])]
        for name, member in known[package]:
            if getattr(package, name) is member:  # not changed by a call around this one
                private._patch_attr(package, name, member, builder, scope)

    private._patch_builtin = patch
