"""What figures show, from results and recordings made by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcache import UsageError
from dcache.compare import Comparison
from dcache.view import data
from dcache.view.data import QUALITIES, SPEEDS, Chapter, Point
from dcache.view.recording import FILE

TOK_S, ROWS, NFE = SPEEDS
ACCURACY, AGREEMENT = QUALITIES


@pytest.fixture
def chapter(made, tmp_path):
    def make(results, recordings=(), **changes):
        names = dict.fromkeys(r.policy for r in results)
        given = made.conditions(*map(made.entrant, names), **changes)
        return Chapter(0, tmp_path, Comparison(given, results), {r.key: r for r in recordings})

    return make


def point(made, name="p", **values):
    return Point(0, made.entrant(name), values, {})


# Pareto front


@pytest.mark.parametrize("x", [TOK_S, ROWS])
@given(places=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_holds_what_no_other_point_beats(made, x, places):
    points = [point(made, **{x.key: float(a), ACCURACY.key: float(b)}) for a, b in places]

    def beats(p, q):
        gains = [axis.best * (p.at(axis) - q.at(axis)) for axis in (x, ACCURACY)]
        return min(gains) >= 0 and max(gains) > 0

    unbeaten = {(p.at(x), p.at(ACCURACY)) for p in points if not any(beats(q, p) for q in points)}
    front = [(p.at(x), p.at(ACCURACY)) for p in data.front(points, x, ACCURACY)]
    assert set(front) == unbeaten
    assert len(front) == len(unbeaten)
    assert front == sorted(front, key=lambda place: x.best * place[0])


def test_points_without_an_accuracy_are_not_on_its_front(made):
    assert data.front([point(made, tok_s=1.0)], TOK_S, ACCURACY) == []


# Sweeps


def of(made, *knobs, name="elastic", **more):
    return [Point(0, made.entrant(f"{name}{k}", name, **k, **more), {"tok_s": 1.0}, {}) for k in knobs]


def test_policies_that_differ_in_one_number_are_a_curve_by_its_value(made):
    points = of(made, {"gamma": 0.9, "window": 8}, {"gamma": 0.5, "window": 8}, {"gamma": 1, "window": 8})
    (curve,) = data.curves(points)
    assert (curve.name, curve.knob, curve.values(), curve.fixed) == ("elastic", "gamma", [0.5, 0.9, 1], "")


def test_of_a_grid_the_longer_knob_runs_along_the_curves(made):
    points = of(made, *({"gamma": g, "window": w} for w in (8, 16) for g in (0.5, 0.7, 0.9)))
    curves = data.curves(points)
    assert [(curve.knob, curve.fixed, curve.values()) for curve in curves] == [
        ("gamma", "window=8", [0.5, 0.7, 0.9]),
        ("gamma", "window=16", [0.5, 0.7, 0.9]),
    ]
    assert curves[0].title == "elastic (gamma, window=8)"


def test_what_differs_in_words_switches_or_name_is_no_curve(made):
    assert data.curves(of(made, {"variant": "a"}, {"variant": "b"})) == []
    assert data.curves(of(made, {"on": True}, {"on": False})) == []
    assert data.curves([*of(made, {"k": 1}), *of(made, {"k": 2}, name="dkv")]) == []
    assert data.curves(of(made, {"window": 8}, {"window": None})) == []


def test_policies_with_other_unmaskers_are_not_joined(made):
    points = [*of(made, {"k": 1}), *of(made, {"k": 2}, unmask="threshold")]
    assert data.curves(points) == []


def test_points_of_different_comparisons_are_not_joined(made):
    first, second = of(made, {"k": 1}, {"k": 2})
    assert data.curves([first, Point(1, second.entrant, second.values, {})]) == []


# Errors


def test_the_error_of_accuracy_is_binomial_over_problems_and_not_repeats(made, chapter):
    results = [
        made.result(policy, problem, repeat, correct=problem == "a", seconds=1.0 + repeat)
        for policy in ("none", "dkv")
        for problem in "ab"
        for repeat in (0, 1)
    ]
    found = data.points(chapter(results, repeats=2))[1]
    assert found.values["accuracy"] == 0.5
    assert found.errors["accuracy"] == pytest.approx(math.sqrt(0.25 / 2))
    assert found.errors["tok_s"] == pytest.approx(np.std([4.0, 2.0], ddof=1))


def test_the_error_of_agreement_is_that_of_its_mean_over_problems(made, chapter):
    results = [made.result("none", p) for p in "abc"]
    results += [
        made.result("dkv", p, canvas=c) for p, c in zip("abc", [(1, 2, 3, 4), (1, 2, 3, 9), (1, 2, 9, 9)], strict=True)
    ]
    found = data.points(chapter(results))[1]
    assert found.values["agreement"] == pytest.approx(0.75)
    assert found.errors["agreement"] == pytest.approx(np.std([1, 0.75, 0.5], ddof=1) / math.sqrt(3))


def test_one_repeat_and_one_problem_have_no_errors(made, chapter):
    assert data.points(chapter([made.result("none")]))[0].errors == {}


# Texts


@pytest.mark.parametrize(
    ("a", "b", "at"),
    [("abc", "abc", None), ("abc", "abd", 2), ("ab", "abc", 2), ("", "", None), ("x", "y", 0), ("", "y", 0)],
)
def test_the_first_difference_counts_the_end(a, b, at):
    assert data.first_difference(a, b) == at
    assert data.first_difference(b, a) == at


def test_a_recorded_text_is_cut_by_token(made, chapter):
    base = made.result("none", text="one two", tokens=(1, 2), n_tokens=2)
    other = made.result("dkv", text="one tea now", tokens=(1, 5, 6), canvas=(1, 5, 6, 4), n_tokens=3)
    recording = made.recording("dkv", text=other.text, ends=[3, 7, 11], canvas=[1, 5, 6, 4])
    (side,) = data.sides(chapter([base, other], [recording]))
    mine = side.texts[1]
    assert (mine.before, mine.token, mine.after, mine.differs, mine.by_token) == ("one", " tea", " now", 1, True)
    assert (side.question, side.answer, side.changed) == ("why?", "42", 1)
    assert side.texts[0].before == "one two"
    assert side.texts[0].differs is None


def test_a_text_that_ends_early_is_marked_at_its_end(made, chapter):
    base = made.result("none", text="one two", tokens=(1, 2), n_tokens=2)
    other = made.result("dkv", text="one", tokens=(1,), canvas=(1, 9, 9, 9), n_tokens=1)
    recording = made.recording("dkv", text="one", ends=[3], canvas=[1, 9, 9, 9])
    mine = data.sides(chapter([base, other], [recording]))[0].texts[1]
    assert (mine.before, mine.token, mine.after, mine.differs) == ("one", "", "", 1)


@pytest.mark.parametrize("recorded", [False, True])
def test_an_unrecorded_text_is_cut_by_character(made, chapter, recorded):
    results = [made.result("none", text="one two"), made.result("dkv", text="one tea", canvas=(1, 5, 3, 4))]
    stray = [made.recording("dkv", text="another", same=False)] if recorded else []
    mine = data.sides(chapter(results, stray))[0].texts[1]
    assert (mine.before, mine.token, mine.after, mine.differs, mine.by_token) == ("one t", "e", "a", 1, False)


def test_a_problem_that_the_reference_has_not_finished_is_left_out(made, chapter):
    results = [made.result("none", "a"), made.result("dkv", "a"), made.result("dkv", "b")]
    assert [side.problem for side in data.sides(chapter(results))] == ["a"]


# Times


def test_very_many_step_times_are_stood_for_by_their_quantiles(made, chapter):
    times = np.random.default_rng(0).gamma(3, size=5000)
    found = data.step_times(chapter([made.result("none", step_ms=times.tolist())]), "none")
    assert len(found) == data.QUANTILES
    assert np.percentile(found, [0, 5, 50, 95, 100]) == pytest.approx(
        np.percentile(times, [0, 5, 50, 95, 100]), rel=1e-2
    )


def test_the_split_is_per_step_of_the_recorded_texts(made, chapter):
    found = data.split(chapter([made.result("none")], [made.recording("none")]), "none")
    assert found["pass"] == 1.25
    assert found["plan"] == 0.75
    assert found["begin"] == 0.5
    assert data.split(chapter([made.result("none")]), "none") == {}


def test_measured_times_of_steps_go_before_recorded_ones(made, chapter):
    recording = made.recording("none")
    assert chapter([made.result("none")], [recording]).step_ms(recording) == [1.0, 2.0]
    assert chapter([made.result("none", step_ms=[1.0])], [recording]).step_ms(recording) == [3.0, 1.0]


# Steps


def test_a_map_counts_layers_and_names_positions(made):
    steps = data.Steps.of(made.recording("none", images=[(0, 1)]))
    assert steps.layers.tolist() == [[2] * 6, [0, 0, 0, 0, 2, 0]]
    assert steps.shares.T.tolist() == [[1.0, 1.0], [1 / 6, 1 / 6]]
    assert steps.labels == ["image row 0", "prompt token 1", "generated token 0, block 1", "generated token 1, block 1",
                            "generated token 2, block 2", "generated token 3, block 2"]  # fmt: skip
    assert steps.borders == [2, 4]
    assert steps.commits == [(0, 2), (0, 3), (1, 4), (1, 5)]


def test_the_last_commit_of_a_position_counts(made):
    recording = made.recording("none", commits=[[2, 3], [3, 4]], remasks=[[3], []])
    assert data.committed_at(recording) == [(0, 2), (1, 3), (1, 4)]
    assert data.confidence_at(recording, 1, 5) == 0.25
    assert data.confidence_at(recording, 0, 5) is None


def test_a_damaged_map_names_its_recording(made):
    recording = made.recording("none")
    damaged = recording.model_copy(update={"rows": recording.rows.model_copy(update={"data": "AAAA"})})
    with pytest.raises(UsageError, match=r"the recording of problem 'a' under 'none' has an array of shape"):
        data.Steps.of(damaged)


# Several comparisons


def test_recordings_beside_results_of_other_conditions_are_refused(made, tmp_path):
    conditions = made.conditions(made.entrant("none"))
    made.save(tmp_path, conditions, [made.result("none")], [made.recording("none")])
    text = (tmp_path / FILE).read_text().replace('"seed":0', '"seed":5', 1)
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UsageError, match=r"does not belong to results.jsonl beside it: seed is 5 in one and 0"):
        Chapter.read(0, tmp_path)


def test_only_the_conditions_that_differ_are_told(made, tmp_path):
    both = [made.conditions(made.entrant("none"), model=model, started=model) for model in ("a", "b")]
    chapters = [Chapter(i, tmp_path, Comparison(each, [])) for i, each in enumerate(both)]
    assert data.differences(chapters) == [("model", ["a", "b"])]
