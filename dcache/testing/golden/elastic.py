"""Cases of the ``elastic`` folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from dcache.decode import decode
from dcache.engine import Engine
from dcache.models.transformer import ModelSpec
from dcache.policies.elastic import ElasticCache
from dcache.policies.none import NoCache
from dcache.state import State
from dcache.testing.golden.base import (
    CONFIDENCE_TOLERANCE,
    LOGITS_TOLERANCE,
    SIMILARITY_TOLERANCE,
    Case,
    Stored,
    close,
    equal,
)
from dcache.trace import Step
from dcache.unmasking.base import Sampling, Unmasker
from dcache.unmasking.confidence import LowConfidence, Threshold

SNAPSHOT_OF = "window_exceeds_gen"  # the case whose stores were recorded after one step
SNAPSHOT_TOLERANCE = 1e-3  # absolute; these two are stated in the folder's README
NORM_TOLERANCE = 1e-4


class ElasticCase(Case):
    """A case of the ``elastic`` folder."""

    @property
    def folder(self) -> Path:
        """Where the weights are: beside the case."""
        return self.file.parent

    def _unmasker(self) -> Unmasker:
        s, sampling = self.settings, Sampling(after_end="drop-once")
        if s["threshold"] is None:
            return LowConfidence(sampling=sampling, tokens_per_step=s["tokens_per_iter"], window=s["window_length"])
        return Threshold(sampling=sampling, threshold=s["threshold"], window=s["window_length"])

    def check(self) -> None:
        """Rows, picks, start layers, commits, accounts, similarities, logits, stores; and the uncached run."""
        s = self.settings
        model = self.model(self.folder, s["mask_id"], (s["eos_id"],))
        prompts = [self.data["prompt_ids"]]
        state = State(model.spec, prompts, s["gen_length"])
        policy = ElasticCache(gamma=s["gamma"], track_num=s["track_num"], block_caching=s["block_caching"])
        watched = Stored(self._unmasker(), "HQKV")
        engine = Engine(model.transformer, policy, watched, debug=True)
        trace = decode(engine, state)
        for step, recorded in zip(trace, self.data["steps"], strict=False):
            self._compare_step(step, recorded)
        equal("number of steps", len(trace), self.data["nfe"])
        equal("final canvas", state.tokens[0].tolist(), self.data["final_sequence"])
        self._compare_floats(trace, watched)
        self._compare_stores(watched.stores, model.spec)
        uncached = State(model.spec, prompts, s["gen_length"])
        steps = decode(Engine(model.transformer, NoCache(), self._unmasker()), uncached)
        reference = self.data["no_cache_reference"]
        equal("without cache: final canvas", uncached.tokens[0].tolist(), reference["final_sequence"])
        equal("without cache: number of steps", len(steps), reference["nfe"])

    def _compare_step(self, step: Step, recorded: Mapping[str, Any]) -> None:
        i, layers, total = recorded["step"], self.data["num_layers"], self.data["total_length"]
        equal(f"step {i}: rows", np.flatnonzero(step.rows[0]).tolist(), sorted(set(recorded["query"])))
        begun = -1 if i == 0 else layers if step.start is None else int(step.start[0])
        equal(f"step {i}: first refreshed layer", begun, recorded["start_layer"])
        dump = step.rows.shape[1]
        picks = [sorted(set(row.tolist()) - {dump}) for row in step.reports["picks"][:, 0]]
        equal(f"step {i}: picks by layer", picks, [sorted(row) for row in recorded["tracked_by_layer"]])
        committed = dict(zip(recorded["committed"], recorded["tokens"], strict=True))
        found = {int(p): int(step.tokens[0, p]) for p in np.flatnonzero(step.commit[0])}
        equal(f"step {i}: commits", found, committed)
        n_rows, begin = int(step.rows[0].sum()), max(begun, 0)
        queried = [n_rows + (total if begun > 0 and layer >= begin else 0) for layer in range(layers)]
        equal(f"step {i}: row-layers, both passes", step.row_layers[:, 0].tolist(), queried)
        fed = len(recorded["query"])  # Dream's code feeds a row twice that is both tracked and before a masked one
        published = [total if layer >= begin else fed for layer in range(layers)]
        equal(f"step {i}: row-layers as published", published, recorded["rows_per_layer"])

    def _compare_floats(self, trace: list[Step], watched: Stored) -> None:
        for step, recorded, logits in zip(trace, self.data["steps"], watched.logits, strict=True):
            i = recorded["step"]
            for layer, value in enumerate(recorded["similarity"]):
                if value is not None:
                    found = torch.tensor(float(step.reports["similarity"][layer, 0]))
                    close(f"step {i}, layer {layer}: similarity", found, torch.tensor(value), SIMILARITY_TOLERANCE)
            for position, value in zip(recorded["predict"], recorded["confidence"], strict=True):
                found = torch.tensor(float(step.confidence[0, position]))
                sure, best = logits[0][position].softmax(-1).max(-1)
                if best == self.settings["mask_id"]:  # never a candidate here; scored but not committed in the record
                    found = sure
                close(f"step {i}, row {position}: confidence", found, torch.tensor(value), CONFIDENCE_TOLERANCE)
            positions = self.tensors.get(f"step_{i:03d}.positions")
            if positions is not None:
                kept = torch.stack([logits[0][p] for p in positions.tolist()])
                close(f"step {i}: logits", kept, self.tensors[f"step_{i:03d}.logits"], LOGITS_TOLERANCE)

    def _compare_stores(self, stores: Sequence[Mapping[str, Tensor]], spec: ModelSpec) -> None:
        """Norms of the cached tensors where recorded, and all of them where a snapshot was taken."""
        total, repeated = self.data["total_length"], (spec.n_heads // spec.n_kv_heads) ** 0.5
        for held, recorded in zip(stores, self.data["steps"], strict=True):
            for layer, norms in enumerate(recorded.get("cache_norms") or ()):
                parts = [held[name][layer].narrow(-2, 0, total).norm() for name in "HQKV"]
                found = torch.stack([*parts[:2], parts[2] * repeated, parts[3] * repeated])  # as counted there
                where = f"step {recorded['step']}, layer {layer}: norms of x, q, k, v, relative"
                close(where, found / torch.tensor(norms), torch.ones(4), NORM_TOLERANCE)
        if self.data["case"] != SNAPSHOT_OF:
            return
        with safe_open(self.folder / "cache_snapshot.safetensors", "pt") as snapshot:
            held = stores[int(snapshot.metadata()["after_step"])]
            for layer in range(spec.n_layers):
                for name, part in zip("HQKV", "xqkv", strict=True):
                    found, expected = held[name][layer, 0], snapshot.get_tensor(f"layer_{layer}.{part}")
                    close(f"snapshot, layer {layer}: {part}", found.narrow(-2, 0, total), expected, SNAPSHOT_TOLERANCE)
