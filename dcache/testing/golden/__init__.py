"""Recorded runs of the published methods, and the check that dcache reproduces them.

One module per folder of ``tests/golden``: it knows how the settings of that recording are written as a policy and an
unmasker. `cases` finds the runs below a folder; each checks itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from dcache.errors import UsageError
from dcache.models.files import one_line
from dcache.testing.golden.base import Case
from dcache.testing.golden.d2 import D2Case
from dcache.testing.golden.dkv import DKVCase
from dcache.testing.golden.dllm_cache import DLLMCacheCase
from dcache.testing.golden.elastic import ElasticCase
from dcache.testing.golden.fast_dllm import FastDLLMCase
from dcache.testing.golden.loop import NoCacheCase
from dcache.testing.golden.spa import SPACase
from dcache.testing.golden.sparse_dllm import SparseDLLMCase

METHODS: dict[str, type[Case]] = {
    "none": NoCacheCase,
    "dkv-cache-decode": DKVCase,
    "dkv-cache-greedy": DKVCase,
    "dkv-cache-prefill": DKVCase,
    "dkv-cache-pd": DKVCase,
    "elastic-cache": ElasticCase,
    "fast_dllm": FastDLLMCase,
    "d2-cache": D2Case,
    "dllm_cache": DLLMCacheCase,
    "sparse_dllm": SparseDLLMCase,
    "spa": SPACase,
}
"""Recorded method to the class that checks it."""


def cases(root: Path) -> Iterator[Case]:
    """All recorded runs below `root`, in order of path; those of methods that are not listed are left out.

    Raises:
        UsageError: for a JSON file that cannot be read.
    """
    for file in sorted(path for path in root.rglob("*.json") if path.is_file()):
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{file} is not readable JSON: {one_line(error)}; repair it, or move it away") from None
        if not isinstance(data, dict) or "steps" not in data or "settings" not in data:
            continue
        method = data.get("method")
        if isinstance(method, str) and method in METHODS:
            yield METHODS[method](file, data)


__all__ = ["METHODS", "Case", "cases"]
