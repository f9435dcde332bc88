"""Draw which rows each policy computes, step by step, from real runs: ``python tools/draw_rows.py [name ...]``.

Writes ``docs/policies/img/*.svg``, one for each entry of `DRAWINGS`. The SVG is written as text, so that it needs no
plotting library, its words stay words, and the same run gives the same bytes.

A drawing holds the order in which its run committed positions. A test replays that order and compares the whole file:
so sure a model ties many confidences, and which of them comes first would depend on how a machine rounds.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass, replace
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dcache
from dcache import Seen, State
from dcache.generate import Prompt, Runner, policy_of, settings_from, unmasker_of
from dcache.models.loading import Model
from dcache.state import Embeddings, Span
from dcache.trace import Trace
from dcache.unmasking.base import Ask, Asked, Picks, Unmasker, Update

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "policies" / "img"
PROMPT = (
    "Ann finds 8 shells on Monday and 7 the day after. Then Ann loses 5 of them. How many shells does Ann have now?"
)
SIZE = {"gen_length": 32, "block_length": 16}

CELL, LEFT, TOP, RIGHT = 10, 44, 60, 62  # in units of the viewBox
LIGHT, DARK = np.array([222, 235, 247]), np.array([8, 69, 148])  # one layer computed, all layers computed
STYLE = """\
text { font-family: "DejaVu Sans", Verdana, Helvetica, Arial, sans-serif; font-size: 9px; fill: #222 }
.title { font-size: 13px; font-weight: bold }
.end { text-anchor: end } .middle { text-anchor: middle }
.edge { stroke: #555; stroke-width: 1.2; fill: none } .grid { stroke: #e4e4e4; stroke-width: .5; fill: none }
.prompt { fill: #d9d9d9 } .block { fill: #f0f0f0; stroke: #555; stroke-width: .5 }
.commit { fill: #ff8c1a; stroke: #fff; stroke-width: .8 } .hatch { stroke: #fff; stroke-width: 1.3 }"""


@dataclass(frozen=True)
class Drawing:
    """One picture: a policy on a model under an unmasker."""

    file: str
    policy: str
    unmask: str = "low-confidence"
    model: str = "tiny-llada"
    known: tuple[int, int] | None = None  # prompt rows that stand for an image of the request before, also decoded


DRAWINGS = [
    Drawing("none", "none"),
    Drawing("elastic", "elastic(gamma=0.985,window=8)"),
    Drawing("dkv", "dkv"),
    Drawing("dkv-prefill", "dkv(variant=prefill)"),
    Drawing("dkv-pd", "dkv(variant=pd)"),
    Drawing("dkv-dream", "dkv", model="tiny-dream"),
    Drawing("dkv-greedy", "dkv(variant=greedy,neighbours=2)", "random-order"),
    Drawing("fast-dllm", "fast-dllm"),
    Drawing("fast-dllm-prefix", "fast-dllm(mode=prefix)"),
    Drawing("fast-dllm-dream", "fast-dllm", model="tiny-dream"),
    Drawing("d2", "d2(current_k=8)", "certainty-prior"),
    Drawing("dllm-cache", "dllm-cache(prompt_interval=12,gen_interval=6)"),
    Drawing("freecache", "freecache(block_length=16)"),
    Drawing("suffix", "suffix(window=4)"),
    Drawing("es-dllm", "es-dllm(first=0,second=1)"),
    Drawing("sparse-dllm", "sparse-dllm"),
    Drawing("spa", "spa(interval=16,gen_interval=6,max_ratio=0.5)"),
    Drawing("vlcache", "vlcache(ratio=0.1)", known=(8, 40)),
]


@dataclass(frozen=True)
class Picture:
    """What is drawn, all of one sequence with n positions and s steps.

    Attributes:
        layers: (s, n) int64, layers that computed the row, in one pass or both.
        again: (s, n) bool, rows of a second pass.
        commit: (s, n) bool.
        row_layers: (s,) int64, both passes counted.
        n_layers: of the model.
        n_prompt: positions of the prompt.
        block: positions of a block.
    """

    layers: np.ndarray
    again: np.ndarray
    commit: np.ndarray
    row_layers: np.ndarray
    n_layers: int
    n_prompt: int
    block: int

    @staticmethod
    def of(trace: Trace, n_prompt: int, block: int) -> Picture:
        """The picture of a trace with recompute maps."""
        at, n, steps = trace.index, trace.length, trace.mine
        nothing = np.zeros(n, dtype=bool)
        return Picture(
            layers=np.stack([step.maps["rows"][:, at, :n].sum(0) for step in steps]),
            again=np.stack([nothing if step.again is None else step.again[at, :n] for step in steps]),
            commit=np.stack([step.commit[at, :n] for step in steps]),
            row_layers=np.array([step.row_layers[:, at].sum() for step in steps]),
            n_layers=trace.n_layers,
            n_prompt=n_prompt,
            block=block,
        )


class Replay(Unmasker):
    """Commits given positions in given steps, whatever the confidences are; all else is that of the inner unmasker."""

    def __init__(self, inner: Unmasker, order: list[list[int]]):
        super().__init__(inner.config, inner.sampling, inner.noise)
        self.inner, self.order = inner, order
        self.announces = inner.announces  # type: ignore[misc]

    def begin(self, net: Any, state: State) -> None:
        """Begin the inner unmasker."""
        self.inner.begin(net, state)

    def ask(self, state: State) -> Ask:
        """What the inner one asks for."""
        return self.inner.ask(state)

    def pick(self, logits: Tensor, at: Asked) -> Picks:
        """The inner one's candidates, and the recorded commits."""
        turn = torch.tensor(self.order[int(at.step[0, 0])])
        return replace(self.inner.pick(logits, at), commit=torch.isin(at.where, turn) & at.eligible)

    def settle(self, state: State, seen: Seen) -> Update:
        """What the inner one does with it."""
        return self.inner.settle(state, seen)


def draw(drawing: Drawing, model: Model, order: list[list[int]] | None = None) -> str:
    """The SVG of a drawing; `order` replays the commits of a run instead of choosing them."""
    settings = settings_from(unmask=drawing.unmask, after_end="decode", **SIZE)
    unmasker = unmasker_of(policy_of(drawing.policy), settings)
    if order is not None:
        unmasker = Replay(unmasker, order)
    prompt = prompt_of(model, drawing.known)
    runner = Runner(model, drawing.policy, settings, unmasker=unmasker, maps=True)
    for _ in range(1 if drawing.known is None else 2):
        trace = runner.run([prompt])[0].trace
    picture = Picture.of(trace, len(prompt), SIZE["block_length"])
    title = f"{drawing.policy} on {drawing.model}, {drawing.unmask}"
    return svg(picture, title, f"{100 * trace.row_share:.0f} % of the row-layers of no cache")


def prompt_of(model: Model, known: tuple[int, int] | None) -> Prompt:
    """The prompt; with `known`, some of its rows start from embeddings, as those of an image do."""
    ids = model.prompt_ids(PROMPT)
    if known is None:
        return Prompt(ids)
    values = model.transformer.embed(torch.tensor(ids[slice(*known)]))
    return Prompt(ids, Embeddings(np.arange(*known), values, (Span(*known, "image"),), tuple(ids[: known[0]])))


def order_of(svg_text: str) -> list[list[int]]:
    """The positions that each step of a drawn run committed."""
    found = re.search(r"<metadata>(.*)</metadata>", svg_text)
    return [] if found is None else json.loads(found[1])["commits"]


def svg(picture: Picture, title: str, note: str) -> str:
    """Positions from left to right, steps from top to bottom."""
    steps, n = picture.layers.shape
    width, height = LEFT + n * CELL + RIGHT, TOP + steps * CELL + 40
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(title)}: rows computed in each denoising step; {escape(note)}</title>",
        f"<metadata>{json.dumps({'commits': [np.flatnonzero(row).tolist() for row in picture.commit]})}</metadata>",
        f"<style>\n{STYLE}\n</style>",
        '<defs><pattern id="again" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<path d="M0 0V5" class="hatch"/></pattern></defs>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{LEFT}" y="18" class="title">{escape(title)}</text>',
        f'<text x="{LEFT}" y="32">{escape(note)}</text>',
        *_header(picture),
        *_cells(picture),
        *_rulers(picture),
        *_legend(picture, TOP + steps * CELL + 26),
        "</svg>",
    ]
    return "\n".join(body) + "\n"


def _spans(picture: Picture) -> list[tuple[int, int, str]]:
    """First position, end and name of the prompt and of each block."""
    n, begin = picture.layers.shape[1], picture.n_prompt
    starts = range(begin, n, picture.block)
    return [(0, begin, "prompt"), *((s, s + picture.block, f"block {i}") for i, s in enumerate(starts, 1))]


def _header(picture: Picture) -> list[str]:
    lines = []
    for begin, end, name in _spans(picture):
        x, width, kind = LEFT + begin * CELL, (end - begin) * CELL, "prompt" if name == "prompt" else "block"
        lines.append(f'<rect x="{x}" y="{TOP - 17}" width="{width}" height="14" class="{kind}"/>')
        lines.append(f'<text x="{x + width / 2:g}" y="{TOP - 7}" class="middle">{name}</text>')
    return lines


def _cells(picture: Picture) -> list[str]:
    """The grid, cells by shade, the hatch of second passes, commits."""
    steps, n = picture.layers.shape
    grid = "".join(f"M{LEFT} {TOP + i * CELL}h{n * CELL}" for i in range(steps + 1))
    grid += "".join(f"M{LEFT + i * CELL} {TOP}v{steps * CELL}" for i in range(n + 1))
    lines = [
        f'<path d="{_runs(picture.layers == k)}" fill="{_shade(k / picture.n_layers)}"/>'
        for k in range(1, picture.n_layers + 1)
        if (picture.layers == k).any()
    ]
    lines.append(f'<path d="{grid}" class="grid"/>')
    if picture.again.any():
        lines.append(f'<path d="{_runs(picture.again)}" fill="url(#again)"/>')
    dots = "".join(
        f'<circle cx="{LEFT + i * CELL + CELL / 2:g}" cy="{TOP + step * CELL + CELL / 2:g}" r="3"/>'
        for step, i in np.argwhere(picture.commit).tolist()
    )
    return [*lines, f'<g class="commit">{dots}</g>']


def _runs(mask: np.ndarray) -> str:
    """One rectangle per run of cells within a step, as a path."""
    path = []
    for step, row in enumerate(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8)):
        edges = np.flatnonzero(np.diff(row)).reshape(-1, 2)
        path += [
            f"M{LEFT + begin * CELL} {TOP + step * CELL}h{(end - begin) * CELL}v{CELL}h{(begin - end) * CELL}z"
            for begin, end in edges.tolist()
        ]
    return "".join(path)


def _shade(share: float) -> str:
    red, green, blue = np.rint(LIGHT + (DARK - LIGHT) * share).astype(int)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _rulers(picture: Picture) -> list[str]:
    """Borders, step numbers on the left, the share of row-layers of each step on the right."""
    steps, n = picture.layers.shape
    bottom, right = TOP + steps * CELL, LEFT + n * CELL
    borders = "".join(f"M{LEFT + begin * CELL} {TOP}V{bottom}" for begin, _, _ in _spans(picture)[1:])
    lines = [f'<path d="M{LEFT} {TOP}H{right}V{bottom}H{LEFT}z{borders}" class="edge"/>']
    lines += [f'<text x="{LEFT - 5}" y="{TOP - 7}" class="end">step</text>']
    lines += [f'<text x="{right + 6}" y="{TOP - 7}">computed</text>']
    for step in range(steps):
        y, share = TOP + step * CELL + 8, picture.row_layers[step] / (n * picture.n_layers)
        if step % 4 == 0:
            lines.append(f'<text x="{LEFT - 5}" y="{y}" class="end">{step}</text>')
        lines.append(f'<text x="{right + 38}" y="{y}" class="end">{100 * share:.0f} %</text>')
    return lines


def _legend(picture: Picture, y: int) -> list[str]:
    layers = picture.n_layers
    x = LEFT
    lines = [f'<text x="{x}" y="{y}">layers that compute the row: 0</text>']
    x += 152
    for k in range(layers + 1):
        fill = _shade(k / layers) if k else "#fff"
        lines.append(
            f'<rect x="{x + k * CELL}" y="{y - 8}" width="{CELL}" height="{CELL}" fill="{fill}" '
            'stroke="#ccc" stroke-width=".5"/>'
        )
    x += (layers + 1) * CELL + 5
    lines.append(f'<text x="{x}" y="{y}">{layers}</text>')
    x += 30
    lines.append(f'<circle cx="{x}" cy="{y - 3}" r="3" class="commit"/><text x="{x + 8}" y="{y}">committed</text>')
    if picture.again.any():
        x += 80
        for fill in (_shade(0.6), "url(#again)"):
            lines.append(f'<rect x="{x}" y="{y - 8}" width="18" height="{CELL}" fill="{fill}"/>')
        lines.append(f'<text x="{x + 24}" y="{y}">second pass of the step</text>')
    return lines


def main() -> int:
    """Draw what is named, or all; what cannot be drawn is said, and the rest goes on."""
    names = [drawing.file for drawing in DRAWINGS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="name", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    given = parser.parse_args()
    if unknown := set(given.files) - set(names):
        parser.error(f"no drawing is called {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    load = cache(lambda name: dcache.load_model(name, device="cpu", dtype="float32"))
    failed = 0
    for drawing in [d for d in DRAWINGS if not given.files or d.file in given.files]:
        try:
            text = draw(drawing, load(drawing.model))
        except dcache.DCacheError as error:
            print(f"{drawing.file}: not drawn: {error}", file=sys.stderr)
            failed = 1
            continue
        (given.out / f"{drawing.file}.svg").write_text(text, encoding="utf-8")
        print(f"{drawing.file}.svg: {drawing.policy}, {drawing.unmask}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
