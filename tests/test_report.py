"""The table, its summary and its warnings, from results made up for the purpose."""

import csv
import io
import json

import pytest

from dcache import report
from dcache.formats import FORMATS, latex, page
from dcache.regions import Region
from dcache.results import Conditions, Entrant, Result
from dcache.text import printable

SETTINGS = {
    "temperature": 0.0,
    "forbid_eos": False,
    "eos_last": "off",
    "after_end": "drop",
    "gen_length": 4,
    "block_length": 2,
    "unmask": "low-confidence",
    "batch_size": 1,
}


def conditions(*policies, **changes):
    entrants = [
        Entrant(policy=p, name=p, source="dcache", knobs={"interval": 8} if p == "dkv" else {}, unmask="low-confidence")
        for p in policies
    ]
    facts = {
        "dcache": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "triton": None, "device": "cpu",
        "device_name": "Example CPU", "threads": 2, "dtype": "float32", "model": "tiny", "n_parameters": 3_600_000,
        "weights": "0", "task": "gsm-mini", "split": "test", "limit": 2, "n_problems": 2, "seed": 0, "repeats": 1,
        "settings": SETTINGS, "policies": entrants, "started": "2025-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Conditions(**(facts | changes))


def result(policy, problem="a", repeat=0, canvas=(1, 2, 3, 4), n_tokens=None, seconds=1.0, **changes):
    n_tokens = len(canvas) if n_tokens is None else n_tokens
    facts = {
        "repeat": repeat, "problem": problem, "prompt": "0", "policy": policy, "text": "", "correct": True,
        "tokens": canvas[:n_tokens], "canvas": canvas, "n_tokens": n_tokens, "nfe": 4, "seconds": seconds, "batch": 1,
        "row_layers": 80, "kv_row_layers": 80, "full_row_layers": 80, "row_share": 1.0, "refreshes": 4,
        "step_ms": [1.0, 2.0, 3.0, 4.0], "peak_bytes": None, "cache_bytes": 3 * 2**19,
    }  # fmt: skip
    return Result(**(facts | changes))


def standings(results, **changes):
    given = conditions(*dict.fromkeys(r.policy for r in results), **changes)
    return report.standings(given, results)


FASTER = {"row_layers": 20, "row_share": 0.25, "refreshes": 1, "step_ms": [0.5, 0.5, 0.5, 2.0]}
RESULTS = [
    result("none", "a"),
    result("none", "b", correct=False),
    result("elastic", "a", seconds=0.25, **FASTER),
    result("elastic", "b", seconds=0.25, canvas=(1, 9, 3, 4), correct=False, **FASTER),
    result("dkv", "a", seconds=1.25),
    result("dkv", "b", seconds=1.25, correct=False),
]

TABLE = """\
tiny (3.6M), float32, CPU Example CPU, 2 threads, torch 2.13.0, dcache 0.1.0;
gsm-mini test, 2 problems, gen 4, block 2, low-confidence, seed 0
policy   accuracy  agreement  tok/s  speedup  NFE  tokens/   rows  refreshes      step ms  cache
             of 2                                  forward                      p50 / p95    MiB
none         50 %      1.000    4.0     1.00    4     1.00  100 %          4  2.50 / 4.00   1.50
elastic      50 %      0.875   16.0     4.00    4     1.00   25 %          1  0.50 / 2.00   1.50
dkv          50 %      1.000    3.2     0.80    4     1.00  100 %          4  2.50 / 4.00   1.50

elastic was fastest, at 4.00 times the tok/s of none; accuracy 50 % (none: 50 %), agreement 0.875.
"""


def test_the_table_is_exactly_this():
    given = conditions("none", "elastic", "dkv")
    assert report.table(given, report.standings(given, RESULTS)) == TABLE


def test_no_line_of_the_table_is_wider_than_100_columns():
    slow = {"nfe": 96, "step_ms": [101.234] * 96, "cache_bytes": 900 * 2**20, "seconds": 0.01, "refreshes": 3}
    results = [result(p, problem, **slow) for p in ("none", "elastic", "dkv") for problem in "abcdefghijkl"]
    given = conditions("none", "elastic", "dkv", n_problems=12)
    assert max(map(len, report.table(given, report.standings(given, results)).splitlines())) <= 100


def test_the_markdown_table_has_the_same_cells():
    given = conditions("none", "elastic", "dkv")
    lines = report.markdown(given, report.standings(given, RESULTS)).splitlines()
    assert lines[2].startswith("| policy | accuracy of 2 | agreement | tok/s | speedup | NFE | tokens/forward | rows |")
    assert lines[5] == ("| elastic | 50 % | 0.875 | 16.0 | 4.00 | 4 | 1.00 | 25 % | 1 | 0.50 / 2.00 | 1.50 |")
    assert lines[-1].startswith("elastic was fastest")


def test_json_and_csv_hold_the_numbers_behind_the_table():
    given = conditions("none", "elastic", "dkv")
    rows = report.standings(given, RESULTS)
    read = json.loads(report.as_json(given, rows))
    assert [row["speedup"] for row in read["policies"]] == [1.0, 4.0, 0.8]
    assert read["conditions"]["model"] == "tiny"
    table = list(csv.DictReader(io.StringIO(report.as_csv(given, rows))))
    assert [row["agreement"] for row in table] == ["1.0", "0.875", "1.0"]
    assert table[0]["peak_bytes"] == ""


def part(rows, row_layers, refreshed=0, refreshes=0):
    return Region(
        rows=rows, row_layers=row_layers, kv_row_layers=row_layers, full_row_layers=8 * rows,
        refreshed_row_layers=refreshed, refreshes=refreshes,
    )  # fmt: skip


def regions(image, text, generated):
    return {"image": image, "text": text, "generated": generated}


PICTURED = [
    result("none", "a", regions=regions(part(6, 48, 48, 4), part(2, 16, 16, 4), part(2, 16, 16, 4))),
    result("none", "b", regions=regions(part(0, 0), part(8, 64, 64, 4), part(2, 16, 16, 4))),
    result("dkv", "a", regions=regions(part(6, 12, 12, 1), part(2, 8, 4, 1), part(2, 16, 16, 4))),
    result("dkv", "b", regions=regions(part(0, 0), part(8, 32, 16, 2), part(2, 12, 8, 2))),
]

BY_REGION = """\
policy  image   image      image   text    text       text  generated  generated  generated
         rows  of all  refreshes   rows  of all  refreshes       rows     of all  refreshes
none    100 %    30 %          4  100 %    50 %          4      100 %       20 %          4
dkv      25 %    15 %          1   50 %    50 %        1.5       88 %       35 %          3
"""


def test_rows_and_refreshes_by_region_stand_below_the_table():
    given = conditions("none", "dkv")
    rows = report.standings(given, PICTURED)
    assert BY_REGION in report.table(given, rows)
    assert "| policy | image rows | image of all | image refreshes | text rows |" in report.markdown(given, rows)
    assert latex(given, rows).count(r"\begin{tabular}") == page(given, rows, []).count("<table>") == 2
    dkv = rows[1].regions
    assert dkv["image"].refreshed_share == 12 / 48
    assert [p.of_refreshed for p in dkv.values()] == [12 / 56, 20 / 56, 24 / 56]


def test_json_and_csv_hold_the_regions():
    given = conditions("none", "dkv")
    rows = report.standings(given, PICTURED)
    read = json.loads(report.as_json(given, rows))["policies"][1]["regions"]
    assert read["image"]["row_share"] == 0.25
    table = list(csv.DictReader(io.StringIO(report.as_csv(given, rows))))
    assert table[1]["image_row_share"] == "0.25"
    assert table[1]["generated_refreshes"] == "3.0"
    earlier = list(
        csv.DictReader(io.StringIO(report.as_csv(given, report.standings(given, [result("none"), result("dkv")]))))
    )
    assert earlier[0]["image_row_share"] == ""


def test_results_of_an_earlier_version_leave_a_dash():
    mixed = [result("none", "a"), *PICTURED[1:]]
    rows = standings(mixed)
    assert rows[0].regions is None
    assert report.by_region(rows)[2].split() == ["none", *["-"] * 9]


# Definitions


@pytest.mark.parametrize(
    ("canvas", "n_tokens", "share"),
    [
        ((1, 2, 0, 0), 2, 1.0),  # the same text
        ((1, 2, 3, 0), 3, 2 / 3),  # a longer text: its end counts
        ((1, 0, 0, 0), 1, 1 / 2),  # a shorter one: that of the other counts
        ((7, 8, 0, 0), 2, 0.0),
    ],
)
def test_agreement_counts_equal_tokens_up_to_the_end_of_the_longer_text(canvas, n_tokens, share):
    assert report.agreement(
        result("x", canvas=canvas, n_tokens=n_tokens), result("y", canvas=(1, 2, 0, 0), n_tokens=2)
    ) == (pytest.approx(share))


def test_two_empty_texts_agree():
    empty = result("x", canvas=(0, 0), n_tokens=0)
    assert report.agreement(empty, empty) == 1


def test_agreement_of_the_reference_with_itself_is_1():
    assert standings(RESULTS)[0].agreement == 1


def test_tok_s_divides_all_tokens_by_all_seconds():
    rows = standings([result("none", "a", seconds=1), result("none", "b", n_tokens=1, seconds=9)])
    assert rows[0].tok_s == pytest.approx(5 / 10)


def test_repeats_give_the_standard_deviation_and_carry_it_through_the_ratio():
    times = {"none": (1.0, 0.5), "elastic": (0.25, 0.125)}  # 4 and 8, then 16 and 32 tokens per second
    results = [result(name, repeat=r, seconds=s) for name, both in times.items() for r, s in enumerate(both)]
    none, elastic = standings(results, repeats=2)
    assert (none.tok_s, elastic.tok_s) == (6, 24)
    assert none.tok_s_std == pytest.approx(8**0.5)
    assert elastic.speedup == 4
    assert elastic.speedup_std == pytest.approx(4 * (2 * (8**0.5 / 6) ** 2) ** 0.5)
    assert "24.0 ± 11.3" in report.table(conditions("none", "elastic", repeats=2), [none, elastic])


def test_one_repeat_shows_no_deviation():
    assert "±" not in TABLE
    assert all(row.tok_s_std is None and row.speedup_std is None for row in standings(RESULTS))


def test_problems_that_a_policy_has_not_finished_count_for_none():
    rows = standings(RESULTS[:-1])
    assert [row.n_results for row in rows] == [1, 1, 1]
    assert rows[0].accuracy == 1
    assert standings(RESULTS[:1] + RESULTS[3:4]) == []


def test_without_answers_there_is_no_accuracy_column():
    given = conditions("none", "dkv")
    rows = report.standings(given, [result("none", correct=None), result("dkv", correct=None)])
    assert "accuracy" not in report.table(given, rows)


def test_peak_memory_is_shown_on_a_gpu_alone():
    given = conditions("none", device="cuda", device_name="Example GPU", threads=None)
    text = report.table(given, report.standings(given, [result("none", peak_bytes=3 * 2**30)]))
    assert "float32, GPU Example GPU, torch" in text
    assert text.splitlines()[4].endswith("3.0")
    assert "GiB" not in TABLE


def test_a_reference_without_tokens_gives_no_speedup():
    given = conditions("none", "dkv")
    rows = report.standings(given, [result("none", n_tokens=0), result("dkv")])
    assert [row.speedup for row in rows] == [None, None]
    assert "none generated no token" in report.table(given, rows)


def test_the_summary_says_so_when_nothing_was_faster_than_the_reference():
    given = conditions("none", "dkv")
    rows = report.standings(given, [r for r in RESULTS if r.policy != "elastic"])
    assert report.summary(given, rows).startswith(
        "No policy was faster than none; dkv came closest, at 0.80 times its tok/s; accuracy 50 %"
    )


def test_an_empty_comparison_has_a_table_too():
    given = conditions("none", "dkv")
    for write in FORMATS.values():
        assert write(given, [])
    assert report.warnings(given, []) == []


# Warnings


def warned(results, **changes):
    given = conditions(*dict.fromkeys(r.policy for r in results), **changes)
    return report.warnings(given, report.standings(given, results))


GPU = {"device": "cuda", "threads": None}


def many(policy, n_right, n=400, **changes):
    return [result(policy, str(i), correct=i < n_right, **changes) for i in range(n)]


def test_a_sound_comparison_on_a_gpu_warns_of_nothing():
    assert warned(many("none", 300) + many("elastic", 300, **FASTER), n_problems=400, **GPU) == []


def test_a_policy_that_refreshed_at_every_step_is_named_with_its_knobs():
    found = warned(many("none", 300) + many("dkv", 300), n_problems=400, **GPU)
    assert found == [
        "dkv refreshed at every step, so it saved nothing. "
        "Try other knobs with --set dkv.KNOB=VALUE; it ran with interval=8."
    ]


def test_a_policy_that_computed_more_than_no_cache_is_named():
    found = warned(many("none", 300) + many("elastic", 300, row_layers=100, refreshes=2), n_problems=400, **GPU)
    assert found == [
        "elastic computed 125 % of the row-layers of no cache, so it saved nothing. It has no knobs; leave it out."
    ]


def test_an_accuracy_within_noise_names_the_number_of_problems_that_would_show_it():
    found = warned(many("none", 30, 40) + many("elastic", 28, 40, **FASTER), n_problems=40, **GPU)
    # 2 standard errors of the difference of 0.75 and 0.7 on n problems: 2 sqrt(0.3975 / n) = 0.05 at n = 636
    assert found == [
        "accuracy differs from that of none (elastic by 5 points), but on 40 problems that is within noise. "
        "About 636 would show a difference of this size: raise --limit."
    ]


def test_an_accuracy_beyond_noise_is_not_warned_about():
    assert warned(many("none", 300) + many("elastic", 200, **FASTER), n_problems=400, **GPU) == []


def test_few_problems_are_warned_about_once():
    found = warned(many("none", 9, 12) + many("elastic", 9, 12, **FASTER), n_problems=12, **GPU)
    assert found == [
        "with 12 problems an accuracy is uncertain by up to 29 points. Raise --limit to 100 or more before quoting it."
    ]


def test_a_reference_that_cannot_do_the_task_is_warned_about():
    (found,) = warned(many("none", 20) + many("elastic", 20, **FASTER), n_problems=400, **GPU)
    assert found.startswith("none itself answers only 5 % of the problems")


def test_times_on_a_cpu_are_warned_about():
    (found,) = warned(many("none", 300) + many("elastic", 300, **FASTER), n_problems=400)
    assert found.startswith("times on a CPU say little about a GPU")


def test_unequal_unmaskers_are_named():
    entrants = [
        Entrant(policy="none", name="none", source="dcache", knobs={}, unmask="low-confidence"),
        Entrant(policy="elastic", name="elastic", source="dcache", knobs={}, unmask="threshold"),
    ]
    results = many("none", 300) + many("elastic", 300, **FASTER)
    (found,) = warned(results, policies=entrants, n_problems=400, **GPU)
    assert found.startswith("the unmaskers differ: none with low-confidence, elastic with threshold.")


def test_an_unfinished_comparison_is_warned_about():
    (found,) = warned(many("none", 300) + many("elastic", 300, **FASTER), n_problems=500, **GPU)
    assert found.startswith("only 400 of 500 texts per policy are finished")


# Untrusted text


def test_control_characters_become_visible_escapes():
    assert printable("a\x1b[31mb\r\x07c\x9b\u202e\ud800") == "a\\x1b[31mb\\x0d\\x07c\\x9b\\u202e\\ud800"


def test_newlines_tabs_and_letters_of_any_script_stay():
    text = "a\tb\nç 你好 👩‍👧 [bold] ± ≥"
    assert printable(text) == text


def test_names_in_the_table_are_made_printable():
    given = conditions("none", model="\x1b[31mred")
    assert "\x1b" not in report.table(given, report.standings(given, [result("none")]))


def test_a_long_name_takes_a_line_of_its_own():
    name = "d2(current_k=8,confidence=latest,search=all,nucleus=above)"
    given = conditions("none", "dkv", name)
    lines = report.table(given, report.standings(given, [result(p) for p in ("none", "dkv", name)])).splitlines()
    at = lines.index(name)
    assert lines[at + 1].split() == lines[at - 1].split()[1:]
    assert lines[at + 1] == lines[at - 1].replace("dkv", "   ")
