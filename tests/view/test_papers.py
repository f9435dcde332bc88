"""Figures for papers: every kind is written, as SVG and PNG, with the words of the data in it."""

import sys

import numpy as np
import pytest

from dcache import UsageError
from dcache.view import papers
from dcache.view.drift import MEASURES, WHERE
from dcache.view.packed import Packed

SWEEP = ("elastic(gamma=0.5)", "elastic(gamma=0.9)")


@pytest.fixture(scope="module")
def drawn(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("papers")
    entrants = [made.entrant("none"), *(made.entrant(p, "elastic", gamma=float(p[-4:-1])) for p in SWEEP)]
    results = [made.result(entrant.policy, step_ms=[1.0, 2.0], repeat=r) for entrant in entrants for r in (0, 1)]
    drift = Packed.floats(
        np.linspace(0, 1, len(MEASURES) * 2 * 2 * len(WHERE)).reshape(len(MEASURES), 2, 2, len(WHERE))
    )
    recordings = [made.recording("none"), made.recording(SWEEP[0], drift=drift)]
    made.save(folder, made.conditions(*entrants, repeats=2), results, recordings)
    return papers.write([folder], folder / "figures")


def test_every_figure_is_written_as_svg_and_png(drawn):
    svg = sorted(file.stem for file in drawn if file.suffix == ".svg")
    assert sorted(file.stem for file in drawn if file.suffix == ".png") == svg
    kinds = {
        "accuracy-against-tok-s", "agreement-against-row-share", "sweep-elastic-gamma-accuracy", "map-none-a",
        "layers-none-a", "drift-K-distance-elastic-gamma-0.5-a", "commits-a", "step-times", "time-split",
    }  # fmt: skip
    assert kinds <= set(svg)
    assert len(set(svg)) == len(svg)
    assert all(file.stat().st_size > 2000 for file in drawn)


def test_words_stay_words(drawn):
    texts = {file.stem: file.read_text() for file in drawn if file.suffix == ".svg"}
    assert "denoising step" in texts["map-none-a"]
    assert SWEEP[0] in texts["step-times"]
    assert "Pareto front" in texts["accuracy-against-tok-s"]


def test_a_name_is_made_fit_for_a_file():
    assert papers.slug("map-../../etc/passwd $x") == "map-..-..-etc-passwd-x"
    assert "/" not in papers.slug("a/b\\c")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'dcache\[plot\]'"):
        papers.write([tmp_path], tmp_path)
