"""The conditions of a measurement, as found."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

import dcache
from dcache.bench.reports import Conditions
from dcache.conditions import device_name, version_of
from dcache.models.loading import Model

COMMIT = "DCACHE_COMMIT"
PATIENCE_S = 10


def conditions(device: torch.device, dtype: torch.dtype, model: Model | None = None) -> Conditions:
    """Versions, device and model."""
    on_gpu = device.type == "cuda"
    return Conditions(
        dcache=dcache.__version__,
        commit=commit(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=version_of("triton"),
        cuda=torch.version.cuda,
        device=device.type,
        device_name=device_name(device),
        driver=driver() if on_gpu else None,
        threads=None if on_gpu else torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        model=None if model is None else model.name,
        n_parameters=None if model is None else model.spec.n_parameters,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def commit() -> str | None:
    """The commit of the checkout that runs; DCACHE_COMMIT where the history did not come along."""
    if given := os.environ.get(COMMIT):
        return given
    root = Path(dcache.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    found = _said("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    changed = _said("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{found}+" if found and changed else found


def driver() -> str | None:
    """Version of the GPU driver."""
    found = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _said(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
