"""Tiny trained checkpoints that come with the package, in the published format of their family, and their training."""

from pathlib import Path

from dcache.errors import ModelError

_HERE = Path(__file__).resolve().parent
NAMES = tuple(sorted(file.parent.name for file in _HERE.glob("*/config.json")))
"""The checkpoints beside this file."""


def folder(name: str) -> Path:
    """Return the folder of a shipped checkpoint."""
    if name not in NAMES:
        raise ModelError(f"no shipped checkpoint is called {name!r}; there are: {', '.join(NAMES)}")
    return _HERE / name
