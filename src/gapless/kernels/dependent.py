# pyright: reportAttributeAccessIssue=false
"""Programmatic dependent launch: a kernel's programs may start while the kernel before it still runs.

A kernel that was launched with `dependent_launch()` calls `follow` before it touches anything but weights, which no
step writes. So whatever ran before has ended by then, since every kernel before has waited in the same way or was an
ordinary launch; and an ordinary launch behind it waits for its end as always. NVIDIA from sm_90 on.
https://docs.nvidia.com/cuda/cuda-c-programming-guide/#programmatic-dependent-launch-and-synchronization
"""

from __future__ import annotations

import functools
import os

import triton
import triton.language as tl
from triton.language.extra import cuda

SINCE = 90  # sm_90


@triton.jit
def follow(DEPENDENT: tl.constexpr) -> None:
    """Let the kernel behind start, and wait until those before have ended and their writes can be seen."""
    if DEPENDENT:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()


@functools.cache
def is_hopper() -> bool:
    """Whether the current device has dependent launches and bulk copies: sm_90 or newer."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= SINCE


def dependent_launch() -> dict[str, bool]:
    """Launch options, and the constant that `follow` takes, for the current device."""
    return {"DEPENDENT": True, "launch_pdl": True} if is_hopper() else {"DEPENDENT": False}
