"""Which implementation of an operation runs: its Triton kernel on a GPU, its torch twin elsewhere.

Every op has a twin ``op_ref``, which defines the result, a launcher ``op_triton``, and ``op``, which chooses. The twin
also runs where a gradient is wanted, since kernels have none, and everywhere with ``DCACHE_KERNELS=torch`` in the
environment: the way to find out whether a kernel is to blame for a difference.

From compute capability 9.0 on, kernels use programmatic dependent launch: the blocks of one are put on the processors
while the kernel before it in its stream still runs, and wait there, which hides most of the time between the two.
``DCACHE_PDL=0`` in the environment switches it off. Every kernel is launched with ``**pdl(x)`` and calls ``begin(PDL)``
before it touches memory: one that is launched so and does not wait would read what is not yet written.
"""

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform

    class _Missing:
        """Lets kernel modules be imported; decorators return the function, and nothing can be launched."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *given: Any, **more: Any) -> Any:
            return given[0] if given and callable(given[0]) else self

    triton = tl = _Missing()

__all__ = ["ENABLED", "HAVE_TRITON", "begin", "pdl", "tl", "triton", "use_triton"]

HAVE_TRITON = isinstance(triton.__version__, str)
CAPABLE = (9, 0)  # the least compute capability with programmatic dependent launch


def use_triton(x: Tensor) -> bool:
    """Whether the kernel runs for `x`."""
    return x.is_cuda and ENABLED and not torch.is_grad_enabled()


def pdl(x: Tensor) -> dict[str, bool]:
    """Launch arguments of a kernel on the device of `x`: whether it may start before its predecessor has ended."""
    return {"launch_pdl": True, "PDL": True} if OVERLAP and x.is_cuda and _capable(x.device) else {"PDL": False}


@lru_cache
def _capable(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= CAPABLE


@triton.jit
def begin(PDL: tl.constexpr):
    """Wait until the kernels before this one have ended and their writes are visible; then let the next one come.

    Kernels wait one for another, so that a chain of them is in order. The next one may come right away, since it waits
    for the end of this one; and not before the wait, so that no more than one kernel sits waiting.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def _chosen(variable: str, choices: tuple[str, ...]) -> str:
    """What the environment says; the first of `choices` if nothing."""
    choice = os.environ.get(variable, choices[0])
    if choice not in choices:
        raise ImportError(f"{variable} is {choice!r}, expected one of {', '.join(choices)}")
    return choice


ENABLED = _chosen("DCACHE_KERNELS", ("triton", "torch")) == "triton" and HAVE_TRITON
OVERLAP = _chosen("DCACHE_PDL", ("1", "0")) == "1"
