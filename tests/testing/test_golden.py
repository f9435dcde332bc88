"""How recorded runs are read: their random numbers, their padding, the steps that dcache does not make."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dcache.policies.none import NoCache
from dcache.testing.golden import METHODS, cases
from dcache.testing.golden.loop import NoCacheCase
from dcache.testing.golden.noise import ReplayedDream, ReplayedLLaDA
from dcache.testing.golden.spa import InStep
from dcache.testing.golden.unmaskers import recorded_unmasker, unknown_settings
from dcache.testing.models import random_model
from dcache.testing.steps import asked

SPEC = random_model().spec


def case(steps, *, gen_length=4, **settings):
    canvas = [[5, 6] + [1] * gen_length]
    data = {"model": "llada-tiny", "batch": 1, "mask_id": 31, "prompt": [[5, 6]], "final": canvas}
    return NoCacheCase(Path("none"), data | {"settings": {"gen_length": gen_length} | settings, "steps": steps})


def run(settings, **more):
    plain = {"method": "none", "model": "llada-tiny", "batch": 1, "mask_id": 31, "final": [[1]], "steps": []}
    return plain | {"settings": settings} | more


def test_a_left_padded_sequence_reads_the_draws_of_its_recorded_slots():
    noise = ReplayedLLaDA(3, [0, 2], 8, SPEC.vocab_size, True)
    at = asked(SPEC, batch=2)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.rand(2, 8, SPEC.vocab_size, dtype=torch.float64, generator=generator)
    positions = torch.rand(2, 8, generator=generator)
    assert torch.equal(noise.tokens(at, SPEC.vocab_size), torch.stack([tokens[0, :6], tokens[1, 2:]]))
    assert torch.equal(noise.positions(at), torch.stack([positions[0, :6], positions[1, 2:]]))


def test_forward_calls_that_commit_nothing_draw_too():
    all_calls, ours = (ReplayedLLaDA(3, [0], 6, None, True, forwards) for forwards in ((5, 5), (5, 2)))
    expected = [all_calls.positions(asked(SPEC, step=forward)) for forward in (0, 1, 5, 6)]
    found = [ours.positions(asked(SPEC, step=step)) for step in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[1], found[2])


def test_the_draws_of_dream_for_the_whole_canvas_count_padding_too():
    noise = ReplayedDream(3, [0, 2], 8)
    drawn = noise.positions(asked(SPEC, batch=2, quota=torch.tensor([1, 1])))
    q = torch.empty(2, 8).exponential_(generator=torch.Generator().manual_seed(3)).to(torch.float64)
    assert torch.equal(drawn, (-torch.stack([q[0, :6], q[1, 2:]])).exp())


def test_the_two_sequences_of_a_guided_text_share_its_draws():
    noise = ReplayedLLaDA(3, [1, 0], 8, SPEC.vocab_size, False)
    drawn = noise.tokens(asked(SPEC, batch=4), SPEC.vocab_size)
    assert torch.equal(drawn[:2], drawn[2:])
    assert not torch.equal(drawn[0], drawn[1])


def test_steps_of_a_block_that_is_complete_are_left_out():
    steps = [
        {"step": 0, "block": 0, "commit": [[[2, 1], [3, 1]]]},
        {"step": 1, "block": 0, "commit": [[]]},
        {"step": 2, "block": 1, "commit": [[]]},  # idle, but not in vain: its block is open
        {"step": 3, "block": 1, "commit": [[[4, 1], [5, 1]]]},
        {"step": 4, "block": 1, "commit": [[]]},
    ]
    assert [step["step"] for step in case(steps, block_length=2).steps] == [0, 2, 3]
    assert [step["step"] for step in case(steps).steps] == [0, 1, 2, 3]


def test_a_row_that_was_put_back_keeps_its_block_open():
    steps = [
        {"step": 0, "commit": [[[2, 1]]]},
        {"step": 1, "commit": [[[2, 31], [3, 1]]]},
        {"step": 2, "commit": [[[2, 1]]]},
    ]
    assert len(case(steps, gen_length=2).steps) == 3


@pytest.mark.parametrize("alg", ["topk_margin", "entropy"])
def test_margin_and_entropy_take_the_place_of_the_debiased_score(alg):
    data = {"strategy": "vanilla", "settings": {"debias": True, "clip_alpha": 10.0, "alg": alg}}
    assert recorded_unmasker(data, SPEC.vocab_size).refuses(SPEC) is None


@pytest.mark.parametrize("rule", ["factor", "gamma"])
@pytest.mark.parametrize(("strategy", "more"), [("klass", {}), ("vanilla", {"debias": True})])
def test_a_rule_that_an_unmasker_lacks_is_named(strategy, more, rule):
    reason = unknown_settings(run({rule: 1.0} | more, strategy=strategy))
    assert reason is not None
    assert rule in reason


@pytest.mark.parametrize(
    ("settings", "more", "word"),
    [
        ({"gamma": 1.0}, {"batch": 2}, "couples"),
        ({"sigma": 5.0, "alg": "entropy"}, {}, "probabilities"),
        ({"sigma": 5.0}, {"strategy": "wino"}, "sigma"),
        ({"alg": "entropy"}, {"strategy": "wino"}, "alg"),
        ({}, {"strategy": "wino", "model": "dream-tiny"}, "shifted"),
        ({"temperature": 0.5}, {"strategy": "vanilla", "stochastic": True}, "random numbers"),
        ({"temperature": 0.5}, {"method": "d2-cache", "stochastic": True}, "random numbers"),
        ({"temperature": 0.5}, {}, "random numbers"),
        ({"remasking": "random"}, {"method": "dkv-cache-decode", "stochastic": True}, "random numbers"),
    ],
)
def test_a_run_that_no_unmasker_repeats_says_why(settings, more, word):
    assert word in unknown_settings(run(settings, **more))


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({"gamma": 1.0}, {}),
        ({"sigma": 5.0, "alg": "topk_margin"}, {}),
        ({"temperature": 0.5, "remasking": "random"}, {"stochastic": True}),
        ({"temperature": 0.5}, {"method": "dkv-cache-pd", "model": "dream-tiny", "stochastic": True}),
        ({"remasking": "random"}, {"method": "dkv-cache-decode", "denoising_order": []}),
    ],
)
def test_a_run_that_one_repeats_is_not_left_out(settings, more):
    assert unknown_settings(run(settings, **more)) is None


D2 = {"rollout_p": 0.1, "current_k": 8}
KP_KR = {"prompt_interval_steps": 4, "gen_interval_steps": 2, "remasking": "low_confidence", "gen_length": 16}


@pytest.mark.parametrize(
    ("method", "settings", "more", "word"),
    [
        ("d2-cache", {**D2, "alg": "topk_margin"}, {}, "topk_margin"),
        (
            "d2-cache",
            {**D2, "stop_until_eos": True},
            {"steps": [{"rows": [[3]], "commit": [[[3, 126]]]}]},
            "end of the text",
        ),
        ("d2-cache", D2, {"steps": [{"rows": [[2]], "commit": [[[3, 1]]]}]}, "uniform guess"),
        ("dllm_cache", {**KP_KR, "block_length": 8, "steps": 32}, {}, "idle steps"),
        ("dllm_cache", {**KP_KR, "cfg_scale": 1.0, "cfg_interval_steps": 2}, {}, "cfg_interval_steps"),
        ("dkv-cache-pd", {"shift_type": "right"}, {}, "NaN"),
        (
            "spa",
            {"alg": "entropy", "max_new_tokens": 2},
            {"steps": [{"commit": [[[2, 1]], []]}] * 2, "batch": 2},
            "mean",
        ),
        ("fast_dllm", {"cache": "dual"}, {"final": [[1, 2, 31]]}, "masks"),
    ],
)
def test_what_a_policy_does_not_do_as_released_is_named(method, settings, more, word):
    assert word in METHODS[method](Path("case.json"), run(settings, method=method, **more)).unsupported


def test_a_run_that_could_stop_at_an_end_of_the_text_and_met_none_is_not_left_out():
    steps = [{"rows": [[3]], "commit": [[[3, 1]]]}]
    recorded = run(D2 | {"stop_until_eos": True}, method="d2-cache", steps=steps)
    assert METHODS["d2-cache"](Path("case.json"), recorded).unsupported is None


def test_dkv_without_its_cache_is_no_cache():
    case = METHODS["dkv-cache-decode"](Path("case.json"), run({"enable_cache": False}, method="dkv-cache-decode"))
    assert type(case.policy()) is NoCache


def test_sequences_that_stand_in_one_block_are_computed_while_they_wait():
    state = InStep(SPEC, [[1], [1, 2]], 4, 2)
    state.masked = state.masked & (np.arange(state.slots) != 2) & (np.arange(state.slots) != 1)
    state._enter(state._fixed_block())
    assert state.masked.sum(1).tolist() == [2, 3]
    assert state.active.all()
    assert [np.flatnonzero(row).tolist() for row in state.block] == [[1, 2], [2, 3]]
    state.masked = state.masked & (np.arange(state.slots) != 3)
    assert [np.flatnonzero(row).tolist() for row in state._fixed_block()] == [[3, 4], [4, 5]]


def test_every_recorded_run_is_checked_but_the_one_that_shows_a_defect():
    root = Path(__file__).parents[1] / "golden"
    files = [json.loads(file.read_text()) for file in root.rglob("*.json")]
    runs = [data for data in files if isinstance(data, dict) and {"steps", "settings"} <= data.keys()]
    assert {run["method"] for run in runs} == set(METHODS)
    found = list(cases(root))
    assert len(found) == len(runs) == 155
    assert [case.name for case in found if case.unsupported] == ["none/strat_14_llada_wino_b16"]
