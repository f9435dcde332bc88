"""Results where people work: frames, notebooks, papers. Whatever a policy is called, nothing of it is code there."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcache import CachePolicy, Comparison, Plan, UsageError, compare, generate, load_model
from dcache.formats import FORMATS, latex_text
from dcache.report import Standing

FOLDER = Path(__file__).resolve().parent / "golden" / "models" / "llada_mha"
SMALL = {"limit": 2, "gen_length": 8, "block_length": 8}
HOSTILE = '</td><script>alert("&amp;")</script>_$x^2$%\\input{a}'


class Hostile(CachePolicy):
    name = HOSTILE

    def plan(self, state):
        return Plan.all(state)


@pytest.fixture(scope="module")
def model():
    return load_model(FOLDER, device="cpu")


@pytest.fixture(scope="module")
def found(model):
    return compare(model, ["dkv"], repeats=2, **SMALL)


@pytest.fixture(scope="module")
def hostile(model):
    return compare(model, [Hostile()], **SMALL)


class Page(HTMLParser):
    """The tags and the text of a piece of HTML; unbalanced tags fail."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.cells = set(), [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag != "br":
            self.open.append(tag)
        if tag in ("td", "th", "p", "li", "div"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.cells[-1] += data


# Frames


def test_a_frame_by_policy_has_the_numbers_behind_the_table_and_those_of_the_csv(found):
    frame = found.to_pandas(by="policy")
    assert list(frame["policy"]) == ["none", "dkv"]
    assert list(frame["speedup"]) == [row.speedup for row in found.standings]
    assert set(Standing.__dataclass_fields__) - {"regions"} < set(frame.columns)
    assert list(frame.columns) == next(csv.reader(io.StringIO(found.table("csv"))))
    assert list(frame["generated_row_share"]) == [row.regions["generated"].row_share for row in found.standings]


def test_a_frame_by_text_has_a_row_for_each_text(found):
    assert len(found.to_pandas(by="text")) == len(found.to_pandas()) == len(found.results) == 8


def test_a_comparison_without_results_has_the_same_columns(found):
    empty = Comparison(found.conditions, [])
    assert list(empty.to_pandas(by="policy").columns) == list(found.to_pandas(by="policy").columns)
    assert len(empty.to_pandas(by="policy")) == 0


def test_a_frame_by_anything_else_is_refused(found):
    with pytest.raises(UsageError, match=r"by is 'problem'; choose 'text' or 'policy'"):
        found.to_pandas(by="problem")


# Formats


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_the_policies_and_ends_a_line(found, name):
    text = found.table(name)
    assert "none" in text
    assert "dkv" in text
    assert text.endswith("\n")
    assert Comparison(found.conditions, []).table(name).endswith("\n")


def test_a_format_that_there_is_not_is_refused(found):
    with pytest.raises(UsageError, match=r"unknown format 'html'; choose one of table, json, csv, markdown, latex"):
        found.table("html")


def test_latex_is_a_tabular_of_booktabs_with_the_cells_of_the_table(found):
    lines = found.table("latex").splitlines()
    comments = [line for line in lines if line.startswith("%")]
    body = [line.strip() for line in lines if not line.startswith("%")]
    assert comments[0].startswith("% llada_mha (181k), float32, ")
    assert "was fastest" in comments[-1] or "was faster" in comments[-1]
    assert body[0] == r"\begin{tabular}{lrrrrrrrrrr}"
    assert [body[i] for i in (1, 4, -2, -1)] == [r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"]
    rows = [[cell.strip() for cell in line[:-2].split("&")] for line in (*body[2:4], *body[5:-2])]
    assert [row[0] for row in rows] == ["policy", "", "none", "dkv"]
    assert {len(row) for row in rows} == {11}
    assert rows[2][1:3] == [r"0\,\%", "1.000"]
    assert r" $\pm$ " in rows[3][3]
    assert all(line.endswith(r" \\") for line in (*body[2:4], *body[5:-2]))


@given(st.text())
def test_no_text_is_a_command_of_latex(text):
    rest = latex_text(text)
    for command in (r"\textbackslash{}", r"\textasciitilde{}", r"\textasciicircum{}", r"\textless{}"):
        rest = rest.replace(command, "")
    rest = re.sub(r"\\(?:textgreater|textbar)\{\}|\$\\pm\$|\\textsuperscript\{2\}|\\,(?=\\%)|\\[&%$#_{}]", "", rest)
    assert not re.search(r"[\\&%$#_{}~^<>|\n]", rest)


def test_a_policy_with_a_hostile_name_is_text_in_every_format(hostile):
    body = [line for line in hostile.table("latex").splitlines() if not line.startswith("%")]
    assert any("textbackslash" in line for line in body)
    assert not any(r"\input" in line for line in body)
    assert json.loads(hostile.table("json"))["policies"][1]["policy"] == HOSTILE
    assert [row["policy"] for row in csv.DictReader(io.StringIO(hostile.table("csv")))] == ["none", HOSTILE]


# Notebooks


def test_a_notebook_shows_the_table_the_summary_and_the_warnings(found):
    page = Page(found._repr_html_())
    for text in ("none", "dkv", "1.000", *found.warnings):
        assert text in page.cells
    assert any("fastest" in cell or "faster" in cell for cell in page.cells)
    assert Page(Comparison(found.conditions, [])._repr_html_()).cells[-1].startswith("No problem was finished")


def test_a_notebook_shows_hostile_names_and_texts_as_text(model, hostile, monkeypatch):
    page = Page(hostile._repr_html_())
    assert HOSTILE in page.cells
    plain = {"div", "p", "table", "thead", "tbody", "tr", "th", "td", "br", "small", "details", "summary", "ul", "li"}
    assert page.tags <= plain
    monkeypatch.setattr("dcache.models.loading.Model.text", lambda self, ids: f"{HOSTILE}\x1b[2J\n")
    page = Page(generate(model, "Ann", gen_length=4)._repr_html_())
    assert page.cells[-1].startswith(f"{HOSTILE}\\x1b[2J\n")
    assert page.tags <= plain


def test_in_a_terminal_a_comparison_is_its_table_and_its_repr_one_line(found, hostile):
    class Printer:
        def text(self, text):
            self.shown = text

    printer = Printer()
    found._repr_pretty_(printer, False)
    assert printer.shown == found.table()
    assert repr(found) == "<Comparison of none, dkv on gsm-mini by llada_mha, 8 texts>"


def test_the_repr_of_an_output_leaves_the_arrays_out(model):
    output = generate(model, "Ann", gen_length=4)
    assert len(repr(output)) < 1000
    assert "4 forward calls" in output._repr_html_()
