from pathlib import Path

import pytest

from dcache.testing.golden import Case, cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = Path(metafunc.config.getoption("--golden", default=None) or Path(__file__).parent)
    found = list(cases(root.resolve()))
    metafunc.parametrize("case", found, ids=[case.name for case in found])


def test_a_recorded_run_is_reproduced_step_by_step(case: Case) -> None:
    if case.unsupported:
        pytest.skip(case.unsupported)
    case.check()
