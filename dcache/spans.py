"""Keys and values of a prompt span: taken from the stores of a request or computed alone, put into those of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcache.reuse import content_key
from dcache.state import Embeddings, Span, State

if TYPE_CHECKING:
    from dcache.engine.layer import Layer
    from dcache.engine.network import Network, Weights

MATRICES = ("q", "k", "v", "out", "gate", "up", "down")
SAMPLE = 64  # values of each matrix that tell models apart


BATCH = (
    "what two prompts of a batch share is computed for the first of them, so accounts differ from those of single runs"
)
ALONE: Mapping[str, str] = {
    "a_batch_decodes_each_sequence_as_if_it_were_alone": BATCH,
    "remasked_rows_are_decoded_again": BATCH,
    "every_unmasker_works_or_is_refused_with_a_reason": BATCH,
    "embeddings_of_tokens_decode_as_the_tokens": "rows that start from embeddings are computed without the prompt",
    "accounting_equals_a_counting_hook": "the hook sees passes, and not the call in which rows are computed alone",
}
"""Claims of `dcache.testing` that no policy makes which computes spans alone, each with the reason."""


class Kept(NamedTuple):
    """Keys and values of a span, each (layers, kv_heads, n, head_dim), keys rotated for positions from `start`."""

    start: int
    k: Tensor
    v: Tensor

    @property
    def n_bytes(self) -> int:
        """Bytes of both."""
        return self.k.nbytes + self.v.nbytes


def weights_key(weights: Weights) -> str:
    """A hash that tells models apart: of their spec and device, and of a sample of every matrix."""
    layers = range(weights.spec.n_layers)
    sample = torch.cat([weights.weight(layer, name)[0, :SAMPLE] for layer in layers for name in MATRICES])
    return content_key(weights.spec, weights.device, sample)


def keep(net: Network, b: int, span: Span) -> Kept:
    """Copies of what sequence `b` has in its stores now; nothing is read by the host."""
    where = (b, slice(None), slice(span.start, span.stop))
    k, v = (torch.stack([layer.stores[name][where] for layer in net.layers]) for name in "KV")
    return Kept(span.start, k, v)


def alone(net: Network, b: int, given: Embeddings, span: Span) -> Kept:
    """What a span of sequence `b` is behind the preamble alone, as in every prompt; a forward call, in `begin`."""
    first = int(np.searchsorted(given.positions, span.start))
    rows = given.values[first : first + span.stop - span.start]
    before = net.embed(given.preamble)
    mine = slice(len(before), None)
    k, v = (x[:, :, mine].clone() for x in net.alone(b, torch.cat([before, rows.to(before)]), images=mine))
    return Kept(len(before), k, v)


def preload(net: Network, state: State, hits: Sequence[tuple[int, Span, Kept]]) -> None:
    """Put kept keys and values of sequences into a batch, in `begin`; keys are rotated by as much as a span moved."""
    rows = np.zeros_like(state.valid)
    for b, span, _ in hits:
        rows[b, span.start : span.stop] = True
    shape = (net.batch, net.spec.n_kv_heads, int(rows.sum(1).max()), net.spec.head_dim)
    for index, layer in enumerate(net.layers if hits else ()):
        k, v = (torch.zeros(shape, device=net.device, dtype=net.dtype) for _ in "kv")
        for b, span, kept in hits:
            begin = int(rows[b, : span.start].sum())
            place = slice(begin, begin + span.stop - span.start)
            k[b, :, place] = moved(layer, kept.k[index], span.start - kept.start)
            v[b, :, place] = kept.v[index]
        net.preload(index, rows, k, v)


def moved(layer: Layer, k: Tensor, by: int) -> Tensor:
    """Rotated keys (kv_heads, n, head_dim) as they are `by` positions further on; rotated in float32.

    To the left, a rotation by a negative angle is one of the mirrored key by the positive angle, mirrored again.
    """
    if by == 0:
        return k
    mirror = torch.ones(k.shape[-1], device=k.device)
    if by < 0:
        mirror[k.shape[-1] // 2 :] = -1
    where = torch.full((1, k.shape[1]), abs(by), dtype=torch.int64, device=k.device)
    return (layer.rope((k.to(torch.float32) * mirror)[None], where)[0] * mirror).to(k.dtype)
