"""``dcache report`` and ``dcache compare --report``."""

import sys
from pathlib import Path

import pytest

from dcache.cli import main
from dcache.results import FILE as RESULTS
from dcache.view import papers
from dcache.view.data import Chapter
from dcache.view.recording import FILE, Recorder, read_recordings

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests" / "golden" / "models" / "llada_mha"
COMPARE = [
    "compare",
    "--model",
    str(MODEL),
    "--device",
    "cpu",
    "--gen-length",
    "8",
    "--limit",
    "2",
    "--policies",
    "dkv",
]


def said(capsys, *arguments):
    return main(list(map(str, arguments))), *capsys.readouterr()


def test_compare_writes_results_recordings_and_the_page_and_continues_them(capsys, tmp_path):
    folder = tmp_path / "run"
    code, out, err = said(capsys, *COMPARE, "--report", folder, "--report-texts", 1)
    assert code == 0
    verdict = out.strip().split("\n\n")[-1]  # wrapped, so it may have two lines
    assert verdict.startswith(("dkv was fastest", "No policy", "none"))
    assert err.splitlines()[-4:] == [
        "recording 1 text of each policy for the report, which is not measured",
        "recorded none, 1 of 2",
        "recorded dkv, 2 of 2",
        f"report: {folder / 'report.html'}",
    ]
    before = (folder / FILE).read_bytes()
    (folder / "report.html").unlink()
    code, _, err = said(capsys, *COMPARE, "--report", folder, "--report-texts", 1)
    assert (code, (folder / FILE).read_bytes()) == (0, before)
    assert "recording" not in err
    assert (folder / "report.html").exists()


def test_ctrl_c_while_recording_keeps_what_is_recorded_and_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    record, calls = Recorder._record, []

    def interrupting(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return record(*given)

    monkeypatch.setattr(Recorder, "_record", interrupting)
    code, _, err = said(capsys, *COMPARE, "--report", tmp_path, "--report-texts", 1)
    assert code == 130
    assert err.endswith(f"to record the rest, repeat the command with --report {tmp_path}\n")
    assert {policy for _, policy in read_recordings(tmp_path / FILE)[1]} == {"none"}
    code, _, err = said(capsys, *COMPARE, "--report", tmp_path, "--report-texts", 1)
    assert (code, "recorded dkv, 1 of 1" in err) == (0, True)


def test_drift_is_measured_on_request(capsys, tmp_path):
    code, *_ = said(capsys, *COMPARE, "--report", tmp_path, "--report-texts", 1, "--measure-drift")
    assert code == 0
    assert all(recording.drift is not None for recording in read_recordings(tmp_path / FILE)[1].values())
    assert "KV drift by layer" in (tmp_path / "report.html").read_text()


def test_report_takes_several_runs_and_writes_where_it_is_told(capsys, made, tmp_path, monkeypatch):
    for name in "ab":
        made.save(tmp_path / name, made.conditions(made.entrant("none"), model=name), [made.result("none")])
    out = tmp_path / "both.html"
    assert said(capsys, "report", tmp_path / "a", tmp_path / "b", "--out", out)[:2] == (0, f"{out}\n")
    assert "What differs between the comparisons" in out.read_text()
    few = [next(papers.drawings([Chapter.read(0, tmp_path / "a")]))]
    monkeypatch.setattr(papers, "drawings", lambda chapters: few)
    code, told, _ = said(capsys, "report", tmp_path / "a", "--figures", tmp_path / "figures")
    assert code == 0
    files = ["a/report.html", "figures/accuracy-against-tok-s.svg", "figures/accuracy-against-tok-s.png"]
    assert told.splitlines() == [str(tmp_path / file) for file in files]
    assert all((tmp_path / file).exists() for file in files)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "nowhere/results.jsonl cannot be read"),
        ([*COMPARE, "--measure-drift"], "--measure-drift is about the report; give --report DIR too"),
        ([*COMPARE, "--report", "a", "--out", "b"], "--report a holds the results too; leave --out b out"),
    ],
)
def test_mistakes_are_told_in_a_line(capsys, arguments, message):
    code, out, err = said(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_without_plotly_nothing_is_compared(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    code, out, err = said(capsys, *COMPARE, "--report", tmp_path)
    assert (code, out) == (2, "")
    assert "pip install 'dcache[report]'" in err
    assert not (tmp_path / RESULTS).exists()
