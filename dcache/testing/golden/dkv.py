"""Cases of the ``dkv`` folder."""

from __future__ import annotations

from dcache.policies.dkv import DKVCache
from dcache.policies.none import NoCache
from dcache.policy import CachePolicy
from dcache.testing.golden.loop import LoopCase


class DKVCase(LoopCase):
    """A run of dKV-Cache."""

    @property
    def unsupported(self) -> str | None:
        """One rule of the released code commits token 0, by way of NaN."""
        if self.settings.get("shift_type") == "right":
            return "shift_type 'right' commits token 0 through NaN in the released code, which is not reproduced"
        return super().unsupported

    def policy(self) -> CachePolicy:
        """The recorded variant; prefill states no interval, and one without a shift no rule for it."""
        s = self.settings
        if False in (s.get("enable_cache"), s.get("use_cache")):
            return NoCache()
        knobs = {
            "variant": self.data["method"].removeprefix("dkv-cache-"),
            "interval": s.get("cache_reloading_step") or s.get("cache_steps"),
            "neighbours": s.get("window_size"),
            "cacheable": s.get("shift_type"),
        }
        return DKVCache(**{name: value for name, value in knobs.items() if value is not None})
