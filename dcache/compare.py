"""Run policies on the same prompts, interleaved, and write every result as soon as it exists.

All policies of a comparison share weights, prompts, seed, noise, unmasker and settings. They take turns problem by
problem, each time in another order, so that a machine that slows down slows all of them; one short run of each goes
before the clock starts. `dcache.launch` says where they run: in this process, or in several.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationError

import dcache
from dcache import formats, report
from dcache.calls import Call, split_list
from dcache.conditions import device_name, prompt_of, source_of, version_of, weights_of, written
from dcache.config import DEFAULT_POLICIES, CompareSettings, LaunchSettings
from dcache.errors import UsageError
from dcache.files import write_whole
from dcache.generate import Output, Runner, policy_of, problem_prompt, settings_from, unmasker_of
from dcache.launch import Launcher, Local, Recipe, Unit
from dcache.models.loading import Model, Source
from dcache.plugins import explain, load, make_policy, plugins
from dcache.policy import CachePolicy
from dcache.results import FILE, Conditions, Entrant, Result, ResultFile, line_of, read_results
from dcache.tasks.base import Problem, Task
from dcache.tasks.prompts import Prompts
from dcache.text import printable

if TYPE_CHECKING:
    from pandas import DataFrame  # type: ignore[import-untyped]

REFERENCE = "none"
WARM_UP_ROWS = 8
IMAGE_TASK = "scenes"
Policy = str | Call | CachePolicy
AnyModel = Model | Source | str | PathLike[str]


class Experiment:
    """What is compared. It needs no model, so that a mistake shows before one is loaded.

    Args:
        policies: names, calls such as ``"elastic(gamma=0.95)"``, or instances; or one text, ``"elastic,dkv"``. `none`
            is added as the reference.
        task: a name, or an instance: ``Prompts("mine.jsonl")``. None: see `on`.
        settings: fields of `CompareSettings` and `DecodeSettings`.

    Attributes:
        policies: what runs, by the name that it has in the table; the reference first.
        problems: what is decoded.
        split: of the task; None for a file of prompts, which has none.

    Raises:
        UsageError: for what does not exist or cannot be, and for a policy that is given twice.
    """

    def __init__(
        self, policies: str | Sequence[Policy] = DEFAULT_POLICIES, task: str | Task | None = None, **settings: Any
    ):
        self._settings = dict(settings)
        self._task = task
        self.run = _own({k: settings.pop(k) for k in [*settings] if k in CompareSettings.model_fields}, task)
        self.task: Task = plugins().tasks.get(self.run.task).thing() if not isinstance(task, Task) else task
        if settings.get("gen_length") is None:
            settings["gen_length"] = self.task.gen_length
        self.settings = settings_from(**settings)
        self.policies: dict[str, CachePolicy] = {REFERENCE: make_policy(REFERENCE)}
        self._given: dict[str, Policy] = {REFERENCE: REFERENCE}
        seen = set()
        for given in _listed(policies):
            policy = policy_of(given)
            name = written(policy)
            if name in seen:
                raise UsageError(f"policy {name!r} is listed twice; it would be run twice to the same tokens")
            seen.add(name)
            self.policies[name], self._given[name] = policy, given
        for policy in self.policies.values():
            unmasker_of(policy, self.settings)
        self.split = None if isinstance(self.task, Prompts) else self.run.split
        self.problems: list[Problem] = self.task.problems(self.run.split, self.run.limit, self.settings.seed)

    def on(self, reads_images: bool) -> Experiment:
        """Itself; or its like on a task with images, if it names no task and the model reads images."""
        if not reads_images or "task" in self.run.model_fields_set:
            return self
        return Experiment([*self._given.values()], IMAGE_TASK, **self._settings)

    @property
    def recipe(self) -> Recipe:
        """What makes an equal experiment in another process."""
        return Recipe(self._given, self._task, self._settings)

    @property
    def task_name(self) -> str:
        """The task, with the file if its problems are those of a file."""
        return f"{self.task.name} {self.task.path.name}" if isinstance(self.task, Prompts) else self.task.name

    @property
    def n_texts(self) -> int:
        """Results of the whole comparison."""
        return len(self.problems) * len(self.policies) * self.run.repeats

    @property
    def n_units(self) -> int:
        """Batches of the whole comparison, each under one policy."""
        return -(-len(self.problems) // self.settings.batch_size) * len(self.policies) * self.run.repeats

    def conditions(self, model: Model, unmaskers: dict[str, str]) -> Conditions:
        """Everything that results depend on; `unmaskers` as each policy runs with them."""
        entrants = [
            Entrant(
                policy=name,
                name=policy.name or type(policy).__name__,
                source=source_of(policy),
                knobs=policy.config.model_dump(mode="json"),
                unmask=unmaskers[name],
            )
            for name, policy in self.policies.items()
        ]
        return Conditions(
            dcache=dcache.__version__,
            python=platform.python_version(),
            torch=torch.__version__,
            triton=version_of("triton"),
            device=model.device.type,
            device_name=device_name(model.device),
            threads=torch.get_num_threads() if model.device.type == "cpu" else None,
            dtype=str(model.dtype).removeprefix("torch."),
            model=model.name,
            n_parameters=model.n_parameters,
            weights=weights_of(model),
            task=self.task_name,
            split=self.split,
            limit=self.run.limit,
            n_problems=len(self.problems),
            seed=self.settings.seed,
            repeats=self.run.repeats,
            settings=self.settings.model_dump(mode="json", exclude={"seed"}),
            policies=entrants,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _listed(policies: str | Sequence[Policy]) -> Iterable[Policy]:
    if isinstance(policies, str):
        return split_list(policies)
    if isinstance(policies, Call | CachePolicy):
        return [policies]
    if not isinstance(policies, Iterable):
        raise UsageError(f"policies is {policies!r}; give a list such as ['elastic(gamma=0.95)', 'dkv']")
    return policies


def _own(settings: dict[str, Any], task: str | Task | None) -> CompareSettings:
    if not isinstance(task, str | Task | None):
        raise UsageError(f"task is {task!r}; give a name, such as 'gsm-mini', or an instance of Task")
    name = {} if task is None else {"task": task if isinstance(task, str) else task.name}
    try:
        return CompareSettings.model_validate(settings | name)
    except ValidationError as error:
        raise UsageError("; ".join(explain("the comparison", CompareSettings, e) for e in error.errors())) from None


def launch_settings(**settings: Any) -> LaunchSettings:
    """Validate where a comparison runs; raises UsageError naming the field, the value and the bound."""
    try:
        return LaunchSettings.model_validate(settings)
    except ValidationError as error:
        raise UsageError("; ".join(explain("the comparison", LaunchSettings, e) for e in error.errors())) from None


class Decoder:
    """An experiment on a model in this process, ready to decode any batch of it.

    Args:
        experiment: what to compare.
        model: on which model.
        clock: seconds, for wall times.

    Attributes:
        experiment: the same; on a task with images if the model reads images and no task was named.
        marks: fingerprint of each prompt with its answer.
        conditions: as found here.

    Raises:
        UsageError: for a prompt that does not fit the model, and for policies that do not.
    """

    def __init__(self, experiment: Experiment, model: Model, clock: Callable[[], float] | None = None):
        experiment = experiment.on(model.vision is not None)
        self.experiment, self.model = experiment, model
        self.clock = clock or perf_counter
        self.runners = {name: Runner(model, p, experiment.settings) for name, p in experiment.policies.items()}
        self.prompts = [problem_prompt(model, problem) for problem in experiment.problems]
        self._check_lengths()
        self.runners[REFERENCE].state(self.prompts)  # lengths and blocks, before anything runs
        for runner in self.runners.values():
            runner.reserve(self.prompts)
        pairs = zip(self.prompts, experiment.problems, strict=True)
        self.marks = [prompt_of(ids, problem.answer, problem.images) for ids, problem in pairs]
        self.conditions = experiment.conditions(model, {n: written(r.unmasker) for n, r in self.runners.items()})
        self.memory = Memory(model.device)
        self._warm: set[str] = set()

    def _check_lengths(self) -> None:
        room = self.model.spec.max_positions - (self.experiment.settings.gen_length or 0)
        for problem, ids in zip(self.experiment.problems, self.prompts, strict=True):
            if len(ids) > room:
                raise UsageError(
                    f"problem {problem.id!r} has a prompt of {len(ids)} tokens; with gen_length "
                    f"{self.experiment.settings.gen_length} the model has room for {room}; shorten one of them"
                )

    def warm_up(self, name: str) -> None:
        """Once, outside the clock: on a GPU the first batch as it will be decoded, which records its graphs."""
        if name in self._warm:
            return
        self._warm.add(name)
        settings = self.experiment.settings
        if self.model.device.type != "cpu":
            self.runners[name].run(self.prompts[: settings.batch_size])
            return
        rows = min(settings.gen_length or WARM_UP_ROWS, WARM_UP_ROWS)
        short = settings.model_copy(update={"gen_length": rows, "block_length": None})
        Runner(self.model, self.experiment.policies[name], short).run(self.prompts[: settings.batch_size])

    def decode(self, unit: Unit) -> list[Result]:
        """Decode one batch under one policy, which is warmed up before if it was not."""
        self.warm_up(unit.policy)
        runner = self.runners[unit.policy]
        self.memory.begin()
        began = self.clock()
        outputs = runner.run([self.prompts[i] for i in unit.indices], ids=unit.indices)
        seconds = self.clock() - began - sum(step.recording for step in outputs[0].trace.steps)
        peak = self.memory.end(unit.policy)
        cache = sum(runner.engine.store_bytes.values())
        return [
            self._result(unit, i, output, seconds / len(unit.indices), peak, cache)
            for i, output in zip(unit.indices, outputs, strict=True)
        ]

    def _result(self, unit: Unit, index: int, out: Output, seconds: float, peak: int | None, cache: int) -> Result:
        problem, trace = self.experiment.problems[index], out.trace
        return Result(
            repeat=unit.repeat,
            problem=problem.id,
            prompt=self.marks[index],
            policy=unit.policy,
            text=out.text,
            tokens=out.tokens,
            canvas=out.canvas,
            correct=None if out.text is None else self.experiment.task.score(problem, out.text),
            n_tokens=len(out.tokens),
            nfe=trace.nfe,
            seconds=round(seconds, 6),
            batch=len(unit.indices),
            row_layers=trace.row_layers,
            kv_row_layers=trace.kv_row_layers,
            full_row_layers=trace.full_row_layers,
            row_share=round(trace.row_share, 6),
            refreshes=trace.refreshes,
            step_ms=[round(step.seconds * 1000, 3) for step in trace.mine],
            peak_bytes=peak,
            cache_bytes=cache,
            regions=trace.regions,
        )


class Run:
    """An experiment on a model, in the middle of it: iterate to decode what is missing, batch by batch.

    Args:
        experiment: what to compare.
        model: on which model: one that is loaded, or what `load_model` takes.
        out: folder for ``results.jsonl``; what an earlier run of the same conditions left there is not run again.
        clock: seconds, for wall times; not for a launcher that runs elsewhere.
        launch: where it runs; in this process by default.
        note: is told in a sentence what happens to workers; None warns.

    Attributes:
        results: what exists so far, by (repeat, problem, policy).
        conditions: of what is decoded now.

    Raises:
        UsageError: for a prompt that does not fit the model, or a folder with results of other conditions.
    """

    def __init__(
        self,
        experiment: Experiment,
        model: AnyModel,
        out: str | PathLike[str] | None = None,
        clock: Callable[[], float] | None = None,
        launch: LaunchSettings | None = None,
        note: Callable[[str], None] | None = None,
    ):
        self._model = model
        self.launcher = _launcher(experiment, model, clock, launch or LaunchSettings(), note)
        try:
            self.experiment, self.conditions = self.launcher.experiment, self.launcher.conditions
            self.results: dict[tuple[int, str, str], Result] = {}
            self.file = None if out is None else ResultFile(out, self.conditions)
            if self.file is not None:
                self._take_over(self.file)
        except BaseException:
            self.launcher.close()
            raise

    def _take_over(self, file: ResultFile) -> None:
        marks = {problem.id: mark for problem, mark in zip(self.experiment.problems, self.launcher.marks, strict=True)}
        for result in file.results:
            if result.problem not in marks or result.repeat >= self.experiment.run.repeats:
                continue
            if marks[result.problem] != result.prompt:
                file.close()
                raise UsageError(
                    f"{file.path} has results for another prompt or answer of problem {result.problem!r}; "
                    "choose another directory"
                )
            self.results[result.key] = result

    def __iter__(self) -> Iterator[list[Result]]:
        """Decode what is missing; yields the results of one batch under one policy once they are written."""
        try:
            names = [name for name in self.experiment.policies if any(name == u.policy for u in self._missing())]
            for results in self.launcher.run(names, self._missing()):  # lazily: there may be very many
                if self.file is not None:
                    self.file.write(results)
                self.results |= {result.key: result for result in results}
                yield results
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the file and the workers; what is unfinished stays so."""
        self.launcher.close()
        if self.file is not None:
            self.file.close()

    def _missing(self) -> Iterator[Unit]:
        """Every batch that is still to be decoded, in the order of decoding."""
        problems, size = self.experiment.problems, self.experiment.settings.batch_size
        names = list(self.experiment.policies)
        for repeat in range(self.experiment.run.repeats):
            for number, begin in enumerate(range(0, len(problems), size)):
                turn = (repeat + number) % len(names)
                for name in names[turn:] + names[:turn]:
                    batch = range(begin, min(begin + size, len(problems)))
                    indices = [i for i in batch if (repeat, problems[i].id, name) not in self.results]
                    if indices:
                        yield Unit(repeat, number, name, tuple(indices))

    def here(self) -> Decoder:
        """The experiment in this process, for what results do not tell; loads the model if all runs elsewhere."""
        if isinstance(self.launcher, Local):
            return self.launcher.decoder
        return Decoder(self.experiment, _loaded(self._model))

    @property
    def comparison(self) -> Comparison:
        """What exists so far."""
        return Comparison(self.conditions, list(self.results.values()))


def _launcher(
    experiment: Experiment,
    model: AnyModel,
    clock: Callable[[], float] | None,
    settings: LaunchSettings,
    note: Callable[[str], None] | None,
) -> Launcher:
    if settings.launcher == "local":
        return Local(Decoder(experiment, _loaded(model), clock))
    from dcache.ray_launcher import RayLauncher  # here, because it needs a package that most do without

    return RayLauncher(experiment, _source(model), settings, note)


def _loaded(model: AnyModel) -> Model:
    return model if isinstance(model, Model) else load(_source(model))


def _source(model: AnyModel) -> Source:
    """How another process loads the model."""
    if isinstance(model, Model):
        if model.source is None:
            raise UsageError(
                f"model {model.name!r} was not loaded by load_model, so no other process can load it; save it, and "
                "give the folder"
            )
        return replace(model.source, weights=weights_of(model))
    return model if isinstance(model, Source) else Source.of(model)


class Memory:
    """GPU memory of one policy at a time, although the stores of all of them stay allocated."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.held: dict[str, int] = {}

    def begin(self) -> None:
        """A run begins."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)

    def end(self, name: str) -> int | None:
        """A run of a policy ended: its peak in bytes, less what the others hold; None on a CPU."""
        if not self.on_gpu:
            return None
        self.held[name] = self.held.get(name, 0) + torch.cuda.memory_allocated(self.device) - self.before
        others = sum(n_bytes for other, n_bytes in self.held.items() if other != name)
        return int(torch.cuda.max_memory_allocated(self.device)) - others


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison, whole or as far as it came.

    Attributes:
        conditions: under which they were found.
        results: one per decoded text.
    """

    conditions: Conditions
    results: list[Result]

    @property
    def standings(self) -> list[report.Standing]:
        """One row per policy: what the table shows, as numbers."""
        return report.standings(self.conditions, self.results)

    @property
    def warnings(self) -> list[str]:
        """What to keep in mind when reading the table, each with a next step."""
        return report.warnings(self.conditions, self.standings)

    def table(self, format: str = "table") -> str:
        """Conditions, one line per policy, and a summary: the text that ``dcache compare`` prints.

        Args:
            format: of it, as for ``--format``: table, json, csv, markdown or latex.
        """
        return formats.formatted(format, self.conditions, self.standings)

    def __repr__(self) -> str:
        n, names = len(self.results), ", ".join(entrant.policy for entrant in self.conditions.policies)
        return printable(f"<Comparison of {names} on {self.conditions.task} by {self.conditions.model}, {n} texts>")

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython shows on a terminal."""
        printer.text(self.table())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return formats.page(self.conditions, self.standings, self.warnings)

    def by_region(self) -> str:
        """One line per policy: rows and refreshes of images, of the rest of the prompt and of the generation.

        `table` has it too where a prompt has an image. Empty for results of an earlier version.
        """
        return "".join(f"{line}\n" for line in report.by_region(self.standings))

    def to_pandas(self, by: Literal["text", "policy"] = "text") -> DataFrame:
        """One row per text, or one per policy.

        Args:
            by: "text" has the fields of `results`; "policy" those of `standings`, the numbers behind the table.
        """
        from pandas import DataFrame

        if by not in ("text", "policy"):
            raise UsageError(f"by is {by!r}; choose 'text' or 'policy'")
        if by == "policy":
            return DataFrame([row.flat for row in self.standings], columns=report.flat_names())
        return DataFrame([result.flat for result in self.results])

    def save(self, path: str | PathLike[str]) -> Path:
        """Write ``results.jsonl`` into a folder, as ``out=`` does; returns the file. Other results are left alone."""
        file = Path(path) / FILE
        data = b"".join([line_of(self.conditions), *map(line_of, self.results)])
        try:
            if not file.exists():
                write_whole(file, data)
                return file
        except OSError as error:
            raise UsageError(f"results cannot be written to {file}: {error.strerror}") from error
        if self.load(path) != self:
            raise UsageError(f"{file} exists and holds other results; choose another directory")
        return file

    @staticmethod
    def load(path: str | PathLike[str]) -> Comparison:
        """Read what `save` or ``out=`` wrote."""
        conditions, results, _ = read_results(Path(path) / FILE)
        if not conditions:
            raise UsageError(f"{Path(path) / FILE} holds no results")
        return Comparison(conditions[-1], results)


def compare(
    model: AnyModel,
    policies: str | Sequence[Policy] = DEFAULT_POLICIES,
    task: str | Task | None = None,
    *,
    out: str | PathLike[str] | None = None,
    **settings: Any,
) -> Comparison:
    """Run policies on the same problems.

    Args:
        model: from `load_model`, or what it takes: a name, a folder.
        policies: names, calls such as ``"elastic(gamma=0.95)"``, or instances; or one text, ``"elastic,dkv"``. `none`
            always runs as the reference.
        task: a task's name, or an instance; None is gsm-mini, or scenes for a model that reads images.
        out: folder for ``results.jsonl``, written line by line; the same call again continues where it stopped.
        settings: limit, repeats and split of `CompareSettings`; launcher, workers and ray_address of
            `LaunchSettings`; gen_length, block_length, unmask, temperature, seed, batch_size, ... of `DecodeSettings`.

    Returns:
        a `Comparison`; ``print(result.table())``.

    Raises:
        UsageError: for unknown names, knobs out of bounds, prompts that do not fit, and results of other conditions.
        WorkerError: if workers are lost again and again.
    """
    launch = launch_settings(**{k: settings.pop(k) for k in [*settings] if k in LaunchSettings.model_fields})
    run = Run(Experiment(policies, task, **settings), model, out, launch=launch)
    for _ in run:
        pass
    return run.comparison
