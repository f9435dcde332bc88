"""The command line: parse, call, print. Every help text and default comes from the settings' own classes."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

import dcache
from dcache import catalog, completion, report
from dcache.bench import commands as bench
from dcache.calls import policy_calls
from dcache.compare import Comparison, Run, launch_settings
from dcache.compare_config import DEFAULT_MODEL, CompareConfig
from dcache.config import DEFAULT_POLICIES, CompareSettings, DecodeSettings, LaunchSettings, VerifySettings
from dcache.errors import DCacheError, UsageError
from dcache.evaluation import commands as evaluation
from dcache.formats import check_format, formatted
from dcache.generate import Output, Runner, problem_prompt, settings_from
from dcache.models.loading import Source
from dcache.plugins import load_model, make_policy
from dcache.progress import is_live, meter, note
from dcache.results import check_folder
from dcache.scaffold.command import new_policy
from dcache.tasks.base import Problem
from dcache.tasks.prompts import Prompts
from dcache.text import printable
from dcache.trace import Step
from dcache.view import commands as view

INTERRUPTED = 130
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
COUNT, COUNT_OR_NONE = "INTEGER", "INTEGER|none"
NUMBER, NUMBER_OR_NONE = "FLOAT", "FLOAT|none"
NUMBERS = (
    "gen_length",
    "block_length",
    "limit",
    "repeats",
    "temperature",
    "top_p",
    "top_k",
    "guidance",
    "seed",
    "batch_size",
    "examples",
    "patience",
    "workers",
)

app = typer.Typer(
    help="Cache policies for diffusion language models, compared under one decoding loop and one engine.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


app.add_typer(bench.app, name="bench")
app.command("report")(view.report)
app.command("eval")(evaluation.evaluate)


def setting(settings: type[BaseModel], name: str, **options: Any) -> Any:
    """An option for a field, with its description and default."""
    field = settings.model_fields[name]
    default = "" if field.default is None or field.default is False else f"  [default: {field.default}]"
    return typer.Option("--" + name.replace("_", "-"), help=f"{field.description}{default}", **options)


def option(help: str, *flags: str, **options: Any) -> Any:
    """An option of the command line alone."""
    return typer.Option(*flags, help=help, **options)


CONFIG = "a YAML file that says what to compare, or a folder with results, to do the same again"
POLICIES = "what to compare, e.g. 'elastic(gamma=0.95),dkv'; none is always run"
MODEL = "a shipped model, a folder, a hub id, or a shape such as llada-8b:random"
ModelName = Annotated[str, option(MODEL, "--model")]
PromptsFile = Annotated[Path | None, option('prompts, one JSON object per line: {"prompt": "..."}', "--prompts")]
Device = Annotated[str | None, option("cpu, cuda or cuda:1; the GPU if there is one", "--device")]
Dtype = Annotated[str | None, option("bfloat16 on a GPU and float32 on a CPU unless given", "--dtype")]
FamilyName = Annotated[str | None, option("adapter to use whatever the config declares, e.g. llada", "--family")]
GenLength = Annotated[str | None, setting(DecodeSettings, "gen_length", metavar=COUNT_OR_NONE)]
BlockLength = Annotated[str | None, setting(DecodeSettings, "block_length", metavar=COUNT_OR_NONE)]
Unmask = Annotated[str | None, setting(DecodeSettings, "unmask")]
Temperature = Annotated[str | None, setting(DecodeSettings, "temperature", metavar=NUMBER)]
Seed = Annotated[str | None, setting(DecodeSettings, "seed", metavar=COUNT)]
ForbidEos = Annotated[bool | None, setting(DecodeSettings, "forbid_eos")]
Rule = Annotated[str | None, setting(DecodeSettings, "confidence")]
TopP = Annotated[str | None, setting(DecodeSettings, "top_p", metavar=NUMBER_OR_NONE)]
TopK = Annotated[str | None, setting(DecodeSettings, "top_k", metavar=COUNT_OR_NONE)]
Guidance = Annotated[str | None, setting(DecodeSettings, "guidance", metavar=NUMBER)]
EosLast = Annotated[str | None, setting(DecodeSettings, "eos_last")]
AfterEnd = Annotated[str | None, setting(DecodeSettings, "after_end")]
FillEvery = Annotated[str | None, setting(DecodeSettings, "fill_every", metavar=COUNT)]
BatchSize = Annotated[str | None, setting(DecodeSettings, "batch_size", metavar=COUNT)]
NoGraphs = Annotated[bool | None, setting(DecodeSettings, "no_graphs")]


def given(**values: Any) -> dict[str, Any]:
    """The settings that were given, numbers as numbers or None."""
    found = {name: value for name, value in values.items() if value is not None}
    return {name: _number(value) if name in NUMBERS else value for name, value in found.items()}


def _number(text: str) -> int | float | str | None:
    """A number, or what stands in its place; the settings' class judges it, and its message has the value."""
    if text == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context, version: Annotated[bool, option("Show the version and exit.", "--version")] = False
) -> None:
    """Print the version, or without a command the help."""
    if version:
        print(f"dcache {dcache.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def compare(
    config: Annotated[Path | None, option(f"{CONFIG}; other options override it", "--config")] = None,
    policies: Annotated[str | None, option(f"{POLICIES}  [default: {','.join(DEFAULT_POLICIES)}]")] = None,
    model: Annotated[str | None, option(f"{MODEL}  [default: {DEFAULT_MODEL}]", "--model")] = None,
    task: Annotated[str | None, setting(CompareSettings, "task")] = None,
    prompts: PromptsFile = None,
    split: Annotated[str | None, setting(CompareSettings, "split")] = None,
    limit: Annotated[str | None, setting(CompareSettings, "limit", metavar=COUNT_OR_NONE)] = None,
    repeats: Annotated[str | None, setting(CompareSettings, "repeats", metavar=COUNT)] = None,
    launcher: Annotated[str | None, setting(LaunchSettings, "launcher")] = None,
    workers: Annotated[str | None, setting(LaunchSettings, "workers", metavar=COUNT)] = None,
    ray_address: Annotated[str | None, setting(LaunchSettings, "ray_address")] = None,
    out: Annotated[Path | None, option("folder for results.jsonl; the same command continues it", "--out")] = None,
    set_: Annotated[list[str] | None, option("policy.field=value, as often as needed", "--set")] = None,
    sweep: Annotated[list[str] | None, option("policy.field=v1,v2,...: one run per value", "--sweep")] = None,
    format_: Annotated[str, option("table, json, csv, markdown or latex", "--format")] = "table",
    report_: view.ReportFolder = None,
    report_texts: view.ReportTexts = view.TEXTS,
    measure_drift: view.MeasureDrift = False,
    gen_length: GenLength = None,
    block_length: BlockLength = None,
    unmask: Unmask = None,
    temperature: Temperature = None,
    confidence: Rule = None,
    top_p: TopP = None,
    top_k: TopK = None,
    guidance: Guidance = None,
    seed: Seed = None,
    forbid_eos: ForbidEos = None,
    eos_last: EosLast = None,
    after_end: AfterEnd = None,
    fill_every: FillEvery = None,
    batch_size: BatchSize = None,
    no_graphs: NoGraphs = None,
    device: Device = None,
    dtype: Dtype = None,
    family: FamilyName = None,
) -> None:
    """Run policies on the same problems and print how they did."""
    check_format(format_)
    if prompts is not None and (task is not None or split is not None):
        raise UsageError(f"--prompts replaces the task; leave {'--task' if task else '--split'} out")
    settings = given(
        split=split, limit=limit, repeats=repeats, gen_length=gen_length, block_length=block_length, unmask=unmask,
        temperature=temperature, confidence=confidence, top_p=top_p, top_k=top_k, guidance=guidance, seed=seed,
        forbid_eos=forbid_eos, eos_last=eos_last, after_end=after_end, fill_every=fill_every, batch_size=batch_size,
        no_graphs=no_graphs,
    )  # fmt: skip
    places = {"model": model, "policies": policies, "task": task, "prompts": prompts, "out": out}
    places |= {"device": device, "dtype": dtype, "family": family}
    plan = (CompareConfig() if config is None else CompareConfig.read(config)).but(**given(**places), **settings)
    plan = plan.but(policies=tuple(policy_calls(plan.policies, set_ or [], sweep or [])))
    plan = plan.but(out=view.folder_of(plan.out if report_ is None else out, report_, measure_drift))
    if plan.out is not None:
        check_folder(plan.out)
    launch = launch_settings(**given(launcher=launcher, workers=workers, ray_address=ray_address))
    source = Source.of(plan.model, plan.device, plan.dtype, family=plan.family)
    run = Run(plan.experiment(), source, plan.out, launch=launch, note=note)
    plan.save(run)
    try:
        watch(run)
    except KeyboardInterrupt:
        show(run.comparison, format_)
        again = "Nothing was kept; give --out to be able to continue."
        flag = "--out" if report_ is None else "--report"
        note(f"interrupted. {again if plan.out is None else f'To continue, repeat the command with {flag} {plan.out}'}")
        raise typer.Exit(INTERRUPTED) from None
    except DCacheError:
        if run.results:
            show(run.comparison, format_)
        raise
    show(run.comparison, format_)
    if report_ is not None:
        view.finish(run, report_, report_texts, measure_drift, note)


def watch(run: Run) -> None:
    """Run it, and tell how far it is."""
    names, total, kept = ", ".join(run.experiment.policies), run.experiment.n_texts, len(run.results)
    n = len(run.experiment.problems)
    if not is_live():
        there = f"; {kept} of {total} texts are there already" if kept else ""
        note(f"comparing {names} on {n} problem{'s' * (n != 1)}{there}")
    with meter("comparing", total, "text", kept) as bar:
        for results in run:
            bar.advance(len(results))


def show(comparison: Comparison, format_: str) -> None:
    """The table on stdout, warnings on stderr."""
    rows = comparison.standings
    print(formatted(format_, comparison.conditions, rows), end="", flush=True)
    for text in report.warnings(comparison.conditions, rows):
        note(f"warning: {text}")


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="the prompt; - reads it from stdin")] = None,
    policy: Annotated[str, option("a policy, e.g. 'elastic(gamma=0.95)'", "--policy")] = "elastic",
    model: ModelName = DEFAULT_MODEL,
    prompts: PromptsFile = None,
    image: Annotated[
        list[Path] | None, option("an image of the prompt, for a model with vision; several in order", "--image")
    ] = None,
    trace: Annotated[bool, option("print one line per denoising step to stderr", "--trace")] = False,
    gen_length: GenLength = None,
    block_length: BlockLength = None,
    unmask: Unmask = None,
    temperature: Temperature = None,
    confidence: Rule = None,
    top_p: TopP = None,
    top_k: TopK = None,
    guidance: Guidance = None,
    seed: Seed = None,
    forbid_eos: ForbidEos = None,
    eos_last: EosLast = None,
    after_end: AfterEnd = None,
    fill_every: FillEvery = None,
    batch_size: BatchSize = None,
    no_graphs: NoGraphs = None,
    device: Device = None,
    dtype: Dtype = None,
    family: FamilyName = None,
) -> None:
    """Decode one prompt to stdout; or a file of prompts, to one JSON object per line."""
    settings = settings_from(
        **given(
            gen_length=gen_length, block_length=block_length, unmask=unmask, temperature=temperature,
            confidence=confidence, top_p=top_p, top_k=top_k, guidance=guidance, seed=seed, forbid_eos=forbid_eos,
            eos_last=eos_last, after_end=after_end, fill_every=fill_every, batch_size=batch_size,
            no_graphs=no_graphs,
        )
    )  # fmt: skip
    if (prompt is None) == (prompts is None):
        raise UsageError("give a prompt or --prompts FILE, and not both")
    make_policy(policy)
    if image and prompt is None:
        raise UsageError("--image goes with one prompt; a file of prompts names the images of each line")
    problems = [Problem("prompt", _prompt(prompt), images=tuple(image or ()))] if prompt is not None else []
    if prompts is not None:
        problems = Prompts(prompts).problems("", None, 0)
    runner = Runner(load_model(model, device=device, dtype=dtype, family=family), policy, settings)
    ids = [problem_prompt(runner.model, problem) for problem in problems]
    names = [problem.id for problem in problems]
    with meter("generating", len(ids), "text", lines=False) if prompts is not None else nullcontext() as bar:
        for begin in range(0, len(ids), settings.batch_size):
            batch = range(begin, min(begin + settings.batch_size, len(ids)))
            for i, output in zip(batch, runner.run([ids[i] for i in batch], ids=batch), strict=True):
                if bar is None:
                    print(printable(output.text or ""), flush=True)
                else:
                    print(json.dumps({"id": names[i], "text": output.text}), flush=True)
                    bar.advance()
                _explain(output, trace)


def _prompt(text: str) -> str:
    try:
        text = sys.stdin.read() if text == "-" else text
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin cannot be read as text: {error}") from None
    if not text.strip():
        raise UsageError("the prompt is empty")
    return text


def _explain(output: Output, steps: bool) -> None:
    trace = output.trace
    if steps:
        for step in trace.mine:
            note(_step(step, trace.index))
    note(output.summary)


def _step(step: Step, b: int) -> str:
    what = "  refresh" if step.refresh[b] else ""
    if step.again is not None and step.start is not None and step.again[b].any():
        what += f" from layer {int(step.start[b])}"
    commits = ", ".join(str(i) for i in step.commit[b].nonzero()[0])
    return f"step {int(step.step[b]):4}  rows {int(step.rows[b].sum()):5}  commits at {commits or 'none'}{what}"


@app.command()
def policies(
    as_json: Annotated[bool, option("print JSON", "--json")] = False,
    unmaskers: Annotated[bool, option("list unmaskers instead", "--unmaskers")] = False,
) -> None:
    """List policies, or unmaskers, with their papers and knobs."""
    listings = catalog.unmaskers() if unmaskers else catalog.policies()
    print(json.dumps(catalog.as_data(listings), indent=2) if as_json else catalog.as_text(listings))


@app.command()
def verify(
    policy: Annotated[str, typer.Argument(help="an installed policy, e.g. 'dkv(interval=4)'")],
    golden: Annotated[
        Path | None, option("folder of recorded runs; those of the policy are replayed", "--golden")
    ] = None,
    model: Annotated[str | None, option("also try a checkpoint, e.g. tiny-llada", "--model")] = None,
    examples: Annotated[str | None, setting(VerifySettings, "examples", metavar=COUNT)] = None,
    seed: Annotated[str | None, setting(VerifySettings, "seed", metavar=COUNT)] = None,
    patience: Annotated[str | None, setting(VerifySettings, "patience", metavar=COUNT)] = None,
    format_: Annotated[str, option("text or json", "--format")] = "text",
) -> None:
    """Check that a policy keeps the contract; exits with 1 if a claim fails."""
    from dcache.verify import (
        source_of,
        verify,
        verify_settings,
    )  # hypothesis comes with it, which only this command needs

    if format_ not in ("text", "json"):
        raise UsageError(f"unknown format {format_!r}; choose text or json")
    how = verify_settings(**given(examples=examples, seed=seed, patience=patience))
    found, source = verify(policy, golden=golden, model=model, **how.model_dump()), source_of(policy)
    if format_ == "text":
        told = f"{policy} ({source}), dcache {dcache.__version__}, {how.examples} examples per claim, seed {how.seed}"
        print(printable(told), flush=True)
    verdicts = []
    with meter("verifying", found.total, "claim", lines=False) as bar:
        for verdict in found:
            verdicts.append(verdict)
            if format_ == "text":
                print(printable(str(verdict)), flush=True)
            bar.advance()
    counts = {status: sum(verdict.status == status for verdict in verdicts) for status in ("pass", "fail", "n/a")}
    if format_ == "json":
        data = {"policy": policy, "source": source, "dcache": dcache.__version__} | how.model_dump()
        each = [verdict.as_data() for verdict in verdicts]
        print(json.dumps(data | {"holds": not counts["fail"], "verdicts": each}, indent=2))
    else:
        print(f"{counts['pass']} pass, {counts['fail']} fail, {counts['n/a']} not applicable")
    if counts["fail"]:
        raise typer.Exit(1)


app.command("new-policy")(new_policy)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code: 0, 1 for a defect, 2 for a mistake of the caller, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if callable(reconfigure := getattr(stream, "reconfigure", None)):
            reconfigure(errors="backslashreplace")  # a terminal without Unicode shows escapes
    return quietly(lambda: _run(None if arguments is None else list(arguments)))


def _run(arguments: list[str] | None) -> object:
    completion.learn(app)
    return app(arguments, completion.PROGRAM, standalone_mode=False)


def quietly(command: Callable[[], object]) -> int:
    """Turn exceptions into one line on stderr and an exit code."""
    try:
        code = command()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except UsageError as error:
        return _fail(str(error), 2)
    except DCacheError as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:  # the reader left
        _drop_stdout()
        return 1
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        _drop_stdout()
        return _fail(f"the output cannot be written: {error.strerror}", 2)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own usage errors
            raise
        return _fail(f"{error.format_message()} (dcache --help lists commands and options)", 2)


def _drop_stdout() -> None:
    """Nothing more can be written there, and nothing is to be flushed at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    note("error: " + " ".join(message.splitlines()))
    return code
