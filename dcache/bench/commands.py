"""``dcache bench``: parse, call, print, and write each result as soon as it exists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from pydantic import ValidationError

from dcache.bench import tables
from dcache.bench.reports import (
    EndToEndReport,
    EndToEndSettings,
    FloorReport,
    ImageReport,
    ImageSettings,
    KernelReport,
    Record,
    Report,
    StageResult,
    read,
    write,
    write_text,
)
from dcache.calls import split_list
from dcache.errors import UsageError
from dcache.models.loading import DTYPES
from dcache.plugins import BUILT_IN, explain, load_model, plugins
from dcache.progress import meter, note
from dcache.text import printable

HEAD_ROWS = 32
T = TypeVar("T")

app = typer.Typer(
    help="Measure kernels, the linear layers alone, and whole policies against them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(help="a shape such as llada-8b:random, a shipped model, a folder, or a hub id")]
Out = Annotated[Path | None, typer.Option("--out", help="folder for the JSON and Markdown files")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:1; the GPU if there is one")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="bfloat16 on a GPU and float32 on a CPU unless given")]
NoGraphs = Annotated[bool, typer.Option("--no-graphs", help="run every pass without CUDA graphs")]


def _setting(name: str, kind: type[Record] = EndToEndSettings, **options: Any) -> Any:
    field = kind.model_fields[name]
    default = ", ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    told = "" if default is None else f"  [default: {default}]"
    return typer.Option("--" + name.replace("_", "-"), help=f"{field.description}{told}", **options)


@app.command()
def kernels(
    ops: Annotated[str | None, typer.Option("--ops", help="some ops, separated by commas; all unless given")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="of activations and stores")] = "bf16",
    device: Device = None,
    out: Out = None,
) -> None:
    """Time every kernel beside its torch twin and the device's measured ceilings; a wrong one gets no time."""
    from dcache.bench import kernels as bench
    from dcache.bench.conditions import conditions

    names = bench.checked(None if ops is None else split_list(ops))
    if (kind := DTYPES.get(dtype)) not in bench.TOLERANCES:
        raise UsageError(f"unknown dtype {dtype!r} for kernels; choose bf16, fp16 or fp32")
    place = torch.device(device or "cuda")
    if place.type != "cuda" or not torch.cuda.is_available():
        raise UsageError("`bench kernels` needs a CUDA device; on a CPU every op is its torch twin")
    with torch.cuda.device(place):
        report = KernelReport(conditions=conditions(place, kind), ceilings=bench.ceilings(place, kind))
        with meter("measuring", bench.n_cases(names), "case", lines=False) as bar:
            for result in bench.results(names, place, kind, report.ceilings):
                report = _added(report, result, out, f"{result.op}, {result.model}, {result.size}")
                bar.advance()
    _finish(report)
    if any(result.failure for result in report.results):
        raise typer.Exit(1)


@app.command()
def floor(
    model: Model,
    rows: Annotated[str, typer.Option("--rows", help="row counts, separated by commas")] = "16,64,128,256,512,1280",
    head_rows: Annotated[int, typer.Option("--head-rows", min=0, help="rows of the head; 0 leaves it out")] = HEAD_ROWS,
    device: Device = None,
    dtype: Dtype = None,
    out: Out = None,
) -> None:
    """Time the linear layers alone: what no policy can go below for the rows that it computes."""
    from dcache.bench.conditions import conditions
    from dcache.bench.floor import Floor, point

    counts = _counts("--rows", rows)
    loaded = load_model(model, device=device, dtype=dtype)
    report = FloorReport(conditions=conditions(loaded.device, loaded.dtype, loaded))
    measured = Floor(loaded.transformer)
    with meter("measuring", len(counts), "row count", lines=False) as bar:
        for n in counts:
            result = point(loaded.transformer, n, head_rows, measured.measure(n, head_rows))
            report = _added(report, result, out, f"{n} rows")
            bar.advance()
    _finish(report)


@app.command()
def e2e(
    model: Model,
    policies: Annotated[
        str | None, typer.Option("--policies", help="policies, separated by commas; every built-in one unless given")
    ] = None,
    prompt: Annotated[int | None, _setting("prompt")] = None,
    gen: Annotated[int | None, _setting("gen")] = None,
    block: Annotated[str | None, _setting("block", metavar="INTEGER|none")] = None,
    tokens_per_step: Annotated[str | None, _setting("tokens_per_step")] = None,
    batch: Annotated[str | None, _setting("batch")] = None,
    repeats: Annotated[int | None, _setting("repeats")] = None,
    seconds: Annotated[float | None, _setting("seconds")] = None,
    seed: Annotated[int | None, _setting("seed")] = None,
    images: Annotated[int | None, _setting("images")] = None,
    image_size: Annotated[int | None, _setting("image_size")] = None,
    no_graphs: NoGraphs = False,
    split: Annotated[bool, typer.Option("--split", help="profile a few steps: where their time goes")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="profile a few steps: syncs and gaps")] = False,
    device: Device = None,
    dtype: Dtype = None,
    out: Out = None,
) -> None:
    """Time the steps of whole policies on random prompts, beside the floor of the rows that they computed."""
    from dcache.bench import e2e as bench
    from dcache.bench.conditions import conditions
    from dcache.bench.profile import require_gpu

    settings = _settings(
        EndToEndSettings,
        prompt=prompt, gen=gen, block=_block(block),
        tokens_per_step=None if tokens_per_step is None else _counts("--tokens-per-step", tokens_per_step),
        batch=None if batch is None else _counts("--batch", batch), repeats=repeats, seconds=seconds, seed=seed,
        graphs=not no_graphs, images=images, image_size=image_size,
    )  # fmt: skip
    built_in = [name for name, entry in plugins().policies.entries.items() if entry.source == BUILT_IN]
    lines = bench.tasks(built_in if policies is None else split_list(policies), settings)
    loaded = load_model(model, device=device, dtype=dtype)
    if split or trace:
        require_gpu(loaded.device)
    lines = bench.shown(loaded, lines)
    lines[0].state(loaded.spec)  # a canvas that does not fit ends the command, not every line of it
    image_rows = lines[0].image_rows
    measured = bench.floor_of(loaded, settings, image_rows)
    found = conditions(loaded.device, loaded.dtype, loaded)
    report = EndToEndReport(conditions=found, settings=settings, image_rows=image_rows)
    with meter("measuring", len(lines), "line", lines=False) as bar:
        timed = []
        for known in bench.results(loaded, lines, measured, idle=trace):
            timed.append(known)
            result = known.result
            report = report.model_copy(update={"floor": measured.curve()})
            p50 = "failed" if result.all is None else f"p50 {result.all.p50:.2f} ms"
            report = _added(report, result, out, f"{result.policy}, batch {result.batch}: {p50}")
            bar.advance()
    n = sum(known.result.failure is None for known in timed)
    if n and (split or trace):  # once all times are in the file: a profile slows what comes behind it
        with meter("profiling", n, "line", lines=False) as bar:
            for place, result in bench.profiles(loaded, timed, split, trace):
                told = "profiled" if result.unprofiled is None else "profile failed"
                report = _replaced(report, place, result, out, f"{result.policy}, batch {result.batch}: {told}")
                bar.advance()
    _finish(report)


@app.command()
def images(
    model: Model,
    sizes: Annotated[str | None, _setting("sizes", ImageSettings)] = None,
    policies: Annotated[str | None, _setting("policies", ImageSettings)] = None,
    prompt: Annotated[int | None, _setting("prompt", ImageSettings)] = None,
    gen: Annotated[int | None, _setting("gen", ImageSettings)] = None,
    block: Annotated[str | None, _setting("block", ImageSettings, metavar="INTEGER|none")] = None,
    repeats: Annotated[int | None, _setting("repeats", ImageSettings)] = None,
    seed: Annotated[int | None, _setting("seed", ImageSettings)] = None,
    no_graphs: NoGraphs = False,
    device: Device = None,
    dtype: Dtype = None,
    out: Out = None,
) -> None:
    """Time the vision part stage by stage, and requests with new and known images to their first commit."""
    from dcache.bench import images as bench
    from dcache.bench.conditions import conditions
    from dcache.bench.prompts import vision_of
    from dcache.conditions import device_name

    given = _settings(
        ImageSettings,
        sizes=None if sizes is None else _counts("--sizes", sizes),
        policies=None if policies is None else split_list(policies),
        prompt=prompt, gen=gen, block=_block(block), repeats=repeats, seed=seed, graphs=not no_graphs,
    )  # fmt: skip
    settings = bench.checked(given)
    loaded = load_model(model, device=device, dtype=dtype)
    vision_of(loaded)
    found, host = conditions(loaded.device, loaded.dtype, loaded), device_name(torch.device("cpu"))
    report = ImageReport(conditions=found, host=host, settings=settings)
    with meter("measuring", len(settings.sizes) * (1 + len(settings.policies)), "line", lines=False) as bar:
        for result in bench.results(loaded, settings):
            name = "stages" if isinstance(result, StageResult) else result.policy
            how = "failed" if result.failure else "done"
            report = _added(report, result, out, f"{name}, {result.size} x {result.size}: {how}")
            bar.advance()
    _finish(report)


@app.command()
def plot(
    files: Annotated[list[Path], typer.Argument(help="JSON files of bench e2e and bench floor")],
    out: Annotated[
        Path | None, typer.Option("--out", help="the figure without its ending; beside the first file")
    ] = None,
) -> None:
    """Draw time per step against rows, with the floor, as SVG and PNG."""
    from dcache.bench.plot import draw

    for file in draw([read(file) for file in files], out or files[0].with_suffix("")):
        print(printable(str(file)))


S = TypeVar("S", EndToEndSettings, ImageSettings)


def _settings(kind: type[S], **given: Any) -> S:
    found = {name: None if value == "none" else value for name, value in given.items() if value is not None}
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise UsageError("; ".join(explain("the benchmark", kind, e) for e in error.errors())) from None


def _block(text: str | None) -> int | str | None:
    return text if text in (None, "none") else _counts("--block", text)[0]


def _counts(flag: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in split_list(text)]
    except ValueError:
        raise UsageError(f"{flag} is {text!r}; write numbers separated by commas, such as 16,64") from None
    if min(found) < 1:
        raise UsageError(f"{flag} is {text!r}; every number must be at least 1")
    return found


R = TypeVar("R", KernelReport, FloorReport, EndToEndReport, ImageReport)


def _added(report: R, result: Any, out: Path | None, told: str) -> R:
    """The report with one result more, written at once: a later one may fail."""
    return _saved(report.model_copy(update={"results": [*report.results, result]}), out, told)


def _replaced(report: R, place: int, result: Any, out: Path | None, told: str) -> R:
    """The report with another result in one place, written at once."""
    results = [*report.results[:place], result, *report.results[place + 1 :]]
    return _saved(report.model_copy(update={"results": results}), out, told)


def _saved(report: R, out: Path | None, told: str) -> R:
    """The report, written if that is wanted."""
    if out is not None:
        model = report.conditions.model
        name = report.kind if model is None else f"{report.kind}-{Path(model).name.replace(':', '-')}"
        write(report, out / f"{name}.json")
        write_text(tables.combined(tables.tables(report)), out / f"{name}.md")
    note(told)
    return report


def _finish(report: Report) -> None:
    for table in tables.tables(report):
        tables.show(table)
