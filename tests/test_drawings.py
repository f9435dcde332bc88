"""The drawings in docs/policies/img are of the policies as they are: each is drawn again from its recorded commits."""

import importlib.util
import sys
from functools import cache
from pathlib import Path

import pytest

import dcache
from dcache.calls import parse_call
from dcache.plugins import BUILT_IN, plugins

ROOT = Path(__file__).resolve().parents[1]


def load_tool():
    spec = importlib.util.spec_from_file_location("draw_rows", ROOT / "tools" / "draw_rows.py")
    tool = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tool  # its dataclasses look their module up
    spec.loader.exec_module(tool)
    return tool


tool = load_tool()


@cache
def model(name):
    return dcache.load_model(name, device="cpu", dtype="float32")


@pytest.mark.parametrize("drawing", tool.DRAWINGS, ids=lambda drawing: drawing.file)
def test_a_drawing_shows_what_its_policy_computes(drawing):
    drawn = (tool.FOLDER / f"{drawing.file}.svg").read_text()
    order = tool.order_of(drawn)
    assert sum(map(len, order)) == tool.SIZE["gen_length"]
    again = tool.draw(drawing, model(drawing.model), order)
    assert again == drawn, f"draw it again: python tools/draw_rows.py {drawing.file}"


def test_each_built_in_policy_has_a_drawing_of_its_name():
    names = {name for name, entry in plugins().policies.entries.items() if entry.source == BUILT_IN}
    drawn = {drawing.file: parse_call(drawing.policy).name for drawing in tool.DRAWINGS}
    assert {name for name in names if drawn.get(name) != name} == set()


def test_no_drawing_is_left_over():
    assert {path.stem for path in tool.FOLDER.iterdir()} == {drawing.file for drawing in tool.DRAWINGS}


def test_a_drawing_of_other_rows_is_told_apart():
    """The comparison would notice a policy that computes something else."""
    order = tool.order_of((tool.FOLDER / "dkv.svg").read_text())
    other = tool.Drawing("dkv", "dkv(interval=4)")
    llada = model("tiny-llada")
    assert tool.draw(other, llada, order) != tool.draw(tool.Drawing("dkv", "dkv"), llada, order)
