"""Every unmasker: what it must keep, whatever its rule; and what is special about some."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcache import Sampling, State, UsageError
from dcache.config import DecodeSettings
from dcache.decode import decode
from dcache.engine import Engine
from dcache.generate import Runner
from dcache.models.loading import Model
from dcache.plugins import make_policy, make_unmasker, plugins
from dcache.testing.models import random_model
from dcache.testing.recorder import Recorder
from dcache.testing.steps import asked, commits, counts, uncached
from dcache.unmasking.base import Noise
from dcache.unmasking.confidence import Entropy, LowConfidence, Margin, Threshold
from dcache.unmasking.klass import KLASS
from dcache.unmasking.order import RandomOrder
from dcache.unmasking.origin import Origin
from dcache.unmasking.pc import PCSampler
from dcache.unmasking.schedule import progress
from dcache.unmasking.wino import WINO

MODELS = {0: random_model(2), 1: random_model(5, shift=1)}
SHALLOW = {0: random_model(2, n_layers=1), 1: random_model(5, n_layers=1, shift=1)}  # no unmasker asks for the depth
SPEC = MODELS[0].spec
TABLE = np.random.default_rng(0).dirichlet(np.ones(SPEC.vocab_size))
RAGGED = [[3, 1, 4], [1, 5, 9, 2, 6], [5], [8, 9, 7, 9]]
GEN = [8, 12, 4, 8]

EVERY = [
    "low-confidence(steps=6,window=5)",
    "low-confidence(alg_temp=0.3)",
    "low-confidence(tokens_per_step=2)",
    "low-confidence(schedule=linear,idle_steps=true)",
    "margin(schedule=linear,first=alone)",
    "entropy(tokens_per_step=3)",
    "random",
    "threshold(threshold=0.4,first=alone)",
    "threshold(threshold=0.5,budget=4,window=6)",
    "factor(factor=1.5)",
    "factor(variant=d2,score=margin)",
    "eb(gamma=2.0)",
    "eb(gamma=1.0,score=random,largest=published)",
    "certainty-prior(sigma=2.0)",
    "certainty-prior(threshold=0.3,score=margin)",
    "klass(threshold=0.3,kl_threshold=1.0)",
    "klass(threshold=none,watch=window,at_least=2)",
    "pc(threshold=2.0)",
    "origin(steps=6)",
    "origin(window=3)",
    "random-order(tokens_per_step=2)",
    "random-order(window=4)",
    "ar(threshold=0.4)",
    "wino(wide_in=0.2,narrow_out=0.5)",
    "wino(wide_in=0.3,narrow_out=0.3,window=6)",
]
SAMPLINGS = [Sampling(after_end="decode"), Sampling(temperature=0.8, top_p=0.9, confidence="filtered", seed=7)]


def make(text: str, sampling: Sampling):
    unmasker = make_unmasker(text, sampling)
    if isinstance(unmasker, PCSampler):
        unmasker.table = TABLE
    return unmasker


def both(text: str):
    return [0] if text.startswith("wino") else [0, 1]


CASES = [(text, shift, k) for text in EVERY for shift in both(text) for k in range(len(SAMPLINGS))]
every = pytest.mark.parametrize(("text", "shift", "sampling"), CASES)


def test_every_unmasker_is_tried():
    assert {text.partition("(")[0] for text in EVERY} == set(plugins().unmaskers.entries)


@every
def test_all_is_decoded_never_as_a_mask_and_batching_does_not_change_it(text: str, shift: int, sampling: int):
    block = None if "window" in text else 4
    trace, state = uncached(SHALLOW[shift], make(text, SAMPLINGS[sampling]), RAGGED, GEN, block)
    for b, prompt in enumerate(RAGGED):
        alone, single = uncached(SHALLOW[shift], make(text, SAMPLINGS[sampling]), [prompt], GEN[b], block, ids=[b])
        mine = [c for c, step in zip(commits(trace, b), trace, strict=True) if step.active[b]]
        assert mine == commits(alone)
        assert state.tokens[b, : state.lengths[b]].tolist() == single.tokens[0].tolist()
        made = single.tokens[0, len(prompt) :].tolist()
        stop = made.index(SPEC.eos_id) if SPEC.eos_id in made and sampling == 1 else len(made)
        assert SPEC.mask_id not in made[:stop]
    assert not state.masked.any()


@pytest.mark.parametrize("text", EVERY)
def test_a_step_that_runs_twice_picks_the_same(text: str):
    """A recorded pass is replayed; a reviewed one runs again. Here every pick is asked for a second time."""
    one, two = make(text, SAMPLINGS[1]), make(text, SAMPLINGS[1])
    pick = two.pick

    def again(logits, at):
        first, second = pick(logits, at), pick(logits, at)
        for name in ("tokens", "confidence", "commit", "remask"):
            a, b = getattr(first, name), getattr(second, name)
            assert (a is None and b is None) or torch.equal(a, b)
        return second

    two.pick = again
    block = None if "window" in text else 4
    found, expected = (uncached(SHALLOW[0], u, RAGGED, GEN, block)[0] for u in (two, one))
    assert [commits(found, b) for b in range(4)] == [commits(expected, b) for b in range(4)]


@pytest.mark.parametrize("text", EVERY)
def test_a_pass_can_be_recorded_and_replayed(text: str):
    block = None if "window" in text else 4

    def run(executor):
        state = State(SPEC, RAGGED, GEN, block)
        engine = Engine(SHALLOW[0], make_policy("none"), make(text, SAMPLINGS[1]), executor=executor, buckets=(8, 64))
        return [step.commit.tolist() for step in decode(engine, state)]

    assert run(Recorder()) == run(None)


@pytest.mark.parametrize("text", EVERY)
def test_a_second_batch_knows_nothing_of_the_first(text: str):
    unmasker = make(text, SAMPLINGS[0])
    engine = Engine(SHALLOW[0], make_policy("none"), unmasker)
    block = None if "window" in text else 4
    runs = [decode(engine, State(SPEC, RAGGED, GEN, block)) for _ in range(2)]
    assert [commits(runs[0], b) for b in range(4)] == [commits(runs[1], b) for b in range(4)]


@pytest.mark.parametrize("kind", [LowConfidence, Margin, Entropy, RandomOrder])
@given(n=st.integers(1, 16), steps=st.integers(1, 20))
def test_the_linear_schedule_is_dreams(kind, n: int, steps: int):
    """floor(masked * (1 - s / t)) in float32, the last step all; idle steps are made if asked for."""
    keep = Sampling(after_end="decode")
    trace, _ = uncached(SHALLOW[0], kind(schedule="linear", steps=steps, idle_steps=True, sampling=keep), [[1, 2]], n)
    masked, expected = n, []
    for i in range(steps):
        t = torch.linspace(1, 1e-3, steps + 1)
        number = int(torch.tensor(float(masked)) * (1 - t[i + 1] / t[i])) if i < steps - 1 else masked
        expected.append(number)
        masked -= number
        if not masked:
            break
    assert counts(trace) == expected
    trace, _ = uncached(SHALLOW[0], kind(schedule="linear", steps=steps, sampling=keep), [[1, 2]], n)
    assert min(counts(trace)) >= 1
    assert sum(counts(trace)) == n


def test_the_published_examples_of_the_linear_schedule():
    def made(gen: int, steps: int) -> list[int]:
        unmasker = LowConfidence(schedule="linear", steps=steps, idle_steps=True, sampling=Sampling(after_end="decode"))
        return counts(uncached(SHALLOW[0], unmasker, [[1]], gen)[0])

    assert made(32, 32) == [0, *[1] * 30, 2]
    assert made(32, 16) == [1, *[2] * 14, 3]
    assert made(32, 12) == [2] * 5 + [3] * 6 + [4]
    assert progress(4, 1e-3)[-1] == 1


@pytest.mark.parametrize("text", ["threshold(threshold=0.1,first=alone)", "entropy(schedule=linear,first=alone)"])
def test_a_block_that_opens_alone_commits_its_first_row_first(text: str):
    trace, _ = uncached(MODELS[1], make(text, SAMPLINGS[0]), [[1, 2, 3]], 12, 4)
    made = [list(c) for c in commits(trace)]
    firsts = [next(i for i, c in enumerate(made) if c and c[0] >= start) for start in (3, 7, 11)]
    assert [made[i] for i in firsts] == [[3], [7], [11]]


@given(seed=st.integers(0, 200), tokens=st.integers(1, 3))
def test_a_random_order_announces_what_it_commits_and_keeps_to_the_order(seed: int, tokens: int):
    class Watching(RandomOrder):
        def ask(self, state):
            ask = super().ask(state)
            seen.append((ask.window.copy(), ask.order.copy()))
            return ask

    seen = []
    keep = Sampling(seed=seed, after_end="decode")
    trace, _ = uncached(SHALLOW[0], Watching(tokens_per_step=tokens, sampling=keep), RAGGED, GEN, 4)
    for step, (window, _) in zip(trace, seen, strict=True):
        assert np.array_equal(step.commit, window)
    for b, start in enumerate(len(p) for p in RAGGED):
        for block in range(start, start + GEN[b], 4):
            places = [
                order[b, p] for step, (_, order) in zip(trace, seen, strict=True)
                for p in sorted(np.flatnonzero(step.commit[b]), key=lambda p: order[b, p]) if block <= p < block + 4
            ]  # fmt: skip
            assert places == sorted(places)
    assert len({tuple(map(tuple, commits(trace, b))) for b in range(4)}) > 1


def test_alg_temp_draws_rows_in_proportion_to_their_score():
    unmasker = LowConfidence(alg_temp=0.5)
    n = 20_000
    confidence = torch.tensor([0.9, 0.5, 0.2]).expand(n, 3)
    logits = torch.full((n, 3, 64), -30.0)
    logits[..., 1], logits[..., 2] = confidence.log(), (1 - confidence).log()
    sure = torch.maximum(confidence, 1 - confidence)[0]
    at = asked(MODELS[0].spec, n, 3, quota=torch.ones(n, dtype=torch.int64))
    share = unmasker.pick(logits, at).commit.double().mean(0)
    torch.testing.assert_close(share, (sure.double() / 0.5).softmax(0), atol=0.015, rtol=0)


def test_origin_commits_each_row_with_the_probability_of_the_step():
    at = asked(SPEC, 4000, 5, share=torch.full((4000,), 0.3))
    commit = Origin().pick(torch.zeros(4000, 5, SPEC.vocab_size), at).commit.double()
    torch.testing.assert_close(commit.mean(0), torch.full((5,), 0.3).double(), atol=0.03, rtol=0)
    assert commit.sum(1).var() == pytest.approx(5 * 0.3 * 0.7, rel=0.1)  # independent


def test_klass_commits_what_has_settled_and_is_sure():
    """Against the rule in plain numpy, on the logits of a run in which all masked rows are followed."""
    keep = Sampling(after_end="decode")
    unmasker = KLASS(threshold=0.35, kl_threshold=0.6, sampling=keep)
    seen, pick = [], unmasker.pick

    def watch(logits, at):
        seen.append((logits[0].double().softmax(-1).numpy(), at.where[0].tolist(), at.eligible[0].numpy()))
        return pick(logits, at)

    unmasker.pick = watch
    trace, _ = uncached(MODELS[0], unmasker, [[1, 2, 3]], 16, 8)
    before, drifts, settled = {}, {}, 0
    for step, (p, where, eligible) in zip(trace, seen, strict=True):
        stable = []
        for i, place in enumerate(where):
            old = before.get(place, np.zeros(SPEC.vocab_size))
            drift = (p[i] * (np.log(p[i] + 1e-12) - np.log(old + 1e-12))).sum()
            drifts[place] = [*drifts.get(place, [0.0, 0.0]), drift][-2:]
            before[place] = p[i]
            if eligible[i] and max(drifts[place]) < 0.6 and step.confidence[0, place] >= 0.35:
                stable.append(place)
        settled += len(stable)
        among = np.where(eligible, step.confidence[0, where], -1)
        assert np.flatnonzero(step.commit[0]).tolist() == (stable or [where[int(among.argmax())]])
    assert settled >= 3


def test_klass_without_a_threshold_is_plain_top_n():
    found, expected = (uncached(MODELS[0], u, RAGGED, GEN, 4)[0] for u in (KLASS(threshold=None), LowConfidence()))
    assert [commits(found, b) for b in range(4)] == [commits(expected, b) for b in range(4)]


def test_wino_takes_back_less_than_it_commits_and_only_what_it_doubts():
    trace, state = uncached(MODELS[0], WINO(wide_in=0.1, narrow_out=0.7, sampling=SAMPLINGS[0]), [[1, 2, 3]], 24, 12)
    assert sum(int(step.remask.sum()) for step in trace) > 0
    for step in trace:
        assert step.commit.sum() - step.remask.sum() >= min(1, step.commit.sum())
        assert not (step.commit & step.remask).any()
        assert step.commit.sum() <= 20
    assert not state.masked.any()
    assert len(trace) <= 24


def test_wino_picks_by_its_two_thresholds():
    """Hand-made shadows: rows 0..2 are known, their tokens 5 % , 50 % and 95 % likely; rows 3..5 are masked."""
    eligible = torch.tensor([[False, False, False, True, True, True]])
    flags = {
        "tokens": torch.tensor([[1, 1, 1, 31, 31, 31]]),
        "known": ~eligible,
        "most": torch.tensor([5]),
    }
    at = asked(SPEC, 1, 6, eligible=eligible, **flags)

    def sure(values):
        from dcache.testing.steps import logits_of

        return logits_of([values], SPEC.vocab_size)

    shadow = sure([0.05, 0.5, 0.95, 0.5, 0.5, 0.5])
    at = type(at)(**{**vars(at), "shadow": torch.arange(6)[None], "shadow_logits": shadow})
    logits = sure([0.9, 0.9, 0.9, 0.8, 0.7, 0.2])
    picks = WINO(wide_in=0.6, narrow_out=0.9).pick(logits, at)
    assert picks.commit.tolist() == [[False, False, False, True, True, False]]
    assert picks.remask.tolist() == [[True, False, False, False, False, False]]  # two commits allow one
    picks = WINO(wide_in=0.99, narrow_out=0.9).pick(logits, at)
    assert picks.commit.sum() == 1
    assert picks.remask.sum() == 0


def test_wino_does_not_drop_behind_an_end_that_may_still_go():
    sampling = Sampling(after_end="drop")
    for seed in range(6):
        model = random_model(seed)
        _, state = uncached(model, WINO(wide_in=0.1, narrow_out=0.6, sampling=sampling), [[1, 2, 3]], 24, 8)
        made = state.tokens[0, 3:].tolist()
        end = made.index(SPEC.eos_id) if SPEC.eos_id in made else len(made)
        assert SPEC.mask_id not in made[:end]


def test_wino_is_refused_on_a_model_that_reads_a_position_elsewhere():
    with pytest.raises(UsageError, match="wino judges a committed token by a masked copy of its row"):
        Runner(Model("random", MODELS[1].spec, MODELS[1]), "none", DecodeSettings(unmask="wino"))


def test_pc_prefers_rows_whose_token_is_rare(tmp_path):
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({"1": 900, "2": 90, "3": 10}))
    unmasker = PCSampler(frequencies=str(file))
    uncached(MODELS[0], unmasker, [[1]], 2)
    expected = np.full(SPEC.vocab_size, 1 / 1000)
    expected[1:4] = [0.9, 0.09, 0.01]
    np.testing.assert_allclose(unmasker.table, expected, rtol=1e-6)
    logits = torch.full((1, 2, SPEC.vocab_size), -9.0)
    logits[0, 0, 1], logits[0, 1, 3] = 4.0, 2.0
    assert unmasker.pick(logits, asked(SPEC, 1, 2)).commit.tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[1" + "0" * 5000 + "]", "cannot be read"),
        ('{"x": 1}', "'x' is no token id, .* counts by token id, or a list"),
        ('{"999": 1}', "'999' is no token id, which run from 0 to 31"),
        ('{"1": 0}', "all counts are 0"),
        ("[0.5, 0.5]", "found a list of 2, the vocabulary has 32 ids"),
        ('{"1": -2}', "the count of 1 is -2, expected a number from 0 on"),
        ('{"1": NaN}', "the count of 1 is nan"),
        ("3", "found 3"),
    ],
)
def test_a_bad_file_of_frequencies_is_refused(tmp_path, content: str, message: str):
    file = tmp_path / "counts.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=message):
        uncached(MODELS[0], PCSampler(frequencies=str(file)), [[1]], 2)


def test_pc_without_frequencies_is_refused():
    with pytest.raises(UsageError, match="has none: name a JSON file"):
        Runner(Model("random", SPEC, MODELS[0]), "none", DecodeSettings(unmask="pc"))


def test_a_path_can_be_written_as_a_knob(tmp_path):
    assert make_unmasker(f"pc(frequencies={tmp_path}/a.json)").config.frequencies == f"{tmp_path}/a.json"
    assert make_unmasker("pc(frequencies=./a.json)").config.frequencies == "./a.json"


def test_guidance_is_invisible_to_an_unmasker():
    """Weight 0 is no guidance; a positive one changes tokens, and all is decoded."""
    plain, _ = uncached(MODELS[0], Threshold(threshold=0.4), RAGGED, GEN, 4)
    _, guided = uncached(MODELS[0], Threshold(threshold=0.4, sampling=Sampling(guidance=2.0)), RAGGED, GEN, 4)
    assert not guided.masked.any()
    assert len(plain) > 0
    assert isinstance(Threshold().noise, Noise)
