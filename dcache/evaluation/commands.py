"""``dcache eval``: parse, call, print."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dcache.calls import policy_calls
from dcache.config import DEFAULT_POLICIES, DecodeSettings
from dcache.errors import UsageError
from dcache.evaluation.arguments import Arguments, EvalSettings, plain
from dcache.evaluation.run import FORMATS, Evaluation, Evaluator, Score, heading
from dcache.plugins import load_model
from dcache.text import printable

INTERRUPTED = 130


def _options(settings: type[BaseModel]) -> list[inspect.Parameter]:
    """A keyword parameter for each field, which typer reads as an option with the field's description and default."""
    return [_option(name, field) for name, field in settings.model_fields.items()]


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    told = "" if field.default is None or field.default is False else f"  [default: {field.default}]"
    flags = f"{flag}/--no-{flag[2:]}" if field.default is True else flag
    option = typer.Option(flags, help=f"{field.description}{told}", metavar=_metavar(field.annotation))
    annotation: Any = Annotated[str | None, option]  # "none" is a value too, and the settings' class judges all
    if field.annotation is bool:
        annotation = Annotated[bool | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(annotation: Any) -> str | None:
    kinds = [kind for kind in (get_args(annotation) or (annotation,)) if kind in (int, float)]
    if not kinds:
        return None
    name = "INTEGER" if kinds[0] is int else "FLOAT"
    return f"{name}|none" if type(None) in get_args(annotation) else name


def with_options(*settings: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every field of settings; those that were given arrive in ``**given``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        more = [parameter for kind in settings for parameter in _options(kind)]

        def run(**values: Any) -> None:
            given = {p.name: values.pop(p.name) for p in more if p.name in values}
            command(**values, **{name: value for name, value in given.items() if value is not None})

        run.__doc__, run.__name__ = command.__doc__, command.__name__
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + more
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # what typer reads
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


@with_options(DecodeSettings, EvalSettings)
def evaluate(
    tasks: Annotated[list[str], typer.Argument(help="tasks, groups or YAML files of lm-evaluation-harness")],
    policies: Annotated[str, typer.Option(help="policies to evaluate, e.g. 'none,elastic(gamma=0.95)'")] = ",".join(
        ["none", *DEFAULT_POLICIES]
    ),
    model: Annotated[str, typer.Option(help="a shipped model, a folder, or a hub id")] = "tiny-llada",
    set_: Annotated[list[str] | None, typer.Option("--set", help="policy.field=value, as often as needed")] = None,
    sweep: Annotated[list[str] | None, typer.Option(help="policy.field=v1,v2,...: one run per value")] = None,
    include_path: Annotated[list[Path] | None, typer.Option(help="a folder with more tasks")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="problems of each task, from the first on; all")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="examples in each prompt; the task's own")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="write prompts as conversations, by the chat template")
    ] = False,
    system_instruction: Annotated[str | None, typer.Option(help="system turn of the conversations")] = None,
    gen_kwargs: Annotated[
        str | None, typer.Option(help="generation arguments in place of the tasks', e.g. max_gen_toks=64")
    ] = None,
    log_samples: Annotated[bool, typer.Option("--log-samples", help="write every text too; needs --out")] = False,
    out: Annotated[Path | None, typer.Option(help="folder for the harness's results files, one per policy")] = None,
    format_: Annotated[str, typer.Option("--format", help="table, json, csv or markdown")] = "table",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; the GPU if there is one")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 on a GPU and float32 on a CPU unless given")] = None,
    family: Annotated[str | None, typer.Option(help="adapter to use whatever the config declares, e.g. llada")] = None,
    **given: Any,
) -> None:
    """Run policies on tasks of lm-evaluation-harness and print its scores beside what decoding cost.

    A task that does not say how long an answer may be gets 256 rows, unless --gen-length does.
    """
    if format_ not in FORMATS:
        raise UsageError(f"unknown format {format_!r}; choose one of {', '.join(FORMATS)}")
    if log_samples and out is None:
        raise UsageError("--log-samples writes files; say where with --out DIR")
    calls = policy_calls(policies, set_ or [], sweep or [])
    arguments = {name: plain(value) if name != "unmask" else value for name, value in given.items()}
    for call in calls:  # a mistake shows before a model is loaded
        Arguments.read({**arguments, "policy": str(call)})
    evaluation = Evaluation(
        tuple(name for text in tasks for name in text.split(",") if name), tuple(include_path or ()), limit,
        num_fewshot, apply_chat_template, system_instruction, gen_kwargs, log_samples, out,
    )  # fmt: skip
    evaluator = Evaluator(evaluation, load_model(model, device=device, dtype=dtype, family=family), arguments)
    found: list[Score] = []
    infos: list[dict[str, Any]] = []
    code = 0
    try:
        for number, call in enumerate(calls, start=1):
            _note(f"{call}: policy {number} of {len(calls)}")
            results, scores = evaluator.run(call)
            found += scores
            infos.append(results["config"]["dcache"])
    except KeyboardInterrupt:
        _note("interrupted. " + ("The table has what is finished." if found else "Nothing was finished."))
        code = INTERRUPTED
    if found:
        print(printable(FORMATS[format_](found, heading(infos, evaluation))), end="", flush=True)
    if code:
        raise typer.Exit(code)


def _note(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
