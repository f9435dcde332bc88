"""Shadow rows: a mask at a position that holds a token, seen by nobody but shadows, over the keys of the pass."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dcache.decode import decode
from dcache.engine import Engine
from dcache.models.transformer import Transformer
from dcache.plugins import make_policy
from dcache.state import State
from dcache.testing.models import random_model
from dcache.testing.recorder import Recorder
from dcache.unmasking.base import Ask, Asked, Picks, Sampling
from dcache.unmasking.confidence import LowConfidence


class Shadowed(LowConfidence):
    """Also asks for shadows of what it has committed, and keeps their logits."""

    def begin(self, net: Any, state: State) -> None:
        super().begin(net, state)
        self.kept: list[dict[tuple[int, int], Tensor]] = []

    def ask(self, state: State) -> Ask:
        ask = super().ask(state)
        return Ask(ask.window, flags=ask.flags, shadow=state.known & ~state.prompt)

    def pick(self, logits: Tensor, at: Asked) -> Picks:
        assert at.shadow is not None
        assert at.shadow_logits is not None
        self.last = at.shadow.clone(), at.shadow_logits.clone(), at.lanes.clone()
        return super().pick(logits, at)

    def settle(self, state: State, seen: Any) -> Any:
        shadow, logits, lanes = self.last
        real = {(int(lanes[b]), int(p)): logits[b, i] for b, row in enumerate(shadow) for i, p in enumerate(row)}
        self.kept.append({at: x for at, x in real.items() if at[1] < state.slots})
        return super().settle(state, seen)


def dense(model: Transformer, tokens: list[int], shadows: list[int]) -> Tensor:
    """The same as one forward over sequence and shadows, with an explicit mask; logits of the shadows."""
    n, k, spec = len(tokens), len(shadows), model.spec
    place = torch.tensor([*range(n), *shadows])
    seen = torch.zeros(n + k, n + k, dtype=torch.bool)
    seen[:, :n] = True
    seen[n:, n:] = True
    for i, p in enumerate(shadows):
        seen[n + i, p] = False
    h = model.embed(torch.tensor([[*tokens, *[spec.mask_id] * k]]))
    cos, sin = model.angles(place[None])
    for block in model.blocks():
        q, key, value = block.project(block.normed(h), cos, sin)
        o = scaled_dot_product_attention(q, key, value, attn_mask=seen, enable_gqa=True)
        h = h + block.output(o.transpose(1, 2).flatten(2))
        h = h + block.ffn(h)
    return model.logits(h)[0, n:]


def test_shadows_equal_a_dense_forward_with_an_explicit_mask() -> None:
    model = random_model(3)
    unmasker = Shadowed(sampling=Sampling(after_end="decode"))
    state = State(model.spec, [[3, 1, 4], [1, 5, 9, 2, 6]], [7, 4])
    canvases = []
    inner = state.apply

    def apply(update: Any, seen: Any) -> None:
        canvases.append(state.tokens.copy())
        inner(update, seen)

    state.apply = apply  # type: ignore[method-assign]
    decode(Engine(model, make_policy("none"), unmasker, debug=True), state)
    compared = 0
    for tokens, kept in zip(canvases, unmasker.kept, strict=True):
        for b in range(2):
            positions = sorted(p for lane, p in kept if lane == b)
            if positions:
                expected = dense(model, tokens[b, : state.lengths[b]].tolist(), positions)
                found = torch.stack([kept[b, p] for p in positions])
                torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
                compared += len(positions)
    assert compared == sum(range(7)) + sum(range(4))


def test_shadows_change_nothing_but_the_bill() -> None:
    model = random_model(4)
    sampling = Sampling(after_end="decode")
    for policy in ("none", "dkv(interval=3)", "elastic(gamma=0.97)"):
        runs = []
        for kind in (LowConfidence, Shadowed):
            state = State(model.spec, [[3, 1, 4], [1, 5]], [7, 9])
            runs.append(decode(Engine(model, make_policy(policy), kind(sampling=sampling), debug=True), state))
        plain, shadowed = runs
        for a, b in zip(plain, shadowed, strict=True):
            assert (a.commit == b.commit).all()
            assert (a.rows == b.rows).all()
        extra = sum(int(b.row_layers.sum() - a.row_layers.sum()) for a, b in zip(plain, shadowed, strict=True))
        passes = sum(range(7)) + sum(range(9))  # known rows of either sequence, step by step
        assert extra >= passes * model.spec.n_layers


def test_shadows_can_be_recorded() -> None:
    model = random_model(5)

    class Quiet(LowConfidence):
        def ask(self, state: State) -> Ask:
            return replace(super().ask(state), shadow=state.known & ~state.prompt)

    states = [State(model.spec, [[3, 1, 4], [1, 5]], [7, 9]) for _ in range(3)]
    engine = Engine(model, make_policy("none"), Quiet(), buckets=(8, 64), executor=Recorder())
    traces = [decode(engine, state) for state in states]
    for a, b in zip(traces[0], traces[-1], strict=True):
        assert (a.commit == b.commit).all()
    assert np.array_equal(states[0].tokens, states[2].tokens)
