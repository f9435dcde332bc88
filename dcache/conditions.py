"""The conditions of a run, as found: versions, device, and fingerprints of weights and prompts."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dcache.calls import write_value
from dcache.models.loading import Model
from dcache.plugins import plugins
from dcache.policy import CachePolicy, Filter
from dcache.unmasking.base import Unmasker

SAMPLE = 16


def cpu_name() -> str:
    """The processor, as well as the system knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def device_name(device: torch.device) -> str:
    """The GPU's or the CPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def fingerprint(data: bytes) -> str:
    """Sixteen hexadecimal digits."""
    return blake2b(data, digest_size=8).hexdigest()


def weights_of(model: Model) -> str:
    """Fingerprint of the first and last weights of every tensor: tells checkpoints apart at no cost."""
    ends = [torch.cat([p.flatten()[:SAMPLE], p.flatten()[-SAMPLE:]]) for p in model.transformer.parameters()]
    return fingerprint(torch.cat(ends).to(torch.float32).cpu().numpy().tobytes())


def prompt_of(ids: Sequence[int], answer: str | None, images: Sequence[Any] = ()) -> str:
    """Fingerprint of a prompt, its Pillow images and its reference answer."""
    shown = [(image.mode, image.size, fingerprint(image.tobytes())) for image in images]
    return fingerprint(repr((list(ids), answer, *shown)).encode())


def written(plugin: CachePolicy | Unmasker) -> str:
    """A policy or unmasker as one would write it: its name and the knobs that differ from the defaults."""
    name = plugin.name or type(plugin).__name__
    fields = type(plugin.config).model_fields
    values = {k: getattr(plugin.config, k) for k in fields}
    if isinstance(plugin, Filter):
        values["inner"] = written(plugin.inner)
    usual = {k: field.get_default(call_default_factory=True) for k, field in fields.items()}
    changed = {k: v for k, v in values.items() if k not in usual or v != usual[k]}
    knobs = ",".join(f"{k}={_value(v)}" for k, v in changed.items())
    return f"{name}({knobs})" if knobs else name


def _value(value: object) -> str:
    return write_value(value) if isinstance(value, bool | int | float | str | None) else str(value)


def source_of(policy: CachePolicy) -> str:
    """The distribution of a registered policy; the module of any other."""
    entry = plugins().policies.entries.get(policy.name)
    return entry.source if entry is not None and entry.thing is type(policy) else type(policy).__module__
