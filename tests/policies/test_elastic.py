import numpy as np
import torch

from dcache import CachePolicy, Sampling, State
from dcache.decode import decode
from dcache.engine import Engine
from dcache.kernels.drift import drift
from dcache.policies.elastic import ElasticCache
from dcache.testing.models import random_model
from dcache.trace import Step
from dcache.unmasking.confidence import LowConfidence, Threshold
from dcache.unmasking.order import RandomOrder

MODEL = random_model(0, n_layers=4)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def go(policy: CachePolicy, gen: int = 16, after_end: str = "decode") -> list[Step]:
    sampling = Sampling.model_validate({"after_end": after_end})
    unmasker = LowConfidence(sampling=sampling, window=6)
    return decode(Engine(MODEL, policy, unmasker, debug=True), State(MODEL.spec, [PROMPT], gen))


def similarities(trace: list[Step]) -> np.ndarray:
    return np.stack([s.reports["similarity"][:, 0] for s in trace[1:]])


def starts(trace: list[Step]) -> list[int]:
    return [MODEL.spec.n_layers if s.start is None else int(s.start[0]) for s in trace[1:]]


def test_each_variant_is_the_cosine_it_says() -> None:
    """The maps of one test of the first variant, measured again by the formulas of the other two."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Spy(ElasticCache):
        def layer(self, at, rows, h):  # type: ignore[no-untyped-def]
            if at.index == 0 and self._tests(at):
                self.before = at.across.probs(at.across.stored("Q", at.sets["tracked"]))
            return super().layer(at, rows, h)

        def _compare(self, at):  # type: ignore[no-untyped-def]
            now = at.across.probs(at.across.stored("Q", at.sets["tracked"]))
            seen.append((self.before[:1].clone(), now[:1].clone()))
            super()._compare(at)

    trace = go(Spy(gamma=0))
    past, now = seen[0]  # layer 0 of step 1, where every variant still sees the same past
    real = torch.ones(past.shape[0], past.shape[2], dtype=torch.bool)
    for variant, over in (("published", "heads"), ("paper", "rows"), ("flat", "flat")):
        found = go(ElasticCache(gamma=0, variant=variant))[1].reports["similarity"][0, 0]
        np.testing.assert_allclose(found, drift(past, now, real, None, over)[0], rtol=1e-6)
    assert len({round(float(drift(past, now, real, None, over)[0]), 4) for over in ("heads", "rows", "flat")}) == 3
    assert trace


def test_a_refresh_starts_above_the_first_layer_that_drifted() -> None:
    for gamma in (0.5, 0.9, 0.97, 0.999):
        trace = go(ElasticCache(gamma=gamma))
        for step, start in zip(trace[1:], starts(trace), strict=True):
            below = np.flatnonzero(step.reports["similarity"][:, 0] < np.float32(gamma))
            tested = below[below < MODEL.spec.n_layers - 1]  # at the last layer a drift has no effect
            assert start == (tested[0] + 1 if len(tested) else MODEL.spec.n_layers)


def test_gamma_zero_never_refreshes_and_gamma_above_one_always_does() -> None:
    assert set(starts(go(ElasticCache(gamma=0.0)))) == {MODEL.spec.n_layers}
    assert set(starts(go(ElasticCache(gamma=1.1)))) == {1}


def test_without_tracked_positions_nothing_is_tested() -> None:
    trace = go(ElasticCache(gamma=1.1, track_num=0))
    assert all(s.start is None and "similarity" not in s.reports for s in trace)


def test_a_position_that_is_still_masked_is_never_tracked() -> None:
    trace = go(ElasticCache(track_num=3))
    masked = set(range(len(PROMPT), len(PROMPT) + 16))
    for step in trace:
        picked = set(step.reports["picks"].flatten().tolist()) - {step.rows.shape[1]}
        assert not picked & masked
        masked -= set(np.flatnonzero(step.commit[0]).tolist())


def test_masks_behind_the_end_of_the_text_are_tracked_as_released_or_left_out_if_asked() -> None:
    def dropped_and_picked(track_dropped: bool) -> int:
        n = 0
        for seed in range(12):
            model = random_model(seed, n_layers=3, vocab_size=6)  # few tokens, so that texts end early
            policy = ElasticCache(track_num=4, track_dropped=track_dropped)
            unmasker = Threshold(sampling=Sampling(after_end="drop"), threshold=0.3)
            trace = decode(Engine(model, policy, unmasker, debug=True), State(model.spec, [[1, 2, 3]], 24))
            gone = np.zeros_like(trace[0].drop[0])
            for step in trace:
                picks = np.append(np.zeros_like(gone), False)
                picks[step.reports["picks"].flatten()] = True
                n += int((picks[:-1] & gone).sum())
                gone |= step.drop[0]
        return n

    assert dropped_and_picked(True) > 0
    assert dropped_and_picked(False) == 0


def test_block_caching_off_computes_every_mask() -> None:
    masked = set(range(len(PROMPT), len(PROMPT) + 16))
    for step in go(ElasticCache(block_caching=False)):
        assert masked <= set(np.flatnonzero(step.rows[0]).tolist())
        masked -= set(np.flatnonzero(step.commit[0]).tolist())
    frozen = go(ElasticCache(block_caching=True))
    assert any(not {*range(len(PROMPT) + 10, len(PROMPT) + 16)} <= set(np.flatnonzero(s.rows[0])) for s in frozen[1:])


def test_a_window_of_its_own_needs_an_unmasker_that_commits_inside_it() -> None:
    drawn, free, spec = RandomOrder(), LowConfidence(), MODEL.spec
    assert "leave the window out" in (ElasticCache(window=4).refuses(spec, drawn) or "")
    assert ElasticCache().refuses(spec, drawn) is None
    assert ElasticCache(window=4).refuses(spec, free) is None
