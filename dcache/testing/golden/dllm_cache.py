"""Cases of the ``dllm_cache`` folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dcache.decode import decode
from dcache.engine import Engine
from dcache.policies.dllm_cache import DLLMCache
from dcache.policy import CachePolicy
from dcache.testing.golden.base import LOGITS_TOLERANCE, Stored, close, equal
from dcache.testing.golden.fast_dllm import span
from dcache.testing.golden.loop import LoopCase
from dcache.testing.golden.unmaskers import recorded_unmasker
from dcache.trace import Step

SIMILARITY_TOLERANCE = 1e-5  # absolute, as the folder's README states
TIED = 1e-5  # a gap between the last selected similarity and the first refused one that rounding may close
WRITTEN_BY = {"K": "k_written", "V": "v_written", "A": "q_rows", "F": "ffn_rows"}  # store to field of the record


class DLLMCacheCase(LoopCase):
    """A run of dLLM-Cache: what every layer computed, wrote and selected, in every step."""

    @property
    def unsupported(self) -> str | None:
        """Forward calls that commit nothing turn the released counters; here they are not made."""
        s = self.settings
        if s.get("cfg_scale") and (s.get("cfg_interval_steps") or 1) > 1:
            return "cfg_interval_steps above 1 is not reproduced: both sequences of a guided text share their steps"
        if "remasking" in s and (s["prompt_interval_steps"], s["gen_interval_steps"]) != (1, 1):
            blocks = s["gen_length"] // s["block_length"]
            if s["steps"] // blocks > s["block_length"]:
                return "idle steps of LLaDA's schedule turn the released counters, and are not made here"
        return super().unsupported

    def policy(self) -> CachePolicy:
        """The recorded settings."""
        s = self.settings
        return DLLMCache(
            prompt_interval=s["prompt_interval_steps"],
            gen_interval=s["gen_interval_steps"],
            transfer_ratio=s["transfer_ratio"],
        )

    def check(self) -> None:
        """Commits, final canvases, rows, selections, similarities and logits; and the uncached run."""
        model = self.model((self.file.parent / self.data["weights"]).resolve(), self.data["mask_id"], self.end_ids)
        state, watched = (
            self._state(model, self.pads),
            Stored(recorded_unmasker(self.data, model.spec.vocab_size), WRITTEN_BY),
        )
        trace = decode(Engine(model.transformer, self.policy(), watched, maps=True, debug=True), state)
        self._compare_commits(trace)
        self._compare_final("final", state, self.pads)
        for i, (step, recorded) in enumerate(zip(trace, self.steps, strict=True)):
            for b, pad in enumerate(self.pads):
                if step.active[b]:
                    self._compare_layers(step, recorded, b, pad)
                    self._compare_stores(watched.stores[max(i - 1, 0) : i + 1], recorded, b, pad)
                    self._compare_logits(i, watched, recorded, b, pad)
        if self.data.get("no_cache_final"):
            self._check_uncached()

    def _compare_layers(self, step: Step, recorded: Mapping[str, Any], b: int, pad: int) -> None:
        """Rows computed and values written; a tie in the selection is excused."""
        for at, layer in enumerate(recorded["layers"]):
            where = f"step {recorded['step']}, sequence {b}, layer {at}"
            written = np.flatnonzero(step.maps["kv_rows"][at, b]).tolist()
            equal(f"{where}: rows of new values", written, _rows(layer, "v_written", b, pad))
            rows = np.flatnonzero(step.maps["rows"][at, b]).tolist()
            if (gap := layer.get("gap")) is not None and gap < TIED:
                equal(f"{where}: number of rows computed", len(rows), len(_rows(layer, "q_rows", b, pad)))
            else:
                equal(f"{where}: rows computed", rows, _rows(layer, "q_rows", b, pad))

    def _compare_stores(self, stores: list[dict[str, Tensor]], recorded: Mapping[str, Any], b: int, pad: int) -> None:
        """What a step left alone keeps its bits; its similarities are those of the values before and after it."""
        before, after = stores[0], stores[-1]
        for at, layer in enumerate(recorded["layers"]):
            where = f"step {recorded['step']}, sequence {b}, layer {at}"
            tied = layer.get("gap") is not None and layer["gap"] < TIED
            for name, field in WRITTEN_BY.items() if before is not after and not tied else ():
                old, new = (x[name][at, b, ..., : len(self.data["final"][b]) - pad, :] for x in (before, after))
                moved = (old.view(torch.int32) != new.view(torch.int32)).any(-1)
                found = (moved.any(0) if moved.dim() == 2 else moved).nonzero().flatten().tolist()
                allowed = _rows(layer, field, b, pad)
                equal(f"{where}: rows of {name} changed beside {field}", sorted(set(found) - set(allowed)), [])
            if layer.get("similarity") is not None:
                begin = len(self.data["prompt"][b]) - pad
                told = torch.tensor(layer["similarity"][b])
                old, new = (x["V"][at, b, :, begin : begin + len(told)].transpose(0, 1).flatten(1) for x in stores)
                close(f"{where}: similarity", cosine_similarity(old, new, dim=-1), told, SIMILARITY_TOLERANCE)

    def _compare_logits(self, i: int, watched: Stored, recorded: Mapping[str, Any], b: int, pad: int) -> None:
        number = recorded["step"]
        if (logits := self.tensors.get(f"logits.{number}")) is None or self.settings.get("cfg_scale"):
            return  # of a guided text they were recorded apart
        for n, p in enumerate(span(self.data["logits_rows"][str(number)])):
            if p >= pad and (now := watched.of_row(i, b, p - pad)) is not None:
                close(f"step {number}, sequence {b}, row {p}: logits", now, logits[b, n], LOGITS_TOLERANCE)


def _rows(layer: Mapping[str, Any], field: str, b: int, pad: int) -> list[int]:
    """Positions of a recorded list of sequence `b`, ascending and without left padding."""
    return sorted(p - pad for p in span(layer[field][b]) if p >= pad)
