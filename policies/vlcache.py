"""VLCache: an image that comes again brings its keys and values along.

VLCache, arXiv 2512.12977; the choice of rows to compute all the same, and the probe for it, are those of ACache, arXiv
2608.26140. A filter: it takes rows out of every plan of an inner policy, which says when anything is computed.

=======================  ===============================================================================
KV cache, hash           ``spans``: keys and values by content (`Span.key`), weights and length
first request (VLCache)  ``fill=first``: what is kept is what the first pass of the first request found
affix alone (ACache)     ``fill=alone``: keys and values of the image behind the fixed preamble, nothing else in sight
``r``, ``rho``           ``ratio``: share of an image's rows that are computed all the same, rounded up
first tokens (VLCache)   ``select=first``
anchors (ACache)         ``select=mask-attention``: the rows that masks attend to most, all layers together
probe forward (ACache)   the first pass of a request, without any row of a known image; `review` adds the anchors
=======================  ===============================================================================

With ``fill=alone`` each request treats an image alike, whatever came before. With ``fill=first`` the order of requests
matters: attention is bidirectional, so what is kept depends on all of the first prompt. Either is an approximation.

Departures: a row's importance is its share of the whole attention, not of a softmax over it and its like (ACache). One
set of rows serves all layers (VLCache: a share for each). Rows that predict the window are computed in any case. Text
spans (ACache) are not reused.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dcache.arrays import Bools, highest
from dcache.errors import UsageError
from dcache.policy import CachePolicy, Filter, FilterConfig, Plan, Seen, State
from dcache.reuse import ReuseCache
from dcache.spans import ALONE, Kept, alone, keep, preload, weights_key
from dcache.state import Embeddings, Span

if TYPE_CHECKING:
    from dcache.engine.layer import Layer
    from dcache.engine.network import Network, Weights
    from dcache.models.transformer import ModelSpec
    from dcache.unmasking.base import Unmasker

NAME: Final = "vlcache"
MASKS, ATTENTION = f"{NAME} masks", f"{NAME} attention"
ROUNDS = 1e-9  # a share of 0.1 of 30 rows is 3 rows, not 4


class VLCache(Filter):
    """Reuse of image keys and values across requests.

    Args:
        inner, config, knobs: as for every filter.
        spans: what outlives a request, to be shared with other policy objects; its own by default.
    """

    class Config(FilterConfig):
        """Knobs of `VLCache`."""

        inner: str = Field("fast-dllm", description="the policy that is wrapped, written as everywhere")
        ratio: float = Field(0.05, ge=0, le=1, description="share of a known image's rows that are computed, 0 to 1")
        select: Literal["mask-attention", "first"] = Field(
            "mask-attention", description="which: those that masks attend to most, for a pass more; or the first ones"
        )
        fill: Literal["alone", "first"] = Field(
            "alone", description="keys and values of a new image: alone, in a call of its own; or in its first request"
        )
        budget_mib: int = Field(4096, ge=0, le=2**31 - 1, description="MiB of keys and values that outlive a request")

    paper = "VLCache, arXiv 2512.12977; ACache, arXiv 2608.26140"
    pairs_with = "threshold(threshold=0.9)"
    exact = "inner=none,ratio=1"
    remembers = "fill=first"
    config: Config
    _sum: Tensor  # of a pass: what its masks attend to, layers so far; (batch, slots + 1)

    def __init__(
        self,
        inner: CachePolicy | str | None = None,
        config: Config | None = None,
        *,
        spans: ReuseCache[Kept] | None = None,
        **knobs: Any,
    ):
        super().__init__(inner, config, **knobs)
        self.spans = ReuseCache[Kept](self.config.budget_mib * 2**20) if spans is None else spans
        self.saved = 0

    @property
    def statistics(self) -> dict[str, int]:
        """Those of `spans`, and by how many row-layers fewer were computed than the inner plans had."""
        return {**self.spans.statistics, "saved_row_layers": self.saved}

    def exempt(self) -> Mapping[str, str]:
        """What does not hold where the same rows by themselves stand for rows of the prompt."""
        return {**super().exempt(), **(ALONE if self.config.fill == "alone" else {})}

    def refuses(self, spec: ModelSpec, unmasker: Unmasker) -> str | None:
        """Outputs kept for every row are missing for one that was never computed."""
        if own := set(self.inner.stores(spec)) - {"H", "Q"}:
            told = f"replays outputs of rows that it does not compute (stores {', '.join(sorted(own))})"
            return f"{self.inner.name} {told}, and a reused row has none; wrap one that computes the rows of its plans"
        return super().refuses(spec, unmasker)

    def prepare(self, weights: Weights) -> None:
        """Tell models apart by a sample of every matrix."""
        super().prepare(weights)
        self.model = weights_key(weights)

    @torch.inference_mode()
    def begin(self, net: Network, state: State) -> None:
        """Preload the images that are known; note the others."""
        super().begin(net, state)
        self.reused: Bools = np.zeros_like(state.valid)  # rows whose keys and values are those that were kept
        self.probing: Bools = np.zeros(state.batch, dtype=bool)  # sequences whose anchors have yet to be chosen
        spans = [(b, given, span) for b, given in enumerate(state.embeddings) if given for span in given.spans]
        if spans and net.layers[0].compact:
            raise UsageError(f"policy {NAME!r} needs the keys of whole images, and inner={self.inner.name} frees some")
        found = [(b, span, *self._find(net, b, given, span)) for b, given, span in spans if self.config.ratio < 1]
        hits = [(b, span, kept) for b, span, _, kept in found if kept is not None]
        self.missed = [(b, span, key) for b, span, key, kept in found if kept is None]
        self.known = [(b, span) for b, span, _ in hits]
        self.net: Network | None = net if self.missed else None  # held until the images that were missed are kept
        for b, span in self.known:
            anchors = self._count(span) if self.config.select == "first" else 0
            self.reused[b, span.start + anchors : span.stop] = True
            self.probing[b] = self.config.select != "first" and self._count(span) > 0
        preload(net, state, hits)

    def restrict(self, state: State, plan: Plan) -> Plan:
        """All but the reused rows; in the probe, what masks attend to."""
        if not self.known:
            return plan
        skipped = self.reused & ~state.needed
        depth = state.spec.n_layers - (0 if plan.start is None else plan.start)
        self.saved += int(((plan.row_mask & skipped & state.active[:, None]).sum(1) * depth).sum())
        probe = bool(self.probing.any())
        flags = {name: flag for name, flag in plan.flags.items() if name != MASKS}  # a review may hand on those of plan
        flags |= {MASKS: state.masked & self.probing[:, None]} if probe else {}
        sets = {name: mask & ~skipped for name, mask in plan.sets.items()}
        marks = {**plan.marks, NAME: probe}
        return replace(plan, row_mask=plan.row_mask & ~skipped, sets=sets, flags=flags, marks=marks)

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The inner layer; in the probe, attention of the masks per key, all layers together."""
        out = self.inner.layer(at, rows, h)
        if at.marks.get(NAME):
            assert at.q is not None
            assert at.q_rows is not None
            received = at.received(at.q, at.flags[MASKS].gather(1, at.q_rows))
            self._sum = self._sum + received if at.index else received
            if at.last:
                at.report(ATTENTION, self._sum, per_layer=False)
        return out

    @torch.inference_mode()
    def review(self, state: State, plan: Plan, seen: Seen) -> Plan | None:
        """After the first pass: keep what it found of new images; choose anchors of known ones, and compute them."""
        self._keep(plan)
        if not self.probing.any():
            return super().review(state, plan, seen)
        anchors = np.zeros_like(self.reused)
        for b, span in self.known:
            image = np.zeros_like(self.reused)
            image[b, span.start : span.stop] = True
            anchors |= highest(seen.reports[ATTENTION][:, :-1], image, self._count(span))
        self.reused &= ~anchors
        probed, self.probing = self.probing & state.active, np.zeros_like(self.probing)
        again = super().review(state, plan, seen)
        mine = replace(plan, row_mask=(plan.row_mask | anchors) & probed[:, None])
        return self.restrict(state, mine) if again is None else again

    def _keep(self, plan: Plan) -> None:
        """Copy keys and values of the images that this pass computed."""
        for b, span, key in self.missed:
            assert self.net is not None
            if plan.row_mask[b, span.start : span.stop].all():
                kept = keep(self.net, b, span)
                self.spans.put(key, kept, kept.n_bytes)
        self.missed, self.net = [], None

    def _count(self, span: Span) -> int:
        """Rows of a known image that are computed."""
        return int(np.ceil(self.config.ratio * (span.stop - span.start) - ROUNDS))

    def _find(self, net: Network, b: int, given: Embeddings, span: Span) -> tuple[Hashable, Kept | None]:
        """Under which key an image is kept, and what; ``fill=alone`` computes it if nothing is."""
        n, by_itself = span.stop - span.start, self.config.fill == "alone"
        key = self.model, span.key, n, given.preamble if by_itself else None
        kept = self.spans.get(key)
        if kept is None and by_itself:
            kept = alone(net, b, given, span)
            self.spans.put(key, kept, kept.n_bytes)
            self.saved -= (len(given.preamble) + n) * (net.spec.n_layers - 1)
        return key, kept
