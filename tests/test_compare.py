"""Comparisons on a random checkpoint: what runs in which order, what is written down, and how it is continued."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

import dcache
from dcache import CachePolicy, Comparison, Plan, UsageError, compare, generate, load_model
from dcache.compare import Experiment, Memory, Run
from dcache.plugins import make_policy
from dcache.regions import REGIONS, Region
from dcache.results import FILE, Result, read_results
from dcache.tasks.base import Problem, Task

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "golden" / "models" / "llada_mha"
SMALL = {"gen_length": 8, "block_length": 8}


class Words(Task):
    """Short prompts, some with answers."""

    name = "words"
    gen_length = 8

    def __init__(self, *prompts, answer="no"):
        self.given = [Problem(f"p{i}", text, answer) for i, text in enumerate(prompts or ("Ann", "Ben has 3", "Eva"))]

    def problems(self, split, limit, seed):
        return self.given[:limit]

    def score(self, problem, text):
        return None if problem.answer is None else problem.answer == text


@pytest.fixture(scope="module")
def model():
    return load_model(FOLDER, device="cpu")


def tokens(comparison):
    return {r.key: (r.canvas, r.nfe, r.row_layers) for r in comparison.results}


def keys(run):
    return [(r.problem, r.policy) for batch in run for r in batch]


# What runs


def test_the_reference_runs_first_in_the_table_whether_listed_or_not(model):
    for policies in (["dkv"], ["dkv", "none"], ["none", "dkv"]):
        assert list(Experiment(policies, Words()).policies) == ["none", "dkv"]


@pytest.mark.parametrize(
    "policies", [["dkv", "dkv"], ["elastic", "elastic(gamma=0.9)"], ["dkv(interval=4)", "dkv( interval = 4 )"]]
)
def test_a_policy_that_is_listed_twice_is_refused_however_it_is_written(policies):
    with pytest.raises(UsageError, match=r"is listed twice"):
        Experiment(policies, Words())


def test_a_policy_is_called_by_the_knobs_that_differ_from_the_defaults():
    names = list(Experiment(["elastic(window=none,gamma=0.5)", "dkv(interval=8)"], Words()).policies)
    assert names == ["none", "elastic(gamma=0.5)", "dkv"]


def test_one_text_is_a_list_of_policies():
    listed = Experiment(["elastic(window=8,gamma=0.5)", "dkv"], Words())
    assert list(Experiment("elastic(window=8,gamma=0.5),dkv", Words()).policies) == list(listed.policies)
    assert list(Experiment("dkv", Words()).policies) == ["none", "dkv"]
    assert list(Experiment(make_policy("dkv"), Words()).policies) == ["none", "dkv"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"policies": None}, "policies is None; give a list"),
        ({"policies": [None]}, "a policy is None; give a name"),
        ({"policies": [type(make_policy("dkv"))]}, "or an instance of CachePolicy"),
        ({"task": 5}, "task is 5; give a name, such as 'gsm-mini', or an instance"),
        ({"task": Words}, "or an instance of Task"),
    ],
)
def test_what_is_no_policy_or_task_is_refused_saying_what_is_accepted(arguments, said):
    with pytest.raises(UsageError, match=said):
        Experiment(**arguments)


@pytest.mark.parametrize(
    ("prompts", "policy", "said"),
    [
        (None, "none", "prompts is None; give a text, or a list of texts or of token-id lists"),
        ([5], "none", "a prompt is 5; give a text"),
        (np.array([[[1, 2]]]), "none", "a prompt is array"),
        ([np.array([0.5])], "none", "which is no token id"),
        ([np.array([-1])], "none", "which is no token id"),
        ("a", None, "a policy is None; give a name, a call"),
        ("a", type(make_policy("dkv")), "or an instance of CachePolicy"),
    ],
)
def test_what_is_no_prompt_or_policy_is_refused_saying_what_is_accepted(model, prompts, policy, said):
    with pytest.raises(UsageError, match=said):
        generate(model, prompts, policy, **SMALL)


def test_token_ids_may_be_integers_of_numpy(model):
    (expected,) = generate(model, [[3, 4]], **SMALL)
    for prompts in ([[np.int64(3), np.uint8(4)]], [np.array([3, 4])], np.array([[3, 4]])):
        assert generate(model, prompts, **SMALL)[0].canvas == expected.canvas


def test_mistakes_show_before_a_model_is_loaded():
    for settings in ({"policies": ["elatsic"]}, {"task": "gsm"}, {"unmask": "best"}, {"limit": 0}, {"gen_len": 3}):
        with pytest.raises(UsageError):
            Experiment(**settings)


def test_policies_take_turns_in_another_order_for_each_problem(model):
    run = Run(Experiment(["elastic", "dkv"], Words(), **SMALL), model)
    assert keys(run) == [
        ("p0", "none"), ("p0", "elastic"), ("p0", "dkv"),
        ("p1", "elastic"), ("p1", "dkv"), ("p1", "none"),
        ("p2", "dkv"), ("p2", "none"), ("p2", "elastic"),
    ]  # fmt: skip


def test_a_repeat_begins_with_another_policy_than_the_one_before(model):
    run = Run(Experiment(["dkv"], Words("Ann", "Ben"), repeats=2, **SMALL), model)
    assert [name for _, name in keys(run)] == ["none", "dkv", "dkv", "none", "dkv", "none", "none", "dkv"]


def test_a_comparison_of_very_many_texts_begins_at_once(model):
    run = Run(Experiment(["dkv"], Words("Ann"), repeats=10_000, **SMALL), model)
    asked, missing = [], run._missing
    run._missing = lambda: (asked.append(entry) or entry for entry in missing())
    next(iter(run))
    assert len(asked) == 1 + 2 + 1  # one look for each policy's warm-up, and the first batch


def test_every_policy_is_warmed_up_before_the_clock_is_read(model):
    seen = []

    class Spy(CachePolicy):
        def plan(self, state):
            seen.append(state.step.copy())
            return Plan.all(state)

    clock = count()
    run = Run(Experiment([Spy()], Words("Ann"), **SMALL), model, clock=lambda: (seen.append("clock"), next(clock))[1])
    next(iter(run))
    assert seen.index("clock") == 8  # the plans of the warm-up


def test_wall_time_is_that_of_the_clock_and_a_batch_divides_it_evenly(model):
    ticks = count(step=3)
    run = Run(Experiment([], Words(), batch_size=2, **SMALL), model, clock=lambda: next(ticks))
    assert [(r.problem, r.seconds, r.batch) for batch in run for r in batch] == [
        ("p0", 1.5, 2), ("p1", 1.5, 2), ("p2", 3.0, 1),
    ]  # fmt: skip


def test_a_batch_gives_the_tokens_of_single_runs(model):
    settings = {"temperature": 0.7, "policies": ["dkv"], **SMALL}
    one, two = (compare(model, task=Words(), batch_size=n, **settings) for n in (1, 2))
    assert {k: v[0] for k, v in tokens(one).items()} == {k: v[0] for k, v in tokens(two).items()}


def test_the_seed_reaches_problems_and_noise(model):
    one, again, other = (compare(model, ["dkv"], limit=1, seed=s, temperature=1.0, **SMALL) for s in (1, 1, 2))
    assert tokens(one) == tokens(again)
    assert {r.problem for r in other.results} == {"gsm-mini/test/2/0"}


def test_compare_without_policies_runs_the_reference_alone(model):
    comparison = compare(model, [], Words(), **SMALL)
    assert {r.policy for r in comparison.results} == {"none"}
    assert "only none was run" in comparison.table()


def test_the_length_of_a_generation_is_that_of_the_task_unless_given(model):
    assert Experiment([], "gsm-mini").settings.gen_length == 96
    assert Experiment([], "gsm-mini", gen_length=8).settings.gen_length == 8


def test_paired_gives_each_policy_the_unmasker_of_its_paper(model):
    run = Run(Experiment(["elastic"], Words(), unmask="paired", **SMALL), model)
    assert [e.unmask for e in run.conditions.policies] == ["low-confidence", "threshold(window=16)"]


def test_a_prompt_that_does_not_fit_is_refused_naming_its_problem(model):
    with pytest.raises(
        UsageError, match=r"problem 'p1' has a prompt of \d+ tokens; with gen_length 8 the model has room"
    ):
        Run(Experiment([], Words("Ann", "Ben " * 90), **SMALL), model)


# What is found


def test_problems_with_images_are_refused_by_a_model_of_text(model):
    class Seen(Task):
        name, gen_length = "seen", 8

        def problems(self, split, limit, seed):
            return [Problem("a", "What is this?"), Problem("b", "<image> And this?", images=("an image",))]

        def score(self, problem, text):
            return None

    with pytest.raises(UsageError, match=r"problem 'b': model .* takes no images"):
        compare(model, ["dkv"], Seen())


def test_results_agree_with_what_generate_returns(model):
    (result,) = compare(model, [], Words("Ann"), **SMALL).results
    output = dcache.generate(model, "Ann", "none", **SMALL)
    assert (result.text, result.tokens, result.canvas) == (output.text, output.tokens, output.canvas)
    assert (result.nfe, result.row_layers, result.refreshes) == (8, output.trace.row_layers, 8)
    assert (result.row_share, result.full_row_layers) == (1, result.row_layers)
    assert result.regions == output.trace.regions
    assert len(result.step_ms) == result.nfe
    assert result.peak_bytes is None
    assert result.cache_bytes > 0


def test_the_reference_agrees_with_itself_and_so_does_a_policy_that_caches_nothing(model):
    comparison = compare(model, ["dkv(interval=1)"], Words(), **SMALL)
    assert [(row.agreement, row.row_share) for row in comparison.standings] == [(1, 1), (1, 1)]
    assert any("dkv(interval=1) refreshed at every step" in text for text in comparison.warnings)


def test_accuracy_is_what_the_task_says_and_none_without_answers(model):
    text = compare(model, [], Words("Ann"), **SMALL).results[0].text
    assert compare(model, [], Words("Ann", answer=text), **SMALL).standings[0].accuracy == 1
    assert compare(model, [], Words("Ann", answer=None), **SMALL).standings[0].accuracy is None


def test_to_pandas_has_one_row_per_result(model):
    comparison = compare(model, ["dkv"], Words(), **SMALL)
    frame = comparison.to_pandas()
    assert len(frame) == len(comparison.results) == 6
    parts = {f"{name}_{field}" for name in REGIONS for field in Region.model_fields}
    assert (set(Result.model_fields) - {"kind", "regions"}) | parts == set(frame.columns)


# What is written


def test_each_result_is_on_disk_before_the_next_text_begins(model, tmp_path):
    for n, _ in enumerate(Run(Experiment(["dkv"], Words(), **SMALL), model, tmp_path), start=1):
        lines = (tmp_path / FILE).read_bytes().splitlines()
        assert [json.loads(line)["kind"] for line in lines] == ["conditions"] + ["result"] * n


def test_a_finished_comparison_is_not_run_again(model, tmp_path):
    first = compare(model, ["dkv"], Words(), out=tmp_path, **SMALL)
    assert list(Run(Experiment(["dkv"], Words(), **SMALL), model, tmp_path)) == []
    assert compare(model, ["dkv"], Words(), out=tmp_path, **SMALL).results == first.results


def test_results_of_an_earlier_version_are_continued_and_tell_no_regions(model, tmp_path):
    whole = compare(model, ["dkv"], Words(), out=tmp_path, **SMALL)
    file = tmp_path / FILE
    lines = [json.loads(line) for line in file.read_bytes().splitlines()[:-1]]
    for line in lines[:3]:
        line.pop("regions", None)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = Run(Experiment(["dkv"], Words(), **SMALL), model, tmp_path)
    assert keys(run) == [("p2", "dkv")]
    assert tokens(run.comparison) == tokens(whole)
    assert [row.regions for row in run.comparison.standings] == [None, None]
    assert run.comparison.by_region() == ""
    assert "tok/s" in run.comparison.table()


def test_an_interrupted_comparison_runs_only_what_is_missing(model, tmp_path):
    for n, _ in enumerate(Run(Experiment(["dkv"], Words(), **SMALL), model, tmp_path)):
        if n == 3:
            break
    rest = Run(Experiment(["dkv"], Words(), **SMALL), model, tmp_path)
    assert keys(rest) == [("p2", "none"), ("p2", "dkv")]
    assert tokens(rest.comparison) == tokens(compare(model, ["dkv"], Words(), **SMALL))


def test_more_problems_and_more_repeats_continue_a_comparison(model, tmp_path):
    compare(model, [], Words(), out=tmp_path, limit=1, **SMALL)
    more = Run(Experiment([], Words(), limit=2, repeats=2, **SMALL), model, tmp_path)
    assert [(r.repeat, r.problem) for batch in more for r in batch] == [(0, "p1"), (1, "p0"), (1, "p1")]
    fewer = compare(model, [], Words(), out=tmp_path, limit=1, **SMALL)
    assert [r.problem for r in fewer.results] == ["p0"]


@pytest.mark.parametrize("tail", [b'{"kind":"result","repeat":0,"pro', b"{", b'{"kind":"result"}'])
def test_a_last_line_without_its_end_is_dropped_and_run_again(model, tmp_path, tail):
    whole = compare(model, [], Words(), out=tmp_path, **SMALL)
    file = tmp_path / FILE
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]) + tail)
    assert keys(run := Run(Experiment([], Words(), **SMALL), model, tmp_path)) == [("p2", "none")]
    assert tokens(run.comparison) == tokens(whole)
    assert tokens(Comparison.load(tmp_path)) == tokens(whole)


def test_a_comparison_killed_before_its_first_line_was_whole_begins_anew(model, tmp_path):
    (tmp_path / FILE).write_bytes(b'{"kind":"conditions","dcache')
    assert len(compare(model, [], Words(), out=tmp_path, **SMALL).results) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed was 0 and is 1 now"),
        ({"gen_length": 16}, "gen_length was 8 and is 16 now"),
        ({"temperature": 0.5}, "temperature was 0.0 and is 0.5 now"),
        ({"batch_size": 2}, "batch_size was 1 and is 2 now"),
        ({"unmask": "random"}, "unmask was 'low-confidence' and is 'random' now"),
        ({"policies": ["elastic"]}, "policies was 'none, dkv' and is 'none, elastic' now"),
        ({"policies": ["dkv(interval=4)"]}, "policies was 'none, dkv' and is 'none, dkv(interval=4)' now"),
        ({"task": "gsm-mini"}, "task was 'words' and is 'gsm-mini' now"),
    ],
)
def test_results_of_other_conditions_are_refused_naming_the_first_difference(model, tmp_path, change, said):
    settings = {"policies": ["dkv"], "task": Words("Ann"), **SMALL}
    compare(model, out=tmp_path, **settings)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(UsageError) as caught:
        compare(model, out=tmp_path, **(settings | change))
    assert said in str(caught.value)
    assert "choose another directory" in str(caught.value)
    assert (tmp_path / FILE).read_bytes() == before


def test_conditions_bind_only_once_a_result_exists(model, tmp_path):
    Run(Experiment([], Words("Ann"), seed=1, **SMALL), model, tmp_path).file.close()  # as if it failed before a result
    compare(model, [], Words("Ann"), out=tmp_path, **SMALL)
    conditions, results, _ = read_results(tmp_path / FILE)
    assert [entry.seed for entry in conditions] == [0]
    assert len(results) == 1


def test_other_weights_under_the_same_name_are_refused(model, tmp_path):
    compare(model, [], Words("Ann"), out=tmp_path, **SMALL)
    other = load_model(FOLDER, device="cpu")
    next(other.transformer.parameters()).data[0, 0] += 1
    with pytest.raises(UsageError, match=r"weights was '[0-9a-f]+' and is '[0-9a-f]+' now"):
        compare(other, [], Words("Ann"), out=tmp_path, **SMALL)


def test_another_prompt_under_the_same_id_is_refused(model, tmp_path):
    compare(model, [], Words("Ann"), out=tmp_path, **SMALL)
    with pytest.raises(UsageError, match=r"another prompt or answer of problem 'p0'"):
        compare(model, [], Words("Ben"), out=tmp_path, **SMALL)


@pytest.mark.parametrize("line", [b"junk\n", b"[]\n", b'{"kind":"result"}\n', b"\xff\n", b"\n"])
def test_a_file_that_is_no_comparison_is_refused_naming_the_line_and_left_alone(model, tmp_path, line):
    compare(model, [], Words("Ann"), out=tmp_path, **SMALL)
    data = (tmp_path / FILE).read_bytes() + line
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(UsageError, match=r"results\.jsonl, line 3: not a line of a comparison"):
        compare(model, [], Words("Ann"), out=tmp_path, **SMALL)
    assert (tmp_path / FILE).read_bytes() == data


def test_an_out_that_is_a_file_is_refused(model, tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written"):
        compare(model, [], Words("Ann"), out=tmp_path / "x", **SMALL)


def test_a_folder_in_use_is_refused(model, tmp_path):
    pytest.importorskip("fcntl")
    run = Run(Experiment([], Words("Ann"), **SMALL), model, tmp_path)
    with pytest.raises(UsageError, match=r"is being written by another comparison"):
        Run(Experiment([], Words("Ann"), **SMALL), model, tmp_path)
    list(run)
    assert list(Run(Experiment([], Words("Ann"), **SMALL), model, tmp_path)) == []


def test_save_and_load_give_the_same_comparison(model, tmp_path):
    comparison = compare(model, ["dkv"], Words(), **SMALL)
    comparison.save(tmp_path / "x")
    comparison.save(tmp_path / "x")
    again = Comparison.load(tmp_path / "x")
    assert again == comparison
    assert again.table() == comparison.table()
    with pytest.raises(UsageError, match=r"holds other results"):
        compare(model, [], Words(), **SMALL).save(tmp_path / "x")


KILLED = """
    import itertools, os, signal, sys, time
    import dcache
    from dcache.cli import main

    calls = itertools.count(1)

    def clock():
        if next(calls) == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
        return time.perf_counter()

    sys.modules["dcache.compare"].perf_counter = clock
    main(sys.argv[1:])
"""


def test_a_comparison_killed_in_the_middle_of_a_text_ends_as_if_it_had_not_been(model, tmp_path):
    # the clock is read twice per text: the 10th reading is the end of the fifth text, not yet written
    arguments = [
        "compare",
        "--model",
        str(FOLDER),
        "--device",
        "cpu",
        "--policies",
        "elastic,dkv",
        "--limit",
        "2",
        "--out",
        str(tmp_path),
    ]
    arguments += ["--gen-length", "8", "--block-length", "8"]
    code = textwrap.dedent(KILLED.format(call=10))
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # a condition: it must be that of this process
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"} | threads
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,), results, _ = read_results(tmp_path / FILE)
    assert len(results) == 4
    resumed = compare(model, ["elastic", "dkv"], limit=2, out=tmp_path, **SMALL)
    assert left.limit == 2
    assert len(resumed.results) == 6
    assert tokens(resumed) == tokens(compare(model, ["elastic", "dkv"], limit=2, **SMALL))


def test_the_peak_of_a_policy_leaves_out_what_the_others_hold(monkeypatch):
    allocated, peak = [100], [0]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    memory = Memory(torch.device("cuda"))

    def run(name, keeps, needs):
        memory.begin()
        peak[0] = allocated[0] + keeps + needs
        allocated[0] += keeps
        return memory.end(name)

    assert run("none", keeps=10, needs=5) == 115
    assert run("elastic", keeps=20, needs=5) == 125
    assert run("none", keeps=0, needs=5) == 115
    assert run("none", keeps=-4, needs=9) == 115  # smaller stores for a shorter prompt
    assert run("elastic", keeps=0, needs=5) == 125
