# pyright: reportAttributeAccessIssue=false
"""Programmatic dependent launch: a kernel's programs may start while the kernel before it still runs.

A kernel that was launched with `dependent_launch()` calls `follow`: it waits until the kernel before it has ended, and
only then lets the kernel behind it start. So when a program starts, everything but the kernel right before it has
ended, and before `follow` a program may do what does not depend on that one: read weights, what an earlier kernel
wrote, or ask for memory to be brought into L2. (Were a kernel to let the next one start before its own wait, small
kernels could pile up, and a program would read what a kernel two before it has yet to write: tried, and wrong.)
An ordinary launch behind a dependent one waits for its end as always. NVIDIA from sm_90 on.
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
    """Wait until the kernels before have ended and their writes can be seen, then let the kernel behind start."""
    if DEPENDENT:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


def is_hopper() -> bool:
    """Whether the current device has dependent launches and bulk copies: sm_90 or newer."""
    return nvidia_arch() >= SINCE


def nvidia_arch() -> int:
    """Of the current device, 90 for sm_90; 0 where it is not NVIDIA's, and in the interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return 0
    return _arch_of(triton.runtime.driver.active.get_current_device())


@functools.cache
def _arch_of(_device: int) -> int:
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def dependent_launch() -> dict[str, bool]:
    """Launch options, and the constant that `follow` takes, for the current device."""
    return {"DEPENDENT": True, "launch_pdl": True} if is_hopper() else {"DEPENDENT": False}
