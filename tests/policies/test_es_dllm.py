from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dcache
from dcache import CachePolicy, Sampling, Unmasker
from dcache.models.transformer import Transformer
from dcache.policies.es_dllm import ESDLLM
from dcache.policies.fast_dllm import FastDLLM
from dcache.policies.none import NoCache
from dcache.testing import hold
from dcache.testing.models import random_model
from dcache.testing.runs import Canvas, Run, refusal, unmaskers
from dcache.testing.unmaskers import Remasking
from dcache.unmasking.confidence import LowConfidence, Threshold

ALL = Sampling(after_end="decode")
MASK = 31

canvases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2),
        "shift": st.sampled_from([0, 1]),
        "lengths": st.lists(st.tuples(st.integers(1, 7), st.sampled_from([4, 8, 12])), min_size=1, max_size=3),
        "block_length": st.sampled_from([None, 4]),
    }
)
knobs = st.fixed_dictionaries(
    {
        "first": st.sampled_from([None, 0, 1, "auto"]),
        "second": st.sampled_from([0, 1, 2, "auto"]),
        "share": st.sampled_from([0.1, 0.5, 0.7]),
        "alpha": st.sampled_from([0.0, 0.5, 1.0]),
        "refresh_every": st.sampled_from([None, 3]),
    }
)


def decoded(canvas: dict[str, Any], policy: CachePolicy, unmasker: Unmasker | None = None, **more: Any) -> Run:
    """Decode a drawn canvas with recompute maps."""
    sizes = canvas | {"lengths": tuple(canvas["lengths"])}
    unmasker = unmasker or LowConfidence(sampling=ALL)
    return Run(lambda: policy, Canvas(**sizes), unmasker=unmasker, maps=True, **more).go()


def layer_rows(run: Run, b: int = 0) -> list[list[list[int]]]:
    """Rows by step and layer."""
    return [[np.flatnonzero(layer).tolist() for layer in step.maps["rows"][:, b]] for step in run.steps(b)]


def assert_same_commits(a: Run, b: Run) -> None:
    assert [a.commits(i) for i in range(a.state.batch)] == [b.commits(i) for i in range(b.state.batch)]


# -- what it must equal -----------------------------------------------------------------------------------------------


@given(canvas=canvases, empty=st.sampled_from([{"first": None, "second": None}, {"share": 1.0}]))
def test_without_a_skip_it_is_the_dual_cache(canvas: dict[str, Any], empty: dict[str, Any]) -> None:
    run, dual = (decoded(canvas, policy) for policy in (ESDLLM(**empty), FastDLLM()))
    assert_same_commits(run, dual)
    assert [layer_rows(run, b) for b in range(run.state.batch)] == [
        layer_rows(dual, b) for b in range(dual.state.batch)
    ]


@given(canvas=canvases)
def test_a_full_pass_in_every_step_equals_no_cache(canvas: dict[str, Any]) -> None:
    assert_same_commits(decoded(canvas, ESDLLM(refresh_every=1)), decoded(canvas, NoCache()))


# -- the rule, by a second program ------------------------------------------------------------------------------------


class Literal:
    """ES-dLLM as the formulas read, for one sequence without padding, buckets or a batch: numbers, not masks."""

    def __init__(self, model: Transformer, prompt: list[int], gen: int, block: int, policy: ESDLLM):
        self.model, self.policy, self.config = model, policy, policy.config
        self.tokens, self.start, self.block = prompt + [MASK] * gen, len(prompt), block
        self.keys: list[Any] = [None] * model.spec.n_layers
        self.inputs: dict[int, dict[int, torch.Tensor]] = {}
        self.fragile = False  # a choice hung on rounding
        self.told: dict[int, float] = {}  # position to confidence of the previous step
        self.rows: list[list[list[int]]] = []
        self.commits: list[dict[int, int]] = []

    def go(self) -> "Literal":
        began = -1
        while MASK in self.tokens:
            masked = [p for p, token in enumerate(self.tokens) if token == MASK]
            start = self.start + (masked[0] - self.start) // self.block * self.block
            since, began = (0 if start != began else since + 1), start  # noqa: F821
            every = self.config.refresh_every
            full = since == 0 or (every is not None and since % every == 0)
            self.step(range(start, start + self.block), full)
        return self

    def step(self, block: range, full: bool) -> None:
        shift, n = self.model.spec.shift, len(self.tokens)
        window = [p for p in block if self.tokens[p] == MASK]
        needed = {p - shift for p in window}
        rows = list(range(n)) if full else [p - shift for p in block]
        h = self.model.embed(torch.tensor([[self.tokens[r] for r in rows]]))
        self.rows.append([])
        for index, layer in enumerate(self.model.blocks()):
            self.rows[-1].append(rows)
            before, now = self.inputs.setdefault(index, {}), dict(zip(rows, h[0], strict=True))
            moved = {r: self.moved(now[r], before[r]) for r in rows} if not full else {}
            before.update(now)
            h = self.layer(index, layer, rows, h)
            if not full and index in self.policy._layers(self.model.spec):
                on = self.survivors(rows, moved, needed, shift)
                h, rows = h[:, [rows.index(r) for r in on]], on
        logits = self.model.logits(h)[0]
        said = {r + shift: logits[i].softmax(-1) for i, r in enumerate(rows) if r in needed}
        self.told = {p: float(x[:MASK].max()) for p, x in said.items()}  # the mask, the last id, is no candidate
        best = max(sorted(self.told), key=lambda p: self.told[p])
        self.tokens[best] = int(said[best][:MASK].argmax())
        self.commits.append({best: self.tokens[best]})

    def layer(self, index: int, layer: Any, rows: list[int], h: torch.Tensor) -> torch.Tensor:
        q, k, v = layer.project(layer.normed(h), *self.model.angles(torch.tensor([rows])), "qkv")
        if self.keys[index] is None:
            self.keys[index] = k.clone(), v.clone()
        keys, values = self.keys[index]
        keys[:, :, rows], values[:, :, rows] = k, v
        group = q.shape[1] // keys.shape[1]
        scores = q @ keys.repeat_interleave(group, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
        o = (scores.softmax(-1) @ values.repeat_interleave(group, 1)).transpose(1, 2).flatten(2)
        h = h + layer.output(o)
        return h + layer.ffn(h)

    @staticmethod
    def moved(now: torch.Tensor, before: torch.Tensor) -> float:
        change = float((now - before).abs().sum() / (len(now) ** 0.5 * before.norm()))
        return 0.0 if change < 1e-5 else change  # rounding

    def survivors(self, rows: list[int], moved: dict[int, float], needed: set[int], shift: int) -> list[int]:
        alpha = self.config.alpha
        sure = {r: self.told.get(r + shift, 0.0) for r in rows}
        importance = {r: alpha * sure[r] + (1 - alpha) * moved[r] for r in rows}
        count = -int(-(len(rows) * self.config.share - 1e-9) // 1)
        ranked = sorted(rows, key=lambda r: (-importance[r], r))
        on = ranked[:count]
        margin = importance[ranked[count - 1]] - importance[ranked[count]] if count < len(rows) else 1.0
        self.fragile |= 0 < margin < 1e-5
        if not needed & set(on):
            on = [*ranked[: count - 1], min(needed & set(rows), key=lambda r: (-sure[r], r))]
        return sorted(on)


@given(
    seed=st.integers(0, 3), shift=st.sampled_from([0, 1]), prompt=st.integers(1, 6), blocks=st.integers(1, 3),
    width=st.sampled_from([3, 4, 8]), knobs=knobs,
)  # fmt: skip
@torch.inference_mode()
def test_rows_and_commits_are_those_of_the_formulas(
    seed: int, shift: int, prompt: int, blocks: int, width: int, knobs: dict[str, Any]
) -> None:
    policy, gen = ESDLLM(**knobs), blocks * width
    canvas = {"seed": seed, "shift": shift, "lengths": [(prompt, gen)], "block_length": width}
    run = decoded(canvas, policy)
    literal = Literal(Canvas(**canvas).model, Canvas(**canvas).state().tokens[0, :prompt].tolist(), gen, width, policy)
    literal.go()
    assume(not literal.fragile)
    assert layer_rows(run) == literal.rows
    assert run.commits() == literal.commits


def test_halves_and_quarters() -> None:
    """A block of 8: all rows up to the first designated layer and in it, then 4, and behind the second 2."""
    rows = layer_rows(decoded({"lengths": [(5, 16)], "block_length": 8, "n_layers": 5}, ESDLLM(first=1, second=2)))
    for n, layers in enumerate(rows):
        assert [len(layer) for layer in layers] == ([21] * 5 if n % 8 == 0 else [8, 8, 4, 2, 2])
        assert all(set(above) <= set(below) for below, above in pairwise(layers))


@pytest.mark.parametrize(("layers", "expected"), [(32, [4, 8]), (28, [3, 7]), (4, [0, 1]), (3, [0])])
def test_the_designated_layers_are_an_eighth_and_a_quarter_of_the_depth(layers: int, expected: list[int]) -> None:
    assert ESDLLM()._layers(random_model(0, n_layers=layers, n_heads=2, n_kv_heads=1, head_dim=2).spec) == expected


# -- it never stalls --------------------------------------------------------------------------------------------------


@settings(max_examples=5)
@given(canvas=canvases, knobs=knobs)
@pytest.mark.parametrize("unmask", unmaskers())
def test_every_step_commits_where_a_commit_is_due(unmask: str, canvas: dict[str, Any], knobs: dict[str, Any]) -> None:
    here = Canvas(**canvas | {"lengths": tuple(canvas["lengths"])}, unmask=unmask)
    if refusal(ESDLLM(**knobs), here) is None:
        hold("decodes_every_canvas_to_the_end", lambda: ESDLLM(**knobs), here)


@given(canvas=canvases, knobs=knobs)
def test_one_row_goes_on_where_none_of_the_window_would(canvas: dict[str, Any], knobs: dict[str, Any]) -> None:
    """A share so small that a single row survives: it predicts a masked position."""
    run = decoded(canvas, ESDLLM(**{**knobs, "share": 0.01, "second": 1}))
    for b in range(run.state.batch):
        for step, layers in zip(run.steps(b), layer_rows(run, b), strict=True):
            if len(layers[0]) < run.state.lengths[b]:
                assert layers[-1] == [p - canvas["shift"] for p in np.flatnonzero(step.commit[b])]


@given(canvas=canvases, knobs=knobs)
def test_a_row_put_back_is_decoded_again(canvas: dict[str, Any], knobs: dict[str, Any]) -> None:
    assert not decoded(canvas, ESDLLM(**knobs), Remasking(sampling=ALL)).state.masked.any()


# -- batches, refusals ------------------------------------------------------------------------------------------------


@given(canvas=canvases, knobs=knobs, threshold=st.sampled_from([0.3, 0.6]), buckets=st.sampled_from([(), (8, 64)]))
def test_a_batch_decodes_each_sequence_as_if_it_were_alone(
    canvas: dict[str, Any], knobs: dict[str, Any], threshold: float, buckets: tuple[int, ...]
) -> None:
    unmasker = Threshold(sampling=ALL, threshold=threshold)
    together = decoded(canvas, ESDLLM(**knobs), unmasker, buckets=buckets)
    for b in range(together.state.batch):
        alone = decoded(canvas, ESDLLM(**knobs), unmasker, only=b)
        assert layer_rows(together, b) == layer_rows(alone)
        assert together.commits(b) == alone.commits()


def test_an_order_drawn_beforehand_is_refused_unless_nothing_is_dropped() -> None:
    model = random_model(0)
    told = dcache.Model("random", model.spec, model)
    with pytest.raises(dcache.UsageError, match="order drawn beforehand, which may have been dropped"):
        dcache.generate(told, [[3, 1]], policy="es-dllm", unmask="random-order", gen_length=8)
    dcache.generate(told, [[3, 1]], policy="es-dllm(share=1)", unmask="random-order", gen_length=8)


def test_a_layer_that_does_not_exist_is_refused() -> None:
    model = random_model(0)
    told = dcache.Model("random", model.spec, model)
    with pytest.raises(dcache.UsageError, match="second=3 is no layer of this model, which has 3, numbered from 0"):
        dcache.generate(told, [[3, 1]], policy="es-dllm(second=3)", gen_length=8)
