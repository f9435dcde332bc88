"""Sparse-dLLM: once per block, evict the keys that the block's queries want least.

Song et al., "Sparse-dLLM: Accelerating Diffusion LLMs with Dynamic Cache Eviction", arXiv 2508.02558, section 3;
released code OpenMOSS/Sparse-dLLM. Which keys outside a block matter to it is stable over its steps, and differs from
layer to layer. So each layer scores them by the queries of the block, once, and for the rest of the block the rows see
the best of them and the block itself. The choice waits for the block's second pass, since keys move most in the first.

==========================  =======================================================================================
``x``                       ``delay``: number, from 0, of the pass of a block that scores
states 0 and 1              the passes up to that one: everything is visible
state 2                     later passes of the block: what is kept, and the block
``C``                       set "sparse-dllm candidates": valid positions outside ``state.block``
``r``, ``k``                ``keep``; flag "sparse-dllm count", ``int(len(C) * keep)`` of each sequence
``kernel_size``             ``kernel``: max-pooling over C, in which the two neighbours of the block are neighbours
==========================  =======================================================================================

This is a filter: which rows are computed is up to ``inner``; as released, a dual block cache with two full passes.
Departures: each sequence of a batch has its own kept set; ties go to the leftmost position; under a logit shift the
default ``inner`` computes the rows that predict the block, where the released code computes the block and forces its
first position. Keys are hidden, and with ``compact`` freed too; an inner policy that does not compute all rows while
the filter makes up its mind is then refused. ``docs/policies/sparse-dllm.md`` has the rest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn.functional import max_pool1d

from dcache.arrays import Bools, Ints
from dcache.errors import UsageError
from dcache.kernels.select import lowest
from dcache.policy import Filter, FilterConfig, Plan, State

if TYPE_CHECKING:
    from dcache.engine.layer import Layer
    from dcache.engine.network import Network
    from dcache.models.transformer import ModelSpec
    from dcache.unmasking.base import Unmasker

NAME = "sparse-dllm"
SCORES, BLOCK, COUNT, CANDIDATES = (f"{NAME} {what}" for what in ("scores", "block", "count", "candidates"))
PUBLISHED: Final = "fast-dllm(full_passes={})"  # what is wrapped: a dual cache, and how many passes compute all rows


class SparseDLLM(Filter):
    """Dynamic eviction: visible keys chosen per block and layer."""

    class Config(FilterConfig):
        """Knobs of `SparseDLLM`; defaults of the released evaluation."""

        keep: float = Field(0.5, ge=0, le=1, description="share of the keys outside the block that stay (r), 0 to 1")
        kernel: int | None = Field(
            3, ge=1, le=2**31 - 1, description="scores are max-pooled over so many candidates, an odd number; none: not"
        )
        delay: int = Field(
            1, ge=0, le=2**31 - 2, description="number of the pass of a block, from 0, that scores and evicts behind it"
        )
        compact: bool = Field(False, description="free the evicted keys and values, rather than hide them")
        inner: str = Field(
            PUBLISHED.format(2), description="the policy that says which rows are computed; full_passes follows delay"
        )

        @field_validator("kernel")
        @classmethod
        def _odd(cls, kernel: int | None) -> int | None:
            if kernel is not None and kernel % 2 == 0:
                raise ValueError(f"a window of {kernel} candidates has no centre; give an odd number, or none")
            return kernel

        @model_validator(mode="after")
        def _inner_waits(self) -> SparseDLLM.Config:
            """As published, all rows are computed until the keys have been scored."""
            if "inner" not in self.model_fields_set:
                object.__setattr__(self, "inner", PUBLISHED.format(self.delay + 1))
            return self

    paper = "Sparse-dLLM: Accelerating Diffusion LLMs with Dynamic Cache Eviction, arXiv 2508.02558"
    pairs_with = "low-confidence"
    exact = "keep=1,inner=none"
    config: Config

    def refuses(self, spec: ModelSpec, unmasker: Unmasker) -> str | None:
        """A filter of this kind within another; compact where freed keys would be needed."""
        inner, delay = self.inner, self.config.delay
        while isinstance(inner, Filter):
            if isinstance(inner, SparseDLLM):
                return f"{NAME} within {NAME} would evict twice by the same rule; leave one of them out"
            inner = inner.inner
        if self.config.compact:
            if self.inner.opening() <= delay:
                return (
                    f"compact=true frees keys once a block has scored them, in its pass {delay}, and inner policy "
                    f"{self.inner.name!r} does not compute all rows anew in passes 0 to {delay} of each block; use "
                    f"{PUBLISHED.format(delay + 1)} or none, or hide keys without freeing them"
                )
            if unmasker.shadows or unmasker.config.window is not None:
                why = "reads all keys for its shadow rows" if unmasker.shadows else "slides over one block"
                return f"compact=true frees keys once per block, and unmasker {unmasker.name!r} {why}; leave it out"
        return super().refuses(spec, unmasker)

    def capacity(self, state: State) -> int | None:
        """Kept keys and the block, of the sequence that has most of both."""
        if not self.config.compact:
            return super().capacity(state)
        block = state.gen_length if state.block_length is None else np.full_like(state.lengths, state.block_length)
        return int((self._count(state.lengths - block) + block).max())

    def begin(self, net: Network, state: State) -> None:
        """Nothing is hidden."""
        super().begin(net, state)
        self.shown = net.buffer(f"{NAME} shown", (net.spec.n_layers, net.batch, 1, net.slots), torch.bool).fill_(True)
        self.room = self.capacity(state)

    @torch.inference_mode()
    def plan(self, state: State) -> Plan:
        """A block that begins sees everything."""
        for b in np.flatnonzero((state.block_step == 0) & state.active):
            self.shown[:, b].fill_(True)
        return super().plan(state)

    def restrict(self, state: State, plan: Plan) -> Plan:
        """Hide what was evicted; say which sequences score, and what."""
        scoring = state.active & (state.block_step == self.config.delay)
        hidden = state.active & (state.block_step > self.config.delay)
        plan = replace(plan, marks={**plan.marks, NAME: bool(scoring.any())})
        if scoring.any():
            candidates = state.valid & ~state.block & scoring[:, None]
            count = self._count(candidates.sum(1))
            self._fits(state, count, scoring)
            flags = {SCORES: scoring, BLOCK: state.block, COUNT: count}
            plan = replace(plan, sets={**plan.sets, CANDIDATES: candidates}, flags={**plan.flags, **flags})
        return replace(plan, visible=self._seen(plan.visible, scoring)) if hidden.any() else plan

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The inner layer; then the choice, which holds from the next pass on."""
        out = self.inner.layer(at, rows, h)
        if at.marks[NAME] and at.q is not None and at.sets[CANDIDATES].shape[1]:  # without queries nothing is hidden
            kept, scoring = self.choose(at, self.scores(at)), at.flags[SCORES] & at.live
            mine = self.shown[at.index].index_select(0, at.lanes)
            seen = torch.where(scoring[:, None], kept | at.flags[BLOCK][:, :-1], mine[:, 0])
            self.shown[at.index].index_copy_(0, at.lanes, seen[:, None])
            at.hold(seen, scoring)
            at.report("kept", kept & scoring[:, None])
        return out

    def scores(self, at: Layer) -> Tensor:
        """Section 3: the block's mean query on each candidate's key, mean over heads, pooled; (batch, candidates).

        Of a block of which no row is computed, all computed rows speak. What is hidden anyway, or padding, has -inf.
        """
        assert at.q is not None
        assert at.q_rows is not None
        computed, candidates = at.q_rows < at.dump, at.sets[CANDIDATES]
        block = at.flags[BLOCK].gather(1, at.q_rows)
        weight = torch.where(block.any(1, keepdim=True), block, computed).to(torch.float32)
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1)
        mean = torch.einsum("bhnd,bn->bhd", at.q.to(torch.float32), weight)[:, :, None]
        absent = candidates == at.dump
        if at.visible is not None:
            absent = absent | ~at.visible.any(1).gather(1, candidates.clamp_max(at.dump - 1))
        score = at.products(mean)[:, 0].gather(1, candidates).masked_fill(absent, float("-inf"))
        if self.config.kernel is None:
            return score
        pooled = max_pool1d(score[:, None], self.config.kernel, stride=1, padding=self.config.kernel // 2)[:, 0]
        return pooled.masked_fill(absent, float("-inf"))

    def choose(self, at: Layer, scores: Tensor) -> Tensor:
        """The best candidates, ties to the left: (batch, slots) bool."""
        candidates = at.sets[CANDIDATES]
        best, real = lowest(-scores, at.flags[COUNT], scores.shape[1])
        kept = torch.zeros(len(scores), at.dump + 1, dtype=torch.bool, device=scores.device)
        return kept.scatter_(1, candidates.gather(1, best), real)[:, :-1]

    def _count(self, candidates: Ints) -> Ints:
        """How many of so many candidates (batch,) are kept, rounded down."""
        return (candidates * self.config.keep).astype(np.int64)

    def _fits(self, state: State, count: Ints, scoring: Bools) -> None:
        """An unmasker may have blocks of its own, larger than those that room was made for."""
        most = int((count + state.block.sum(1))[scoring].max())
        if self.config.compact and self.room is not None and most > self.room:
            raise UsageError(f"compact=true has room for {self.room} keys, but a block needs {most}; leave it out")

    def _seen(self, visible: Bools | Tensor | None, scoring: Bools) -> Tensor:
        """What the inner policy shows and this filter has not evicted, on the device."""
        mine = self.shown
        if scoring.any():  # they see everything: before a second pass the first has made their choice
            mine = mine | torch.from_numpy(scoring).to(mine.device)[:, None, None]
        if visible is None:
            return mine
        shown = torch.from_numpy(visible).to(mine.device) if isinstance(visible, np.ndarray) else visible
        return (shown[:, None] if shown.dim() == 2 else shown) & mine
