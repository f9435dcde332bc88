import re

import pytest

from dcache.errors import UsageError
from dcache.tasks.base import Problem
from dcache.tasks.generated import in_test
from dcache.tasks.gsm_mini import GsmMini

TASK = GsmMini()
CALCULATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@pytest.fixture(scope="module")
def sample():
    return TASK.problems("train", 1500, seed=3) + TASK.problems("test", 150, seed=3)


def test_no_prompt_is_in_both_splits_whatever_the_seeds():
    train = {problem.prompt for seed in (0, 1) for problem in TASK.problems("train", 800, seed)}
    test = {problem.prompt for seed in (0, 1) for problem in TASK.problems("test", 200, seed)}
    assert not train & test
    assert all(in_test(prompt) for prompt in test)
    assert not any(in_test(prompt) for prompt in train)


def test_about_one_prompt_in_sixteen_is_held_out():
    # Prompts as generated, before a split accepts or rejects them: both streams see the same distribution.
    bare = [problem.prompt + " " for problem in TASK.problems("train", 4000, seed=0)]
    assert 200 < sum(map(in_test, bare)) < 300


def test_a_problem_depends_on_neither_limit_nor_what_was_drawn_before():
    assert TASK.problems("test", 5, seed=1) == TASK.problems("test", 20, seed=1)[:5]
    assert TASK.problem("test", 4, seed=1) == TASK.problems("test", 5, seed=1)[4]
    assert TASK.problems("test", 5, seed=1) != TASK.problems("test", 5, seed=2)


def test_the_first_problem_of_the_test_split_never_changes():
    # Published accuracies hold for these problems: a new generator needs a new checkpoint.
    problem = TASK.problem("test", 0, seed=0)
    assert problem.id == "gsm-mini/test/0/0"
    assert (
        problem.prompt
        == "Iris has 57 shells. Omar has 38 fewer than Iris. Mia has 3 fewer than Omar. How many shells does Mia have?"
    )
    assert problem.solution == "Omar has 57 - 38 = 19 shells. Mia has 19 - 3 = 16 shells. #### 16"


def test_every_calculation_is_right_small_and_never_negative(sample):
    apply = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    for problem in sample:
        for a, sign, b, result in CALCULATION.findall(problem.solution):
            assert apply[sign](int(a), int(b)) == int(result), problem
            assert sign != "/" or int(a) % int(b) == 0, problem
            assert 0 <= int(result) < 5000, problem


def test_a_solution_has_two_to_five_calculations_and_ends_in_the_answer(sample):
    for problem in sample:
        calculations = CALCULATION.findall(problem.solution)
        assert 2 <= len(calculations) <= 5, problem
        assert problem.solution.count("=") == len(calculations)
        assert problem.answer == calculations[-1][-1]
        assert problem.solution.endswith(f" #### {problem.answer}")


def test_every_number_of_a_calculation_is_told_or_was_worked_out_before(sample):
    for problem in sample:
        known = set(re.findall(r"\d+", problem.prompt)) | {"1"}  # "Ann and 3 friends" are 3 + 1 people
        for a, _, b, result in CALCULATION.findall(problem.solution):
            assert {a, b} <= known, problem
            known.add(result)


def test_the_reference_solution_scores_and_another_answer_does_not(sample):
    for problem in sample:
        assert TASK.score(problem, problem.solution) is True
        assert TASK.score(problem, problem.solution + "1") is False


@pytest.mark.parametrize(
    "text", ["#### 1200", "####1200", "so ####   1,200.", "#### 1200\n", "####\n1200", "#### 1200 #### 7", "#### 01200"]
)
def test_spelling_of_the_right_answer_does_not_matter(text):
    assert TASK.score(Problem("a", "b", "1200"), text) is True


@pytest.mark.parametrize(
    "text",
    ["", "1200", "### 1200", "#### 7 #### 1200", "#### 12", "#### 1,20", "#### 12 00", "#### -1200", "#### 1200.5"],
)
def test_a_text_without_the_right_answer_after_the_first_mark_is_wrong(text):
    assert TASK.score(Problem("a", "b", "1200"), text) is False


def test_a_problem_without_a_reference_is_not_scored():
    assert TASK.score(Problem("a", "b"), "#### 3") is None


@pytest.mark.parametrize(("split", "limit"), [("dev", 3), ("test", 0), ("test", -1)])
def test_an_unknown_split_or_an_empty_limit_is_refused(split, limit):
    with pytest.raises(UsageError, match=r"splits are 'train' and 'test'|at least 1"):
        TASK.problems(split, limit, seed=0)
