"""Cases of the ``dkv`` folder."""

from __future__ import annotations

from dcache.policies.dkv import DKVCache
from dcache.policy import CachePolicy
from dcache.testing.golden.loop import LoopCase


class DKVCase(LoopCase):
    """A run of dKV-Cache."""

    @property
    def unsupported(self) -> str | None:
        """Variants that are not installed."""
        if self.data["method"] != "dkv-cache-decode":
            return f"method {self.data['method']!r} is not installed"
        return super().unsupported

    def policy(self) -> CachePolicy:
        """The recorded variant."""
        return DKVCache(interval=self.settings["cache_reloading_step"])
