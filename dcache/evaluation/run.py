"""Several policies on tasks of lm-evaluation-harness: what ``dcache eval`` does, and the table that it prints."""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partialmethod
from itertools import groupby
from pathlib import Path
from typing import Any

from dcache.bench.tables import Table
from dcache.calls import Call
from dcache.conditions import version_of
from dcache.errors import UsageError
from dcache.evaluation.counters import Counters
from dcache.models.loading import Model

INSTALL = "pip install 'dcache[eval]'"
NAMED = re.compile(r"^(task|group):[ \t]*['\"]?([\w.:/-]+)", re.MULTILINE)
COUNTERS = tuple(Counters().summary())


@dataclass(frozen=True)
class Evaluation:
    """Tasks, and how the harness puts them.

    Attributes:
        tasks: names of tasks or groups, wildcards, and YAML files.
        include: folders with more tasks.
        limit: problems of each task; None is all.
        shots: examples in each prompt; None is the task's own number.
        chat: write prompts as conversations, by the chat template.
        system: system turn of those.
        generation: arguments that replace the tasks' own, ``max_gen_toks=64,temperature=0.5``.
        samples: keep every text, and write it beside the results.
        out: folder for the harness's results files; None writes none.
    """

    tasks: tuple[str, ...]
    include: tuple[Path, ...] = ()
    limit: int | None = None
    shots: int | None = None
    chat: bool = False
    system: str | None = None
    generation: str | None = None
    samples: bool = False
    out: Path | None = None


@dataclass(frozen=True)
class Score:
    """One metric of one task under one policy.

    Attributes:
        policy: as written.
        task: its name, or that of a group.
        metric: name, and the filter of the task where it has several: ``exact_match,strict-match``.
        value, stderr: as the harness gives them; `stderr` None if it has none.
        counters: `Counters.summary` of the task; None for a group, and for a task without generation.
    """

    policy: str
    task: str
    metric: str
    value: float
    stderr: float | None
    counters: dict[str, Any] | None

    @property
    def flat(self) -> dict[str, Any]:
        """One line of a table."""
        named = {"policy": self.policy, "task": self.task, "metric": self.metric}
        counted = {name: (self.counters or {}).get(name) for name in COUNTERS}
        return named | {"value": self.value, "stderr": self.stderr} | counted


class Evaluator:
    """The harness, ready to evaluate policies one after another.

    Args:
        evaluation: what to run.
        model: loaded, shared by all policies.
        arguments: those of `DCacheLM` without model and policy.

    Raises:
        UsageError: if the harness is not installed, for a task that there is not, and a folder that cannot be written.
    """

    def __init__(self, evaluation: Evaluation, model: Model, arguments: dict[str, Any]):
        try:
            from lm_eval.tasks import TaskManager

            from dcache.evaluation.harness import DCacheLM
        except ImportError as error:
            raise UsageError(f"lm-evaluation-harness cannot be imported ({error}); {INSTALL}") from error
        self.evaluation, self.model, self.arguments = evaluation, model, arguments
        files = [Path(task) for task in evaluation.tasks if task.endswith((".yaml", ".yml"))]
        kinds, names = zip(*(_named(file) for file in files), strict=True) if files else ((), ())
        alone = len(files) == len(evaluation.tasks) and "group" not in kinds  # then 14,000 other files need not be read
        folders = dict.fromkeys(str(folder) for folder in (*(file.parent for file in files), *evaluation.include))
        self.manager = TaskManager(include_path=[*folders] or None, include_defaults=not alone)
        self.tasks = [*names, *self._matching([task for task in evaluation.tasks if Path(task) not in files])]
        if evaluation.out is not None:
            _writable(evaluation.out)
        self._make: Callable[..., Any] = DCacheLM
        self._likelihood: Any = None

    def _matching(self, asked: Sequence[str]) -> list[str]:
        found = []
        for name in asked:
            matches = self.manager.match_tasks([name])
            if not matches:
                near = difflib.get_close_matches(name, self.manager.all_tasks, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise UsageError(f"lm_eval has no task {name!r}.{hint}  `lm_eval ls tasks` lists them")
            found += matches
        return found

    def run(self, policy: Call) -> tuple[dict[str, Any], list[Score]]:
        """Evaluate one policy; its results file is written before this returns.

        Returns:
            what the harness found, with policy, knobs and counters under ``config``; and the scores in it.
        """
        lm = self._make(
            loaded=self.model, likelihood=self._likelihood, **self.arguments, model=self.model.name, policy=str(policy)
        )
        self._likelihood = lm.likelihood  # whose answers no policy changes
        try:
            with _bars():
                results = self._evaluate(lm)
        except OSError as error:  # of the data sets: no network, no such file
            raise UsageError(f"the data of {', '.join(self.tasks)} cannot be read: {error}") from error
        return results, scores(str(policy), results, lm)

    def _evaluate(self, lm: Any) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker

        how = self.evaluation
        tracker = EvaluationTracker(output_path=None if how.out is None else str(how.out))
        results: dict[str, Any] = simple_evaluate(
            model=lm,
            model_args={"model": self.model.name, "policy": str(lm.arguments.policy), **self.arguments},
            tasks=self.tasks,
            num_fewshot=how.shots,
            limit=how.limit,
            log_samples=how.samples,
            evaluation_tracker=tracker,
            system_instruction=how.system,
            apply_chat_template=how.chat,
            fewshot_as_multiturn=how.chat,
            gen_kwargs=how.generation,
            task_manager=self.manager,
        )
        results["config"]["model"] = "dcache"  # as with the harness's own command, which is given a name
        if how.out is not None:
            _save(tracker, results, how.out)
        return results


@contextmanager
def _bars() -> Iterator[None]:
    """Progress bars on a terminal alone; the harness draws its own whatever stderr is."""
    from tqdm import tqdm

    usual = tqdm.__init__
    if not sys.stderr.isatty():
        tqdm.__init__ = partialmethod(usual, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = usual


def _named(file: Path) -> tuple[str, str]:
    """Whether a YAML file defines a task or a group, and its name."""
    try:
        found = NAMED.search(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"task {str(file)!r} cannot be read: {error}") from error
    if found is None:
        raise UsageError(f"{file} defines no task: it has no line 'task: NAME'")
    return found[1], found[2]


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (probe := folder / f".dcache-{os.getpid()}").touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"results cannot be written to {folder}: {error.strerror}") from error


def _save(tracker: Any, results: dict[str, Any], out: Path) -> None:
    """As the harness's own command does; it only logs what it could not write."""
    before = set(out.rglob("results_*.json"))
    samples = results.get("samples")
    tracker.save_results_aggregated(results={k: v for k, v in results.items() if k != "samples"}, samples=samples)
    for task, lines in (samples or {}).items():
        tracker.save_results_samples(task_name=task, samples=lines)
    if set(out.rglob("results_*.json")) == before:
        raise UsageError(f"results could not be written to {out}; is the disk full?")


def scores(policy: str, results: dict[str, Any], lm: Any) -> list[Score]:
    """Every number that the harness found, task by task."""
    return list(_scores(policy, results, lm))


def _scores(policy: str, results: dict[str, Any], lm: Any) -> Iterator[Score]:
    for task, found in results["results"].items():
        counters = lm.counters[task].summary() if task in lm.counters and lm.counters[task].texts else None
        for key, value in found.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = found.get(f"{metric}_stderr,{filter_}")
            name = metric if filter_ == "none" else key
            yield Score(policy, task, name, float(value), stderr if isinstance(stderr, int | float) else None, counters)


# The table


def tables(found: Sequence[Score], heading: str) -> list[Table]:
    """One for each task: a line for each policy, quality beside cost."""
    by_task = {task: list(group) for task, group in groupby(sorted(found, key=lambda s: s.task), lambda s: s.task)}
    parts = [_table(task, mine) for task, mine in by_task.items()]
    first = [Table(f"{heading}\n{part.heading}", part.titles, part.rows, part.notes) for part in parts[:1]]
    return first + parts[1:]


def _table(task: str, found: Sequence[Score]) -> Table:
    metrics = list(dict.fromkeys(score.metric for score in found))
    by_policy: dict[str, dict[str, Score]] = {}
    for score in found:
        by_policy.setdefault(score.policy, {})[score.metric] = score
    counted = any(score.counters for score in found)
    titles = ["policy", *metrics, *(["tok/s", "NFE", "tokens/forward", "rows", "refreshes"] if counted else [])]
    rows = [
        [policy, *(_value(mine.get(name)) for name in metrics), *(_cost(next(iter(mine.values()))) if counted else [])]
        for policy, mine in by_policy.items()
    ]
    same = "" if counted else "Scored by likelihood, from whole passes: no policy changes these numbers."
    return Table(task, titles, rows, [same] if same else [])


def _value(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")


def _cost(score: Score) -> list[str]:
    c = score.counters
    if c is None:
        return ["-"] * 5
    shown = (("tok_s", 1), ("nfe", 1), ("tokens_per_forward", 2))
    numbers = ["-" if c[name] is None else f"{c[name]:.{digits}f}" for name, digits in shown]
    rows = "-" if c["row_share"] is None else f"{100 * c['row_share']:.0f} %"
    return [*numbers, rows, "-" if c["refreshes"] is None else f"{c['refreshes']:.1f}"]


def heading(infos: Sequence[dict[str, Any]], evaluation: Evaluation) -> str:
    """The conditions in two lines, from what `DCacheLM.get_model_info` says of each policy."""
    info, unmaskers = infos[0], {info["unmask"] for info in infos}
    settings = info["settings"]
    threads = "" if info["threads"] is None else f", {info['threads']} thread{'s' * (info['threads'] != 1)}"
    parts = [
        f"{info['model']}, {info['dtype']}, {info['device_name']}{threads}",
        f"torch {info['torch'].partition('+')[0]}, dcache {info['version']}, lm_eval {version_of('lm_eval')};",
    ]
    unmask = info["unmask"] if len(unmaskers) == 1 else "paired unmaskers"
    run = [unmask, f"batch {settings['batch_size']}", f"seed {settings['seed']}"]
    run += [f"gen {settings['gen_length']}"] * (settings["gen_length"] is not None)
    run += [f"first {evaluation.limit} problems of each task"] * (evaluation.limit is not None)
    return ", ".join(parts) + "\n" + ", ".join(run)


def as_text(found: Sequence[Score], head: str) -> str:
    """For a screen."""
    return "\n\n".join(table.plain() for table in tables(found, head)) + "\n"


def as_markdown(found: Sequence[Score], head: str) -> str:
    """For a README or an issue."""
    return "\n".join(table.markdown() for table in tables(found, head))


def as_json(found: Sequence[Score], head: str) -> str:
    """One object for each policy, task and metric."""
    return json.dumps([score.flat for score in found], indent=2) + "\n"


def as_csv(found: Sequence[Score], head: str) -> str:
    """One line for each policy, task and metric."""
    out = io.StringIO()
    writer = csv.DictWriter(out, ["policy", "task", "metric", "value", "stderr", *COUNTERS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(score.flat for score in found)
    return out.getvalue()


FORMATS: dict[str, Callable[[Sequence[Score], str], str]] = {
    "table": as_text,
    "json": as_json,
    "csv": as_csv,
    "markdown": as_markdown,
}
