"""`dcache verify`: what it prints, and how it ends."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dcache import CachePolicy, Plan, State
from dcache.cli import main
from dcache.plugins import plugins
from dcache.testing import Subject, search
from dcache.testing.claims import CLAIMS
from dcache.verify import verify

GOLDEN = Path(__file__).resolve().parent / "golden"
QUICK = ("the_same_seed_gives_the_same_run", "written_keys_and_values_are_fresh_projections")
RUNS = "decodes_every_canvas_to_the_end"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three claims instead of all, and little shrinking."""
    for name in list(CLAIMS):
        if name not in (RUNS, *QUICK):
            monkeypatch.delitem(CLAIMS, name)
    monkeypatch.setattr(search, "SHRINK_S", 1.0)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["verify", *arguments])
    return code, *capsys.readouterr()


@pytest.mark.usefixtures("quick")
def test_each_claim_is_a_line_and_the_last_line_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "dkv(interval=4)", "--examples", "2")
    head, *lines, last = out.splitlines()
    assert code == 0
    assert head.startswith("dkv(interval=4) (dcache), dcache ")
    assert lines[0] == "pass  decodes every canvas to the end"
    assert last == "3 pass, 0 fail, 0 not applicable"


@pytest.mark.usefixtures("quick")
def test_a_fault_is_told_with_its_smallest_example_and_exits_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything_but_the_window(self: object, state: State) -> Plan:
        return Plan(state.valid & ~state.needed | (state.step == 0)[:, None])

    monkeypatch.setattr(plugins().policies.get("dkv").thing, "plan", everything_but_the_window)
    code, out, _ = said(capsys, "dkv", "--examples", "3")
    assert code == 1
    assert "FAIL  decodes every canvas to the end" in out
    assert "smallest failing example: random model 0 with 3 layers and a logit shift of 0; 1 sequence of 1 + 4" in out
    assert "hold('decodes_every_canvas_to_the_end', 'dkv', Canvas(lengths=((1, 4),)" in out
    assert "not tried, since the policy does not run" in out
    assert out.splitlines()[-1] == "0 pass, 1 fail, 2 not applicable"


@pytest.mark.usefixtures("quick")
def test_recorded_runs_of_the_policy_are_replayed_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--examples", "1", "--golden", str(GOLDEN / "dkv"), "--format", "json")
    code, out, _ = said(capsys, "dkv", *options)
    verdicts = [v for v in json.loads(out)["verdicts"] if v["claim"].startswith("golden")]
    assert code == 0
    assert len(verdicts) > 10
    assert {v["status"] for v in verdicts} <= {"pass", "n/a"}
    _, out, _ = said(capsys, "elastic", *options)
    (verdict,) = (v for v in json.loads(out)["verdicts"] if v["claim"].startswith("golden"))
    assert verdict["status"] == "n/a"


@pytest.mark.usefixtures("quick")
def test_a_recorded_run_that_is_not_reproduced_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from dcache.policies.dkv import DKVCache

    plan = DKVCache.plan
    monkeypatch.setattr(DKVCache, "plan", lambda self, state: replace(plan(self, state), row_mask=state.valid))
    verdicts = [v for v in verify("dkv", examples=1, golden=GOLDEN / "dkv") if v.claim.startswith("golden")]
    wrong = next(v for v in verdicts if v.status == "fail")
    assert "sequence 0: commits: found" in str(wrong)
    assert f"c.name == {wrong.example!r}).check()" in wrong.snippet


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("elatsic",), "unknown policy 'elatsic'. Did you mean 'elastic'?"),
        (("dkv(intervall=4)",), "has no knob 'intervall'"),
        (("dkv", "--golden", "nowhere"), "--golden nowhere is not a folder"),
        (("dkv", "--format", "xml"), "unknown format 'xml'"),
        (("dkv", "--examples", "0"), "the check: examples=0: input should be greater than or equal to 1"),
        (("dkv", "--seed", "x"), "the check: seed='x': input should be a valid integer"),
        (("dkv", "--golden", str(GOLDEN.parent / "kernels")), "holds no recorded run of a known method"),
        (("dkv", "--model", "nowhere"), "no model 'nowhere'"),
    ],
)
def test_what_cannot_be_done_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    code, out, err = said(capsys, *arguments)
    assert (code, out) == (2, "")
    assert told in err


def test_the_kit_says_what_to_install_when_hypothesis_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import dcache.testing
    from dcache import UsageError

    for name in [name for name in sys.modules if name.partition(".")[0] == "hypothesis"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("kit", "search"):
        monkeypatch.delitem(sys.modules, f"dcache.testing.{name}", raising=False)
        monkeypatch.delattr(dcache.testing, name, raising=False)
    with pytest.raises(UsageError, match=r"pip install 'dcache\[test\]'"):
        _ = dcache.testing.Conformance


def test_an_exemption_names_a_claim_and_gives_a_reason() -> None:
    from dcache import UsageError
    from dcache.testing import Conformance

    with pytest.raises(UsageError, match="there is no claim 'batches'"):
        type("TestMine", (Conformance,), {"exempt": {"batches": "no"}})
    with pytest.raises(UsageError, match="without a reason"):
        type("TestMine", (Conformance,), {"exempt": {RUNS: " "}})


def test_an_exempt_claim_is_not_applicable_with_its_reason() -> None:
    from dcache.testing import Subject

    name = "a_batch_decodes_each_sequence_as_if_it_were_alone"
    verdict = search.judge(CLAIMS[name], Subject("d2(couple_batch=true)"), examples=1)
    assert (verdict.status, "as released" in verdict.detail) == ("n/a", True)


class NoDelay(CachePolicy):
    """Forgets to compute a committed row again with its token, until the next refresh does."""

    def plan(self, state: State) -> Plan:
        return Plan(state.valid & (state.masked | state.needed | (state.step % 4 == 0)[:, None]))


def test_a_short_patience_finds_a_delay_that_is_forgotten_between_close_refreshes() -> None:
    claim = CLAIMS["a_committed_row_is_computed_again_with_its_token"]
    assert search.judge(claim, Subject(NoDelay), 10, 0).status == "pass"
    verdict = search.judge(claim, Subject(NoDelay, patience=1), 10, 0)
    assert verdict.status == "fail"
    assert "patience=1" in verdict.snippet


def test_a_recorded_run_that_is_no_json_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cut.json").write_text('{"settings": {')
    code, out, err = said(capsys, "dkv", "--golden", str(tmp_path))
    assert (code, out) == (2, "")
    assert f"{tmp_path / 'cut.json'} is not readable JSON" in err
