"""The page is one file, lets nothing in or out, and shows what it is given as text."""

import base64
import hashlib
import json
import os
import re
import sys
from html.parser import HTMLParser

import pytest

from dcache import UsageError
from dcache.view import figures, page
from dcache.view.data import Chapter

HOSTILE = "</script></pre><img src=x onerror=alert(1)>&lt;<b>\"'{{7*7}}<!--"


class Reader(HTMLParser):
    """Tags with their attributes, the text of each kind of element, and scripts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.scripts, self.text, self._in = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        while self._in and self._in.pop() != tag:
            pass

    def handle_data(self, data):
        if self._in and self._in[-1] == "script":
            attrs, text = self.scripts[-1]
            self.scripts[-1] = attrs, text + data
        elif "style" not in self._in:
            self.text.append(data)


@pytest.fixture(scope="module")
def hostile(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    names = ["none", f"p{HOSTILE}"]
    entrants = [made.entrant("none"), made.entrant(names[1], HOSTILE, unmask=HOSTILE, knob=HOSTILE)]
    results = [made.result(n, HOSTILE, text=HOSTILE, canvas=(i, 2, 3, 4)) for i, n in enumerate(names, 1)]
    pieces = {i: HOSTILE for i in range(10)}
    recordings = [
        made.recording(
            n, HOSTILE, question=HOSTILE, answer=HOSTILE, pieces=pieces, text=HOSTILE, ends=[], canvas=[i, 2, 3, 4]
        )
        for i, n in enumerate(names, 1)
    ]
    conditions = made.conditions(*entrants, model=HOSTILE, task=HOSTILE, device_name=HOSTILE)
    made.save(folder, conditions, results, recordings)
    return Reader(page.render([folder, folder]))


def test_no_tag_comes_from_a_text(hostile):
    kinds = {tag for tag, _ in hostile.tags}
    assert not kinds & {"img", "iframe", "object", "embed", "link", "base", "form", "input"}
    assert not [name for _, attrs in hostile.tags for name in attrs if name.startswith("on")]
    assert [attrs.get("type") for attrs, _ in hostile.scripts if not attrs.get("type")] == [None, None]


def test_hostile_texts_are_shown_as_they_are(hostile):
    shown = "".join(hostile.text)
    assert (
        shown.count(HOSTILE) >= 8
    )  # title, conditions, policies, questions, answers, texts; no template in them is filled in


def test_data_in_scripts_holds_no_character_of_html(hostile):
    data = [text for attrs, text in hostile.scripts if attrs.get("type") == "application/json"]
    assert len(data) > 6
    for text in data:
        assert not set("<>&") & set(text)
        json.loads(text)


def test_labels_that_plotly_reads_as_html_are_escaped(hostile):
    for attrs, text in hostile.scripts:
        if attrs.get("type") == "application/json":
            for variant in json.loads(text).values():
                labels = [t.get("name") for t in variant["data"]] + [
                    x for t in variant["data"] for x in t.get("text") or []
                ]
                assert not [each for each in labels if each and "<img" in each]


def test_nothing_is_loaded_from_anywhere(hostile):
    assert [attrs for _, attrs in hostile.tags if {"src", "srcset", "data"} & attrs.keys()] == []
    links = [attrs["href"] for tag, attrs in hostile.tags if "href" in attrs]
    assert all(link.startswith("#") for link in links)
    (policy,) = (a["content"] for t, a in hostile.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
    assert "unsafe-eval" not in policy


def test_the_two_scripts_of_the_page_are_those_that_its_policy_allows(hostile):
    (policy,) = (a["content"] for t, a in hostile.tags if a.get("http-equiv") == "Content-Security-Policy")
    scripts = [text for attrs, text in hostile.scripts if not attrs.get("type")]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes


def test_plotly_is_there_once(hostile):
    assert len([text for _, text in hostile.scripts if len(text) > 10**6]) == 1


def test_the_label_of_a_point_on_a_curve_has_its_knob_even_at_the_default(made, tmp_path):
    entrants = [
        made.entrant("none"),
        made.entrant("dkv", interval=8),
        made.entrant("dkv(interval=4)", "dkv", interval=4),
    ]
    made.save(tmp_path, made.conditions(*entrants), [made.result(entrant.policy) for entrant in entrants])
    chapter = Chapter.read(0, tmp_path)
    found = figures.tradeoff([chapter], figures.Palette([chapter]), "any").variants["0-0"]["data"]
    (curve,) = (trace for trace in found if trace["mode"] == "lines+markers")
    assert curve["name"] == "dkv (interval)"
    assert ["interval: 4" in curve["text"][0], "interval: 8" in curve["text"][1]] == [True, True]


@pytest.mark.parametrize("code", ["x = '</script>'", "x = '<!--'", "x = '</SCRIPT'"])
def test_no_string_in_code_ends_its_script(code):
    assert "</script" not in page.script(code).lower()
    assert "<!--" not in page.script(code)


def test_a_comparison_without_results_or_recordings_still_has_a_page(made, tmp_path):
    made.save(tmp_path / "none", made.conditions(made.entrant("none"), made.entrant("dkv")), [made.result("none")])
    made.save(tmp_path / "some", made.conditions(made.entrant("none")), [made.result("none", text=None, correct=None)])
    assert "No problem was finished by all policies yet." in page.render([tmp_path / "none"])
    assert "No steps were recorded" in page.render([tmp_path / "some"])


def test_a_recording_that_took_another_way_is_told(made, tmp_path):
    conditions = made.conditions(made.entrant("none"))
    made.save(tmp_path, conditions, [made.result("none")], [made.recording("none", same=False)])
    assert "took another way" in page.render([tmp_path])


def test_a_page_is_written_whole_or_not_at_all(made, tmp_path, monkeypatch):
    made.save(tmp_path, made.conditions(made.entrant("none")), [made.result("none")])
    out = tmp_path / "report.html"
    out.write_text("before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UsageError, match=r"cannot be written to .*report\.html: No space left on device"):
        page.write([tmp_path], out)
    assert out.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.jsonl"]


def test_a_folder_that_cannot_be_made_is_said(made, tmp_path):
    made.save(tmp_path, made.conditions(made.entrant("none")), [made.result("none")])
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"the report cannot be written to"):
        page.write([tmp_path], tmp_path / "file" / "report.html")


def test_without_plotly_the_extra_is_named(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(UsageError, match=r"pip install 'dcache\[report\]'"):
        page.render([tmp_path])
