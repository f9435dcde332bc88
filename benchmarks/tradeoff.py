"""What policies lose and what they save, over their knobs: accuracy and agreement against rows computed.

``python benchmarks/tradeoff.py --device cuda`` measures every point of `LINES` under every setting of `SETTINGS`, in
float32, with all prompts of a batch decoded together, so its times mean nothing. Each point is written to
``OUT/MODEL-SETTING.jsonl`` as soon as it exists; the same command goes on where it stopped, and ``--minutes`` stops it
in time. At the end, or with ``--draw`` alone, it writes a Markdown table beside each of them, and the figure (SVG and
PNG), for which matplotlib is needed: ``pip install 'dcache[plot]'``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import dcache
from dcache.conditions import device_name, weights_of, written
from dcache.config import DEFAULT_GEN_LENGTH
from dcache.generate import Output, Runner, policy_of, prompt_ids, settings_from
from dcache.models.loading import Model
from dcache.plugins import plugins

REFERENCE = "none"


@dataclass(frozen=True)
class Line:
    """Points of one curve: a policy over a knob of its own, or over a setting of the run.

    Attributes:
        name: in the legend.
        policy: with `VALUE` where the value goes; the same for all points if a setting is swept.
        values: of the knob.
        run: name of the run's setting that takes the value instead.
        under: settings of the run that this policy needs.
    """

    name: str
    policy: str
    values: tuple[object, ...]
    run: str | None = None
    under: Mapping[str, Any] = field(default_factory=dict)

    def points(self) -> Iterable[tuple[object, str, dict[str, Any]]]:
        """Value, policy and changes of the run's settings."""
        for value in self.values:
            swept = {} if self.run is None else {self.run: value}
            yield value, self.policy.replace("VALUE", str(value)), {**self.under, **swept}


REPAIRED = "confidence=latest,search=all,nucleus=above"  # of d2: what the paper says, where the released code differs
GAMMAS = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
BLOCKS = (4, 8, 16, 32)
IN_BLOCKS = {"block_length": 32}
LINES = [
    Line("elastic, gamma", "elastic(gamma=VALUE)", GAMMAS),
    Line("elastic, window", "elastic(window=VALUE)", (2, 4, 8, 16)),
    Line("dkv, interval", "dkv(interval=VALUE)", (2, 4, 8, 16, 32)),
    Line("dkv pd, interval", "dkv(variant=pd,interval=VALUE)", (4, 8, 16, 32)),
    Line("dkv prefill", "dkv(variant=VALUE)", ("prefill",)),
    Line("dkv greedy, interval", "dkv(variant=greedy,interval=VALUE)", (2, 4, 8, 16, 32)),
    Line("dkv greedy, neighbours", "dkv(variant=greedy,neighbours=VALUE)", (0, 2, 4, 8)),
    Line("fast-dllm dual, block", "fast-dllm", BLOCKS, run="block_length"),
    Line("fast-dllm prefix, block", "fast-dllm(mode=prefix)", BLOCKS, run="block_length"),
    Line("d2 released, current_k", "d2(current_k=VALUE)", (4, 8, 16, 32)),
    Line("d2 repaired, current_k", f"d2(current_k=VALUE,{REPAIRED})", (4, 8, 16, 32)),
    Line("d2 released, rollout_p", "d2(current_k=8,rollout_p=VALUE)", (0, 0.1, 0.3)),
    Line("d2 repaired, rollout_p", f"d2(current_k=8,rollout_p=VALUE,{REPAIRED})", (0, 0.1, 0.3)),
    Line("freecache, block_length", "freecache(block_length=VALUE)", BLOCKS),
    Line("dllm-cache, gen_interval", "dllm-cache(gen_interval=VALUE)", (2, 4, 8, 16, 32)),
    Line("dllm-cache, transfer_ratio", "dllm-cache(transfer_ratio=VALUE)", (0, 0.1, 0.25, 0.5)),
    Line("spa, max_ratio", "spa(max_ratio=VALUE)", (0.1, 0.25, 0.5)),
    Line("spa, gen_interval", "spa(gen_interval=VALUE)", (2, 4, 8, 16)),
    Line("es-dllm, share", "es-dllm(share=VALUE)", (0.25, 0.5, 0.75), under=IN_BLOCKS),
    Line("sparse-dllm, keep", "sparse-dllm(keep=VALUE)", (0, 0.1, 0.3, 0.5, 0.8), under=IN_BLOCKS),
    Line("suffix, window", "suffix(window=VALUE)", (0, 4, 8, 16, 32), under=IN_BLOCKS),
    Line("sparse-dllm over elastic, keep", "sparse-dllm(inner=elastic,keep=VALUE)", (0.1, 0.5), under=IN_BLOCKS),
]
SETTINGS: dict[str, dict[str, Any]] = {
    "one-token": {"unmask": "low-confidence", "block_length": 32},
    "four-tokens": {"unmask": "low-confidence(tokens_per_step=4)", "block_length": None},
    "random-order": {"unmask": "random-order(tokens_per_step=8)", "block_length": None},
}


@dataclass
class Book:
    """The points of one model and setting, in a file that grows: conditions first, then one line per point.

    Raises:
        UsageError: for a file of other conditions.
    """

    path: Path
    conditions: dict[str, Any]
    points: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> Book:
        """What a file holds; a line that was cut off is not there."""
        whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        conditions, *points = map(json.loads, whole)
        return Book(path, conditions, {point["key"]: point for point in points})

    @staticmethod
    def open(path: Path, conditions: dict[str, Any]) -> Book:
        """Begin a file, or go on with one of the same conditions."""
        if not path.exists() or not path.read_text(encoding="utf-8"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(conditions) + "\n", encoding="utf-8")
            return Book(path, conditions)
        found = Book.read(path)
        if differing := [k for k in conditions if found.conditions.get(k) != conditions[k]]:
            name = differing[0]
            raise dcache.UsageError(
                f"{path} was measured with {name} {found.conditions.get(name)!r}, and this run has "
                f"{conditions[name]!r}; choose another --out"
            )
        whole = [conditions, *found.points.values()]
        path.write_text("".join(json.dumps(line) + "\n" for line in whole), encoding="utf-8")  # less a line cut off
        return found

    def add(self, point: dict[str, Any]) -> None:
        """Keep a point, on disk at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")
        self.points[point["key"]] = point


def key_of(policy: str, run: dict[str, Any], seed: int) -> str:
    """What makes a point another one; lines that meet in a point share it."""
    changes = "".join(f" {name}={value}" for name, value in sorted(run.items()))
    return f"{written(policy_of(policy))}{changes} seed={seed}"


class Bench:
    """A model with problems under one setting: decodes them with a policy, and compares with no cache.

    Args:
        model: with a tokenizer.
        settings: of the run.
        limit: problems.
        batch: prompts decoded together.
        seed: of problems and noise.
    """

    def __init__(self, model: Model, settings: dict[str, Any], limit: int, batch: int, seed: int):
        self.model, self.settings, self.batch, self.seed = model, settings, batch, seed
        self.task = plugins().tasks.get("gsm-mini").thing()
        self.problems = self.task.problems("test", limit, seed)
        self.prompts = [prompt_ids(model, problem.prompt) for problem in self.problems]
        self.references: dict[str, list[Output]] = {}

    def decode(self, policy: str, run: dict[str, Any]) -> list[Output]:
        """All problems, batch by batch."""
        size = {"gen_length": self.task.gen_length or DEFAULT_GEN_LENGTH}
        runner = Runner(self.model, policy, settings_from(**size, **self.settings | run, seed=self.seed))
        outputs: list[Output] = []
        for begin in range(0, len(self.prompts), self.batch):
            prompts = self.prompts[begin : begin + self.batch]
            outputs += runner.run(prompts, ids=range(begin, begin + len(prompts)))
        return outputs

    def reference(self, run: dict[str, Any]) -> list[Output]:
        """No cache, under the same settings; decoded once."""
        key = json.dumps(run)
        if key not in self.references:
            self.references[key] = self.decode(REFERENCE, run)
        return self.references[key]

    def measure(self, policy: str, run: dict[str, Any]) -> dict[str, Any]:
        """One point."""
        base = self.reference(run)
        began = perf_counter()
        outputs = base if written(policy_of(policy)) == REFERENCE else self.decode(policy, run)
        seconds = perf_counter() - began
        traces = [output.trace for output in outputs]
        correct = [self.task.score(p, o.text or "") for p, o in zip(self.problems, outputs, strict=True)]
        return {
            "key": key_of(policy, run, self.seed),
            "policy": written(policy_of(policy)),
            "run": run,
            "seed": self.seed,
            "n": len(outputs),
            "correct": sum(map(bool, correct)),
            "agreement": sum(map(agreement, outputs, base)) / len(outputs),
            "nfe": sum(t.nfe for t in traces) / len(traces),
            "row_layers": sum(t.row_layers for t in traces),
            "full_row_layers": sum(t.full_row_layers for t in traces),
            "refreshes": sum(t.refreshes for t in traces) / len(traces),
            "seconds": round(seconds, 1),
        }


def agreement(output: Output, reference: Output) -> float:
    """Share of equal tokens up to the end of the longer text, as `dcache compare` counts it."""
    n = max(len(output.tokens), len(reference.tokens))
    return sum(a == b for a, b in zip(output.canvas[:n], reference.canvas[:n], strict=True)) / n if n else 1.0


def wanted(lines: Sequence[Line]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Policy and changes of the run's settings of every point, each after no cache under the same settings."""
    for line in lines:
        for _, policy, run in line.points():
            yield REFERENCE, run
            yield policy, run


def sweep(bench: Bench, book: Book, lines: Sequence[Line], deadline: float) -> bool:
    """Measure what is missing; False when the time was over first."""
    for policy, run in [(REFERENCE, {}), *wanted(lines)]:
        try:
            if key_of(policy, run, bench.seed) in book.points:
                continue
            if perf_counter() > deadline:
                return False
            point = bench.measure(policy, run)
        except dcache.DCacheError as error:  # a policy of another version, or one that this unmasker does not suit
            print(f"  left out: {policy} {run or ''}: {error}", flush=True)
            continue
        book.add(point)
        share = point["row_layers"] / point["full_row_layers"]
        print(
            f"  {point['key']}: accuracy {point['correct'] / point['n']:.3f}, agreement {point['agreement']:.4f}, "
            f"rows {share:.3f}, NFE {point['nfe']:.1f}, {point['seconds']} s",
            flush=True,
        )
    return True


@dataclass(frozen=True)
class Point:
    """A measured point of a line, over all seeds; shares are 0 to 1.

    Attributes:
        line: its name; empty for the reference.
        value: of the knob.
        policy: as written, with the changes of the run's settings.
        accuracy, error: share of problems, and its standard error.
        base: accuracy of no cache under the same settings of the run.
        agreement: with no cache under the same settings.
        rows: row-layers computed, as a share of as many steps without a cache.
        nfe, refreshes: mean over problems.
    """

    line: str
    value: object
    policy: str
    n: int
    accuracy: float
    error: float
    base: float
    agreement: float
    rows: float
    nfe: float
    refreshes: float


def pooled(book: Book, line: str, value: object, policy: str, run: dict[str, Any]) -> Point | None:
    """A point over the seeds that the file has it for; None if there is none."""
    try:
        keys = [key_of(policy, run, seed) for seed in book.conditions["seeds"]]
    except dcache.UsageError:
        return None
    found = [book.points[key] for key in keys if key in book.points]
    none = [point for seed in book.conditions["seeds"] if (point := book.points.get(key_of(REFERENCE, run, seed)))]
    if not found:
        return None
    n = sum(p["n"] for p in found)
    accuracy = sum(p["correct"] for p in found) / n
    mean = {k: sum(p[k] * p["n"] for p in found) / n for k in ("agreement", "nfe", "refreshes")}
    changes = "".join(f", {name} {v}" for name, v in run.items())
    return Point(
        line=line,
        value=value,
        policy=f"`{found[0]['policy']}`{changes}",
        n=n,
        accuracy=accuracy,
        error=math.sqrt(accuracy * (1 - accuracy) / n),
        base=sum(p["correct"] for p in none) / sum(p["n"] for p in none),
        rows=sum(p["row_layers"] for p in found) / sum(p["full_row_layers"] for p in found),
        **mean,
    )


def points_of(book: Book, lines: Sequence[Line]) -> list[Point]:
    """The reference, then the points of each line; those that were not measured are left out."""
    found = [pooled(book, "", "", REFERENCE, {})]
    found += [pooled(book, line.name, v, policy, run) for line in lines for v, policy, run in line.points()]
    return [point for point in found if point is not None]


def heading(conditions: dict[str, Any]) -> str:
    """The conditions in one sentence."""
    c = conditions
    settings = c["settings"]
    block = f"blocks of {settings['block_length']}" if settings["block_length"] else "one block"
    seeds = ", ".join(map(str, c["seeds"]))
    return (
        f"{c['model']}, {c['dtype']}, {c['device']}, torch {c['torch']}, dcache {c['dcache']}; gsm-mini test, "
        f"{c['n']} problems for each seed ({seeds}), batches of {c['batch']}, {settings['unmask']}, {block}"
    )


def markdown(book: Book, points: Sequence[Point]) -> str:
    """The conditions and one line per point; a point of two lines stands once."""
    lines = [
        heading(book.conditions) + ".",
        "",
        "| policy | accuracy | no cache | agreement | NFE | rows | refreshes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for p in {point.policy: point for point in points}.values():
        accuracy = f"{100 * p.accuracy:.1f} ± {100 * p.error:.1f} %"
        lines.append(
            f"| {p.policy} | {accuracy} | {100 * p.base:.1f} % | {p.agreement:.4f} | {p.nfe:.1f} | "
            f"{100 * p.rows:.0f} % | {p.refreshes:.1f} |"
        )
    return (
        "\n".join(
            [
                *lines,
                "",
                "± is one standard error of the accuracy on so many problems; the column 'no cache' is the accuracy of "
                "`none` under the same settings.",
            ]
        )
        + "\n"
    )


def publish(book: Book, lines: Sequence[Line]) -> None:
    """Write the table, and the figure if matplotlib is there."""
    points = points_of(book, lines)
    book.path.with_suffix(".md").write_text(markdown(book, points), encoding="utf-8")
    try:
        from tradeoff_figure import draw  # beside this file
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print(f"{book.path.stem}: table written; the figure needs matplotlib: pip install 'dcache[plot]', then --draw")
        return
    draw(points, heading(book.conditions), book.path.with_suffix(""))


def conditions_of(model: Model, setting: str, given: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    return {
        "model": model.name,
        "weights": weights_of(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        "torch": torch.__version__,
        "dcache": dcache.__version__,
        "setting": setting,
        "settings": SETTINGS[setting],
        "n": given.limit,
        "batch": batch,
        "seeds": given.seeds,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["tiny-llada", "tiny-dream"])
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--lines", nargs="*", help="only lines that begin so, e.g. elastic 'dkv greedy'")
    parser.add_argument("--limit", type=int, default=500, help="problems for each seed")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--batch-size", type=int, help="prompts decoded together: 250 on a GPU, 20 on a CPU")
    parser.add_argument("--device")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no point after so long")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--draw", action="store_true", help="tables and figures of what --out holds; measure nothing")
    return parser.parse_args()


def main() -> int:
    """Measure, then write tables and figures; 1 when the time was over first."""
    given = arguments()
    lines = [n for n in LINES if given.lines is None or n.name.startswith(tuple(given.lines))]
    deadline = perf_counter() + 60 * given.minutes
    done = True
    for name in given.models:
        if given.draw:
            books = [Book.read(p) for s in given.settings if (p := given.out / f"{name}-{s}.jsonl").exists()]
        else:
            books = []
            try:
                model = dcache.load_model(name, device=given.device, dtype="float32")
            except dcache.DCacheError as error:
                print(f"{name}: left out: {error}", file=sys.stderr)
                continue
            batch = given.batch_size or (250 if model.device.type == "cuda" else 20)
            for setting in given.settings:
                conditions = conditions_of(model, setting, given, batch)
                books.append(book := Book.open(given.out / f"{name}-{setting}.jsonl", conditions))
                for seed in given.seeds:
                    print(f"{name}, {setting}, seed {seed}", flush=True)
                    bench = Bench(model, SETTINGS[setting], given.limit, batch, seed)
                    done = sweep(bench, book, lines, deadline) and done
        for book in books:
            publish(book, lines)
    if not done:
        print("the time is over; the same command goes on from here", file=sys.stderr)
    return int(not done)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except dcache.UsageError as error:
        sys.exit(f"error: {error}")
