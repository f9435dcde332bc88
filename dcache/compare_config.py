"""A comparison in a file: what ``dcache compare --config`` reads, and what it leaves beside its results.

::

    model: tiny-llada
    limit: 24
    unmask: threshold(threshold=0.9)
    policies:
      - dkv(interval=4)
      - elastic: {gamma: [0.8, 0.9, 0.95], window: 16}   # one run per value; several lists give all combinations
    out: runs/gamma

Paths are relative to the file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, field_validator

from dcache import yaml_files
from dcache.calls import Call, Value, parse_call, parse_value, split_list
from dcache.compare import REFERENCE, Comparison, Experiment, Run
from dcache.config import DEFAULT_POLICIES, CompareSettings, DecodeSettings
from dcache.errors import UsageError
from dcache.files import write_whole
from dcache.generate import PAIRED
from dcache.models.loading import Model
from dcache.plugins import load_model, make_policy, make_unmasker, plugins
from dcache.results import check_folder
from dcache.tasks.prompts import Prompts

FILE = "compare.yaml"
HEADER = "# Written by dcache compare, which reads it with --config and does the same again.\n"
DEFAULT_MODEL = "tiny-llada"
MOST_POLICIES = 1000
PLACES = ("model", "device", "dtype", "family", "policies", "task", "prompts", "out")


def _calls_of(item: object) -> tuple[Call, ...]:
    """The calls that an item of ``policies`` stands for; ValueError says what is wrong with it."""
    try:
        calls = tuple(_calls(item))
        for call in calls:
            make_policy(call)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return calls


def _calls(item: object) -> Iterator[Call]:
    if isinstance(item, str):
        try:
            yield parse_call(item)
        except UsageError as error:
            hint = "; within [...] put it in quotes" if item.count("(") > item.count(")") else ""
            raise UsageError(f"{error}{hint}") from None
        return
    knobs = next(iter(item.values())) if isinstance(item, dict) and len(item) == 1 else None
    if not isinstance(item, dict) or len(item) != 1 or not isinstance(knobs, dict | None):
        raise UsageError(f"a policy is {item!r}; write name, name(knob=value,...) or name: {{knob: value}}")
    name = parse_call(str(next(iter(item)))).name
    options = {str(knob): value if isinstance(value, list) else [value] for knob, value in (knobs or {}).items()}
    if (n := prod(map(len, options.values()))) > MOST_POLICIES:
        raise UsageError(f"{name} would run with {n} combinations of its knobs; give at most {MOST_POLICIES}")
    for values in product(*options.values()):
        yield Call(name, {knob: _value(name, knob, value) for knob, value in zip(options, values, strict=True)})


def _value(name: str, knob: str, value: object) -> Value:
    """A knob's value: what the command line would make of a text, and else what it is."""
    if not isinstance(value, bool | int | float | str | None):
        raise UsageError(f"{name}: {knob} is {value!r}; give a number, a text, true, false, or a list of them")
    try:
        return parse_value(value) if isinstance(value, str) else value
    except UsageError:
        return value  # a text that cannot be written on the command line, such as a path with spaces


class _Content(DecodeSettings, CompareSettings):
    """What may stand in a file: the settings of a run and of a comparison, and what is compared."""

    model: str = DEFAULT_MODEL
    device: str | None = None
    dtype: str | None = None
    family: str | None = None
    policies: list[Annotated[tuple[Any, ...], BeforeValidator(_calls_of)]] = Field(default=[], min_length=1)
    prompts: str | None = None
    out: str | None = None

    @field_validator("policies", mode="before")
    @classmethod
    def _one_text_is_a_list(cls, given: object) -> object:
        return split_list(given) if isinstance(given, str) else given

    @field_validator("unmask")
    @classmethod
    def _unmasker_exists(cls, text: str) -> str:
        if text != PAIRED:
            _must(lambda: make_unmasker(text))
        return text

    @field_validator("task")
    @classmethod
    def _task_exists(cls, name: str) -> str:
        _must(lambda: plugins().tasks.get(name))
        return name


def _must(check: Any) -> None:
    """Turn a UsageError into what pydantic gives a place."""
    try:
        check()
    except UsageError as error:
        raise ValueError(str(error)) from None


@dataclass(frozen=True)
class CompareConfig:
    """What is compared, on which model, and where the results go: everything that ``dcache compare`` can be told.

    Attributes:
        model: as for `load_model`.
        device, dtype, family: as for `load_model`.
        policies: what runs beside `none`.
        task: None: see `Experiment.on`.
        prompts: a file of prompts instead of a task.
        out: folder for the results.
        settings: those that were given, of `CompareSettings` without the task, and of `DecodeSettings`.
    """

    model: str = DEFAULT_MODEL
    device: str | None = None
    dtype: str | None = None
    family: str | None = None
    policies: tuple[Call, ...] = tuple(Call(name) for name in DEFAULT_POLICIES)
    task: str | None = None
    prompts: Path | None = None
    out: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(path: str | PathLike[str], **overrides: Any) -> CompareConfig:
        """Read a file.

        Args:
            path: the file, or a folder with results, for the file that was left there.
            overrides: see `but`.

        Raises:
            UsageError: naming the file, the line and the field.
        """
        file = Path(path)
        file = file / FILE if file.is_dir() else file
        given, lines = yaml_files.read(file)
        given = {} if given is None else given
        if not isinstance(given, dict):
            raise UsageError(f"{file}: expected lines such as 'limit: 24', found {type(given).__name__}")
        given = {name: None if value == "none" and name != "policies" else value for name, value in given.items()}
        try:
            content = _Content.model_validate(given)
        except ValidationError as error:
            raise UsageError("; ".join(_explain(file, lines, e) for e in error.errors())) from None
        found: dict[str, Any] = {name: getattr(content, name) for name in PLACES if given.get(name) is not None}
        if "policies" in found:
            found["policies"] = tuple(call for calls in content.policies for call in calls)
        for name in ("prompts", "out"):
            if name in found:
                found[name] = file.parent / Path(found[name]).expanduser()
        if "model" in found and (file.parent / found["model"]).is_dir():
            found["model"] = str(file.parent / found["model"])
        if found.get("prompts") and (rest := [name for name in ("task", "split") if name in given]):
            where = f"{file}, line {lines[rest[0],]}"
            raise UsageError(f"{where}: prompts replace the task; leave {rest[0]} out")
        settings = {name: value for name, value in given.items() if name not in PLACES}
        return CompareConfig(**found, settings=settings).but(**overrides)

    def but(self, **overrides: Any) -> CompareConfig:
        """The same with other values: attributes of this class, or settings. Prompts and a task replace each other."""
        places = {name: value for name, value in overrides.items() if name in PLACES}
        settings = {**self.settings, **{name: value for name, value in overrides.items() if name not in PLACES}}
        if isinstance(calls := places.get("policies"), str):
            places["policies"] = tuple(parse_call(text) for text in split_list(calls))
        if places.get("prompts") is not None:
            places = {"task": None, **places}
            settings = {name: value for name, value in settings.items() if name != "split" or name in overrides}
        elif places.get("task") is not None:
            places = {"prompts": None, **places}
        return replace(self, **places, settings=settings)

    def experiment(self) -> Experiment:
        """What is compared; raises UsageError for what cannot be."""
        source = self.task if self.prompts is None else Prompts(self.prompts)
        return Experiment(self.policies, source, **self.settings)

    def load(self) -> Model:
        """The model."""
        return load_model(self.model, device=self.device, dtype=self.dtype, family=self.family)

    def compare(self) -> Comparison:
        """Load the model and run the comparison, or what is missing of it; see `dcache.compare`."""
        if self.out is not None:
            check_folder(self.out)
        experiment = self.experiment()
        run = Run(experiment, self.load(), self.out)
        self.save(run)
        for _ in run:
            pass
        return run.comparison

    def save(self, run: Run) -> None:
        """Write beside the results of a run what repeats it, unless there is a file that somebody else wrote."""
        if self.out is None:
            return
        file, text = Path(self.out) / FILE, HEADER + yaml_files.write(self._as_run(run))
        try:
            before = file.read_text(encoding="utf-8", errors="replace") if file.exists() else HEADER
            if before.startswith(HEADER) and before != text:
                write_whole(file, text.encode())
        except OSError as error:
            run.close()
            raise UsageError(f"{file} cannot be written: {error.strerror}") from error

    def _as_run(self, run: Run) -> dict[str, Any]:
        """Plain values, with everything that was left to a default or to the machine."""
        found, experiment = run.conditions, run.experiment
        local = Path(self.model).expanduser()
        source: dict[str, Any] = {"prompts": None if self.prompts is None else str(self.prompts.absolute())}
        if self.prompts is None:
            source = {"task": found.task, "split": found.split}
        return {
            "model": str(local.absolute()) if local.is_dir() else self.model,
            "device": self.device or found.device,
            "dtype": found.dtype,
            **({} if self.family is None else {"family": self.family}),
            "policies": [_written(call) for call in self.policies] or [REFERENCE],
            **source,
            **experiment.run.model_dump(mode="json", exclude={"task", "split"}),
            **experiment.settings.model_dump(mode="json"),
            "out": ".",
        }


def _written(call: Call) -> Any:
    """A call as it is written on the command line, or with its knobs apart where that does not give the same."""
    try:
        if parse_call(str(call)) == call:
            return str(call)
    except UsageError:
        pass
    return {call.name: dict(call.knobs)}


def _explain(file: Path, lines: dict[yaml_files.Place, int], error: Any) -> str:
    """One validation error as a sentence that names the file, the line, the field, and what is wrong with it."""
    place = tuple(map(str, error["loc"][:1])) + tuple(error["loc"][1:])  # a key that is no text has a line too
    known = next((place[:n] for n in range(len(place), -1, -1) if place[:n] in lines), ())
    where = f"{file}, line {lines[known]}" if known in lines else str(file)
    name = ".".join(str(part) for part in place)
    if error["type"] in ("extra_forbidden", "invalid_key"):
        near = difflib.get_close_matches(name, _Content.model_fields, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{where}: there is no field {name!r}.{hint}  Fields: {', '.join(_Content.model_fields)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {name} is {error['input']!r}: {message[:1].lower()}{message[1:]}"
