"""Tests that run on any policy: golden traces of the published methods, and the conformance kit.

`Conformance` is all that a plugin's author needs: see ``docs/how-to/verify-a-policy.md``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcache.testing.kit import Conformance, hold
    from dcache.testing.runs import Canvas
    from dcache.testing.subject import Exact, Subject

HOMES = {"Conformance": "kit", "hold": "kit", "Canvas": "runs", "Exact": "subject", "Subject": "subject"}


def __getattr__(name: str) -> Any:
    """The kit needs hypothesis, and says so when it is asked for; the rest of the package does not."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)


__all__ = ["Canvas", "Conformance", "Exact", "Subject", "hold"]
