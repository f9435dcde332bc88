import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dcache
from dcache import CachePolicy, Sampling, State, UsageError
from dcache.budgets import PROFILES, Budget
from dcache.decode import decode
from dcache.engine import Engine, Weights
from dcache.plugins import load_model, make_policy
from dcache.policies.none import NoCache
from dcache.policies.spa import SPACache
from dcache.proxies import Proxies, folder, proxy, value_proxies
from dcache.testing.golden.base import Watched
from dcache.testing.models import random_model
from dcache.trace import Step
from dcache.unmasking.confidence import LowConfidence

MODEL = random_model(0, n_layers=4)
SHIFTED = random_model(0, n_layers=4, shift=1)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
TABLES = Path(__file__).parents[1] / "golden" / "spa" / "update_ratio_tables.json"
PUBLISHED = {"LLaDA-8B-Instruct": "llada-8b", "LLaDA-1.5": "llada-1.5", "Dream-v0-Instruct-7B": "dream-7b"}


def go(policy: CachePolicy, model: Any = MODEL, prompts: Any = (PROMPT,), gen: Any = 12, **more: Any) -> list[Step]:
    unmasker = LowConfidence(sampling=Sampling(after_end="decode"), **more)
    engine = Engine(model, policy, unmasker, maps=True, debug=True)
    return decode(engine, State(model.spec, list(prompts), gen))


def written(trace: list[Step], b: int = 0) -> list[dict[int, int]]:
    return [{int(p): int(s.tokens[b, p]) for p in np.flatnonzero(s.commit[b])} for s in trace if s.active[b]]


def rows(trace: list[Step], b: int = 0) -> list[list[list[int]]]:
    return [[np.flatnonzero(layer).tolist() for layer in s.maps["rows"][:, b]] for s in trace if s.active[b]]


def logits(policy: CachePolicy, model: Any) -> list[dict[int, torch.Tensor]]:
    """Of every position, by step."""
    watched = Watched(LowConfidence(sampling=Sampling(after_end="decode")))
    decode(Engine(model, policy, watched, debug=True), State(model.spec, [PROMPT], 12))
    return [step[0] for step in watched.logits]


def same(one: CachePolicy, other: CachePolicy, **more: Any) -> None:
    first, second = go(one, **more), go(other, **more)
    assert rows(first) == rows(second)
    assert written(first) == written(second)


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", json.loads(TABLES.read_text())["tables"], ids=lambda t: f"{t['model']}-{t['shape']}")
def test_published_tables_of_update_ratios(table: dict[str, Any]) -> None:
    given = {f"{name}_ratio": table[f"{name}_update_ratio"] for name in ("max", "avg", "min")}
    knobs = {name: value for name, value in given.items() if value is not None}
    budget = Budget(profile=PUBLISHED[table["model"]], budget=table["shape"], **knobs)
    np.testing.assert_allclose(budget.of(len(table["ratio"]), 0), table["ratio"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("peak_at", [0.0, 0.3, 1.0])
def test_a_curve_rises_to_its_peak_and_falls_from_it(peak_at: float) -> None:
    budget = Budget(peak_at=peak_at, start=0.1, peak=0.4, end=0.2, max_ratio=0.8, min_ratio=0)
    ratios = budget.of(100, 0)
    top = int(ratios.argmax())
    assert abs(top / 100 - peak_at) < 0.011
    assert (np.diff(ratios[: top + 1]) > 0).all()
    assert (np.diff(ratios[top:]) < 0).all()
    assert ratios[0] == pytest.approx(0.2 if peak_at else 0.8)


def test_a_ratio_is_at_most_one_whatever_the_mean() -> None:
    assert Budget(avg_ratio=0.9).of(32, 0).max() == 1.0


def test_the_largest_ratio_goes_before_the_mean() -> None:
    np.testing.assert_array_equal(Budget(max_ratio=0.3, avg_ratio=0.1).of(8, 0), Budget(max_ratio=0.3).of(8, 0))


def test_the_profile_follows_the_logit_shift_of_the_model() -> None:
    assert Budget().curve(0) == PROFILES["llada-8b"]
    assert Budget().curve(1) == PROFILES["dream-7b"]


@pytest.mark.parametrize("knobs", ["start=0.3", "peak=0.1", "ratios=1.5", "rank=2.5", "rank=0", "max_ratio=-0.1"])
def test_a_budget_that_makes_no_sense_is_refused(knobs: str) -> None:
    with pytest.raises(UsageError):
        make_policy(f"spa({knobs})")


def test_a_table_for_another_depth_is_refused_before_decoding() -> None:
    with pytest.raises(UsageError, match="ratios has 3 entries, and the model 8 layers"):
        dcache.generate(load_model("tiny-llada", device="cpu"), "hello", policy=SPACache(ratios=(0.5,) * 3))


def test_each_layer_recomputes_its_share_of_the_generated_rows() -> None:
    ratios = (0.9, 0.05, 0.3, 0.99)
    for step, layers in enumerate(rows(go(SPACache(ratios=ratios, warm_up=0, gen_interval=5)))):
        expected = [20] * 4 if step == 0 else [20, 12, 12, 12] if step % 5 == 0 else [20, 0, 3, 11]
        assert [len(layer) for layer in layers] == expected


# -- what equals what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [MODEL, SHIFTED])
@pytest.mark.parametrize("knobs", [{"interval": 1}, {"warm_up": 100}])
def test_full_steps_alone_are_no_cache(knobs: dict[str, int], model: Any) -> None:
    same(SPACache(**knobs), NoCache(), model=model)


@pytest.mark.parametrize("border", ["published", "repaired"])
@pytest.mark.parametrize("model", [MODEL, SHIFTED])
def test_a_budget_of_every_row_is_a_refresh_of_the_generated_rows(model: Any, border: str) -> None:
    one, other = ({"interval": 4, "border": border, **more} for more in ({"ratios": 1.0}, {"gen_interval": 1}))
    same(SPACache(**one), SPACache(**other), model=model)


def test_a_uniform_budget_is_a_table_of_one_value() -> None:
    same(SPACache(budget="uniform", max_ratio=0.3), SPACache(ratios=(0.3,) * 4))


def test_a_proxy_of_full_rank_compares_values() -> None:
    policy = SPACache(rank=1, ratios=0.25)

    class Values(SPACache):
        def prepare(self, weights: Weights) -> None:
            self.proxies = Proxies({layer: weights.weight(layer, "v") for layer in range(1, 4)})

    same(policy, Values(rank=1, ratios=0.25))


def test_an_orthogonal_matrix_in_front_of_the_proxies_changes_nothing() -> None:
    class Turned(SPACache):
        def prepare(self, weights: Weights) -> None:
            super().prepare(weights)
            turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0))).Q
            self.proxies = Proxies({layer: 3 * turn @ w for layer, w in self.proxies.items()})

    same(SPACache(rank=5, ratios=0.25), Turned(rank=5, ratios=0.25))


def test_on_one_layer_the_repaired_border_is_no_cache_and_the_published_is_not() -> None:
    model = random_model(0, n_layers=1, shift=1)
    same(SPACache(border="repaired"), NoCache(), model=model)
    first = len(PROMPT)
    found, expected = (logits(policy, model)[1][first] for policy in (SPACache(warm_up=0), NoCache()))
    assert not torch.allclose(found, expected, atol=1e-2)


@pytest.mark.parametrize("warm_up", [0, 2])
def test_the_published_border_is_scored_by_its_own_row_unless_a_step_is_full(warm_up: int) -> None:
    first = len(PROMPT)
    for border, lent in (("published", True), ("repaired", False)):
        policy = SPACache(gen_interval=3, interval=8, warm_up=warm_up, border=border)
        for t, found in enumerate(logits(policy, SHIFTED)):
            full = t % 8 == 0 or t <= warm_up
            assert torch.equal(found[first], found[first + 1]) == (lent and not full)


def test_ragged_batches_decode_as_single_runs() -> None:
    prompts, gen = ([3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7], [9]), [12, 8, 16]
    knobs: dict[str, Any] = {"interval": 5, "gen_interval": 3, "rank": 4, "ratios": 0.4}
    for model in (MODEL, SHIFTED):
        together = go(SPACache(**knobs), model, prompts, gen)
        for b, (prompt, n) in enumerate(zip(prompts, gen, strict=True)):
            alone = go(SPACache(**knobs), model, [prompt], n)
            assert written(together, b) == written(alone)
            assert rows(together, b) == rows(alone)


# -- what is stored ---------------------------------------------------------------------------------------------------


def test_prompt_keys_and_increments_of_rows_left_alone_keep_their_bits() -> None:
    policy, kept = SPACache(ratios=0.25, interval=6), []
    engine = Engine(MODEL, policy, LowConfidence(sampling=Sampling(after_end="decode")), maps=True, debug=True)
    run, count = engine.run, len(PROMPT)

    def running(plan: Any, ask: Any) -> Any:
        before = {name: [x.clone() for x in engine.stores.tensors[name]] for name in "KVD"}
        seen = run(plan, ask)
        kept.append((before, {name: [x.clone() for x in engine.stores.tensors[name]] for name in "KVD"}))
        return seen

    vars(engine)["run"] = running
    trace = decode(engine, State(MODEL.spec, [PROMPT], 12))
    for step, (before, after) in zip(trace, kept, strict=True):
        if int(step.step[0]) % 6 == 0:
            continue
        for layer in range(1, 4):
            for name in "KV":
                assert torch.equal(before[name][layer][:, :, :count], after[name][layer][:, :, :count])
                assert not torch.equal(before[name][layer][:, :, count:-1], after[name][layer][:, :, count:-1])
            alone = torch.from_numpy(~step.maps["rows"][layer, 0])
            assert torch.equal(before["D"][layer][0, :-1][alone], after["D"][layer][0, :-1][alone])


# -- proxies ----------------------------------------------------------------------------------------------------------


def test_a_proxy_has_the_rows_of_the_decomposition_up_to_their_signs() -> None:
    w = MODEL.layers[1].qkv[-MODEL.spec.kv_width :].detach()  # type: ignore[union-attr,index]
    _, s, vh = torch.linalg.svd(w, full_matrices=False)
    found, expected = proxy(w, 5), s[:5, None] * vh[:5]
    torch.testing.assert_close(found.abs(), expected.abs(), atol=1e-4, rtol=0)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DCACHE_CACHE_DIR", str(tmp_path))
    return tmp_path / "proxies"


def test_proxies_are_computed_once_and_read_from_a_file_after_that(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Weights(MODEL)
    first = {layer: x.clone() for layer, x in value_proxies(weights, 3).items()}
    assert len(list(kept.iterdir())) == 1
    monkeypatch.setattr("dcache.proxies.proxy", lambda w, rank: pytest.fail("computed again"))
    again = value_proxies(weights, 3)
    assert first.keys() == again.keys() == {1, 2, 3}
    assert all(torch.equal(first[layer], again[layer]) for layer in first)


def test_files_are_named_by_the_weights_the_rank_and_the_dtype(kept: Path) -> None:
    for model in (MODEL, random_model(1, n_layers=4), random_model(0, n_layers=4).to(torch.bfloat16)):
        for rank in (2, 3):
            found = value_proxies(Weights(model), rank)
            assert found[1].shape == (rank, MODEL.spec.d_model)
            assert found[1].dtype == model.dtype
    assert len(list(kept.iterdir())) == 6


def test_a_file_that_is_broken_is_made_again(kept: Path) -> None:
    expected = {layer: x.clone() for layer, x in value_proxies(Weights(MODEL), 3).items()}
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    for content in (b"", b"not a file of tensors", whole[: len(whole) // 2], whole[:-8] + b"\xff" * 8):
        file.write_bytes(content)
        found = value_proxies(Weights(MODEL), 3)
        assert all(torch.equal(found[layer], expected[layer]) for layer in expected)
        del found
        assert file.read_bytes() == whole
    assert list(kept.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DCACHE_CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert value_proxies(Weights(MODEL), 2)[1].shape == (2, MODEL.spec.d_model)
    assert "not kept" in caplog.text


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DCACHE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert folder() == Path("/there/dcache/proxies")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert folder() == Path("/home/someone/.cache/dcache/proxies")


def test_engines_of_one_model_share_their_proxies() -> None:
    one, other = SPACache(rank=3), SPACache(rank=3)
    for policy in (one, other):
        Engine(MODEL, policy, LowConfidence())
    assert one.proxies is other.proxies
