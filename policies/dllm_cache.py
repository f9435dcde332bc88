"""dLLM-Cache: refresh the prompt rarely, the response often, and in between the response rows whose values moved most.

Liu et al., "dLLM-Cache: Accelerating Diffusion Large Language Models with Adaptive Caching", arXiv 2506.06295; released
code maomaocun/dLLM-cache. Features of the prompt hardly change, those of most response rows change slowly. Beside K and
V, each layer keeps what attention and MLP added to the stream, so a row that is not computed still passes through the
layer: its stored increments are added to what came in, and logits exist for every row at every step.

============================  ==========================================================================
``K_p`` (steps)               ``prompt_interval``; the prompt is refreshed when ``state.step`` divides by it
``K_r`` (steps)               ``gen_interval``, for the response: the whole generation, never a block
``rho``                       ``transfer_ratio``: share of the response in a partial update
``AttnOut``, ``FFNOut``       stores "A" and "F", before the residual is added
due                           set "due": rows that a refresh computes in this step
v-verify                      `_changed`: lowest cosine of the new value and the stored one
============================  ==========================================================================

Departures: the released code counts forward calls per layer in a process-wide object; here every sequence has its own
step. Its layer 0 computes every row in every step, which the paper does not say; that is the default here, and
``first_layer=scheduled`` treats layer 0 like the others. Values that differ by rounding alone count as equal, and ties
go to the lowest position, where the released order is arbitrary. Cosines are taken in float32. Keys are stored rotated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dcache.arrays import Ints
from dcache.kernels.cosine import cosine
from dcache.kernels.rows import take
from dcache.kernels.select import ascending, find, lowest
from dcache.models.transformer import ModelSpec
from dcache.policy import CachePolicy, Plan, PolicyConfig, State

if TYPE_CHECKING:
    from dcache.engine.layer import Layer

UNCHANGED = 1 - 1e-6  # a cosine in float32 above this is 1 but for rounding


class DLLMCache(CachePolicy):
    """Intervals for prompt and response; between them, the rows whose values moved most."""

    class Config(PolicyConfig):
        """Knobs of `DLLMCache`; defaults of the released demo for LLaDA."""

        prompt_interval: int = Field(100, ge=1, le=2**31 - 1, description="steps between two refreshes of the prompt")
        gen_interval: int = Field(7, ge=1, le=2**31 - 1, description="steps between two refreshes of the response")
        transfer_ratio: float = Field(
            0.25,
            ge=0,
            description="share (0 to 1) of the response rows computed between its refreshes, rounded down; 0 and "
            "above 1 switch partial updates off, values included",
        )
        first_layer: Literal["always", "scheduled"] = Field(
            "always", description="layer 0: refreshed at every step, as released, or like the others"
        )

    paper = "dLLM-Cache: Accelerating Diffusion Large Language Models, arXiv 2506.06295"
    pairs_with = "low-confidence"
    exact = "prompt_interval=1,gen_interval=1"
    config: Config

    def stores(self, spec: ModelSpec) -> dict[str, int]:
        """What attention (A) and MLP (F) added to the stream."""
        return {"A": spec.d_model, "F": spec.d_model}

    def plan(self, state: State) -> Plan:
        """All rows are the stream; "due" are those of the regions whose interval is over.

        The kind is the largest number of rows that a sequence selects in a partial update; None if none makes one.
        """
        knobs, generated = self.config, state.valid & ~state.prompt
        refresh = state.step % knobs.gen_interval == 0  # (batch,), the response
        due = state.prompt & (state.step % knobs.prompt_interval == 0)[:, None] | generated & refresh[:, None]
        partial = state.active & ~refresh & (0 < knobs.transfer_ratio <= 1)
        if not partial.any():
            return Plan(state.valid, None, sets={"due": due})
        compared = generated & partial[:, None]
        count: Ints = np.where(partial, state.gen_length * knobs.transfer_ratio, 0).astype(np.int64)
        sets, flags = {"due": due, "values": due | compared}, {"compared": compared, "count": count}
        return Plan(state.valid, int(count.max()), sets=sets, flags=flags)

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Compute some rows, and let all pass: ``h + A + F``, fresh for the computed ones, stored for the others."""
        if at.index == 0 and self.config.first_layer == "always":
            return at.compute(rows, h)
        computed = at.sets["due"] if at.kind is None else self._changed(at, rows, h)
        if computed.shape[1]:
            x = take(h, find(rows, computed))
            if at.kind is None:
                q = at.refresh(computed, x)
            else:  # their values are written
                q, k = at.project(computed, x, "qk")
                at.write(computed, k=k)
            o = at.output(at.attend(computed, q))
            at.store("A", computed, o)
            at.store("F", computed, at.ffn(x + o))
        return rows, h + at.stored("A", rows) + at.stored("F", rows)

    @staticmethod
    def _changed(at: Layer, rows: Tensor, h: Tensor) -> Tensor:
        """Replace the values of all rows that are due or compared; returns the rows to compute (batch, due + bound).

        These are the rows that are due, and of each sequence the ``count`` compared ones with the lowest cosine of the
        new value and that of the step before, over all kv heads together.
        """
        due, where, bound = at.sets["due"], at.sets["values"], at.kind
        assert isinstance(bound, int)
        (v,) = at.project(where, take(h, find(rows, where)), "v")
        past = at.stored("V", where)
        at.write(where, v=v)
        if not bound:
            return due
        compared = at.flags["compared"].gather(1, where)
        score = cosine(v, past).clamp_max(UNCHANGED).masked_fill(~compared, torch.inf)  # (batch, values)
        index, real = lowest(score, at.flags["count"], bound)
        chosen = where.gather(1, index).masked_fill(~real, at.dump)
        return ascending(torch.cat([due, chosen], dim=1))[0]
