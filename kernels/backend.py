"""Which implementation of an operation runs: its Triton kernel on a GPU, its torch twin elsewhere.

Every op has a twin ``op_ref``, which defines the result, a launcher ``op_triton``, and ``op``, which chooses. The twin
also runs where a gradient is wanted, since kernels have none, and everywhere with ``DCACHE_KERNELS=torch`` in the
environment: the way to find out whether a kernel is to blame for a difference.
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

__all__ = ["CHOICES", "ENABLED", "HAVE_TRITON", "on_hopper", "tl", "triton", "use_triton"]

HAVE_TRITON = isinstance(triton.__version__, str)
CHOICES = ("triton", "torch")


def use_triton(x: Tensor) -> bool:
    """Whether the kernel runs for `x`; there is nothing to launch for no rows."""
    return x.is_cuda and ENABLED and x.numel() > 0 and not torch.is_grad_enabled()


@lru_cache
def on_hopper(device: torch.device) -> bool:
    """Whether `device` is of compute capability 9: it has a copy engine and 227 KB of shared memory per processor."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _enabled() -> bool:
    choice = os.environ.get("DCACHE_KERNELS", "triton")
    if choice not in CHOICES:
        raise ImportError(f"DCACHE_KERNELS is {choice!r}, expected one of {', '.join(CHOICES)}")
    return HAVE_TRITON and choice == "triton"


ENABLED = _enabled()
