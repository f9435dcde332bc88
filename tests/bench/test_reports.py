"""What is written down can be read again, and nothing else can."""

import json

import pytest

import dcache
from dcache.bench.conditions import COMMIT, commit
from dcache.bench.reports import (
    Ceilings,
    Conditions,
    EndToEndReport,
    EndToEndSettings,
    FloorPoint,
    FloorReport,
    Gaps,
    KernelReport,
    KernelResult,
    PolicyResult,
    Split,
    Times,
    read,
    write,
)
from dcache.bench.tables import combined, tables

CONDITIONS = Conditions(
    dcache="0.1.0", commit="abc1234", python="3.12.3", torch="2.11.0+cu130", triton="3.6.0", cuda="13.0", device="cuda",
    device_name="Example GPU", driver="580.1", threads=None, dtype="bfloat16", model="llada-8b:random",
    n_parameters=8015581184, started="2026-01-01T00:00:00+00:00",
)  # fmt: skip
TIMES = Times(n=6, p5=4.0, p50=4.5, p95=6.0, mean=4.6, floor=4.1, efficiency=0.8913)
RESULT = PolicyResult(
    policy="elastic", batch=1, tokens_per_step=1, unmask="low-confidence(tokens_per_step=1)", graphs=True, captured=7,
    repeats=3, steps=2, all=TIMES, one_pass=TIMES, repeat_p50=[4.5, 4.4, 4.6], tok_s=210.5, rows=65.25, nfe=2.0,
    peak_bytes=18 * 2**30, store_bytes=2**30, trace_ms=[4.5, 5.5], trace_floor=[4.1, 4.1], trace_rows=[64, 66.5],
    trace_passes=[1, 2],
    split=[Split(steps=16, passes=1, wall=4.6, groups={"products": 4.0, "rest": 0.1}, host=0.2)],
    gaps=Gaps(steps=16, second_passes=1, syncs=1.06, most_syncs=2, largest_gap_us=12.5, idle_between=0.08, idle=0.031,
              idle_mean=0.04, idle_decodes=(0.033, 0.029, 0.031), idle_probes=(66.0, 51.0, 50.0)),
)  # fmt: skip
POINT = FloorPoint(rows=16, head_rows=0, ms=4.0, tflop_s=55.5, tb_s=3.6)
REPORTS = [
    KernelReport(
        conditions=CONDITIONS.model_copy(update={"model": None, "n_parameters": None}),
        ceilings=Ceilings(copy_tb_s=4.2, product_tflop_s=790.0),
        results=[
            KernelResult(
                op="attend", model="llada-8b", size="16 rows", error=1e-3, us=12.5, twin_us=50.0, n_bytes=10**7
            ),
            KernelResult(op="probs", model="llada-8b", size="16 rows", failure="wrong | by 3"),
        ],
    ),
    FloorReport(conditions=CONDITIONS, results=[POINT]),
    EndToEndReport(conditions=CONDITIONS, settings=EndToEndSettings(batch=(1, 8)), floor=[POINT], results=[RESULT]),
]
each_report = pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.kind)


@each_report
def test_a_report_is_read_as_it_was_written(report, tmp_path):
    write(report, tmp_path / "new" / "report.json")
    assert read(tmp_path / "new" / "report.json") == report


@each_report
def test_conditions_come_first(report, tmp_path):
    write(report, tmp_path / "report.json")
    assert list(json.loads((tmp_path / "report.json").read_text()))[:2] == ["kind", "conditions"]


def test_lists_of_numbers_stand_on_one_line(tmp_path):
    write(REPORTS[2], tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert '"trace_ms": [4.5, 5.5]' in text
    assert '"batch": [1, 8]' in text


@pytest.mark.parametrize("text", ["", "[]", '{"kind": "other"}', '{"kind": "floor"}'])
def test_other_files_are_refused_by_name(text, tmp_path):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(dcache.UsageError, match=r"other\.json is not a report of dcache bench"):
        read(file)
    with pytest.raises(dcache.UsageError, match=r"gone\.json cannot be read"):
        read(tmp_path / "gone.json")


@each_report
def test_tables_state_the_conditions_and_have_a_cell_for_every_title(report):
    first, *_ = tables(report)
    for what in ("bfloat16", "Example GPU", "driver 580.1", "2.11.0", "3.6.0", "0.1.0 (abc1234)"):
        assert what in first.heading
    for table in tables(report):
        assert {len(row) for row in table.rows} == {len(table.titles)}
        lines = table.plain().splitlines()
        assert all(row[0].split("|")[0] in lines[2 + i] for i, row in enumerate(table.rows))


def test_the_table_of_policies_shows_times_floor_split_and_gaps():
    page = combined(tables(REPORTS[2]))
    cells = [cell.strip() for cell in page.splitlines()[4].split("|")[1:-1]]
    assert cells[:9] == ["elastic", "1", "1", "4.50", "4.00", "6.00", "4.60", "4.10", "89 %"]
    assert "| elastic, batch 1, 1 a step | 1 | 16 | 4.60 | 4.00 |" in page.replace("products", "")
    assert "| 1.06 | 2 | 12.5 | 3.10 % | 2.90 to 3.30 % | 4.00 % | 3.00 % (2 of 3) |" in page


def test_a_profile_that_failed_is_told_below_the_times():
    missing = RESULT.model_copy(update={"split": [], "gaps": None, "unprofiled": "out of memory"})
    page = combined(tables(REPORTS[2].model_copy(update={"results": [missing]})))
    assert "elastic, batch 1, 1 a step: no profile: out of memory" in page
    assert "| elastic | 1 | 1 | 4.50 |" in page


def test_a_kernel_that_is_wrong_has_no_time_in_the_table():
    page = combined(tables(REPORTS[0]))
    assert "| probs, 16 rows | llada-8b | - | - | - |" in page
    assert "wrong \\| by 3" in page
    assert "| attend, 16 rows | llada-8b | 12.5 | 50.0 | 4.00 |" in page


def test_the_commit_can_be_given_where_there_is_no_history(monkeypatch):
    monkeypatch.setenv(COMMIT, "feedbee")
    assert commit() == "feedbee"
