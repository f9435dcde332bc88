"""Is a policy right? The conformance kit, recorded runs and a real model, as one list of verdicts.

What ``dcache verify`` prints, and the same for an installed policy as `dcache.testing.Conformance` for a test suite.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from dcache.calls import parse_call
from dcache.config import VerifySettings
from dcache.errors import UsageError
from dcache.generate import Output, Runner, settings_from
from dcache.models.loading import Model
from dcache.plugins import explain, load_model, make_policy, plugins
from dcache.testing.claims import CLAIMS
from dcache.testing.golden import Case, cases
from dcache.testing.search import Verdict, describe, judge_all
from dcache.testing.subject import Subject

MODEL_PROMPTS, MODEL_ROWS = 2, 32  # of the check on a real model: seconds on a CPU


def verify_settings(**settings: Any) -> VerifySettings:
    """Validate them; raises UsageError naming the field, the value and the bound."""
    try:
        return VerifySettings.model_validate(settings)
    except ValidationError as error:
        raise UsageError("; ".join(explain("the check", VerifySettings, e) for e in error.errors())) from None


class Verdicts(Iterator[Verdict]):
    """Verdicts, each found when it is asked for.

    Attributes:
        total: how many there will be.
    """

    def __init__(self, each: Iterator[Verdict], total: int):
        self.each, self.total = each, total

    def __next__(self) -> Verdict:
        return next(self.each)


def verify(policy: str, *, golden: str | Path | None = None, model: str | None = None, **settings: Any) -> Verdicts:
    """Verdicts on an installed policy, one by one; what was asked for is checked before the first.

    Args:
        policy: as for ``--policies``: a name, with knobs if you like.
        golden: folder of recorded runs; those of this policy are replayed.
        model: a checkpoint; the exact configuration must equal `none` on it, and the agreement of the policy is told.
        settings: fields of `dcache.config.VerifySettings`: examples, seed, patience.

    Raises:
        UsageError: for unknown names, knobs out of bounds, a folder without runs, a checkpoint that cannot be loaded.
    """
    make_policy(policy)
    how = verify_settings(**settings)
    name = parse_call(policy).name
    runs = None if golden is None else [case for case in _runs(Path(golden)) if _is_of(case, name)]
    loaded = None if model is None else load_model(model, dtype=torch.float32)
    if loaded is not None and loaded.tokenizer is None:
        raise UsageError(f"--model {model} has no tokenizer, and the problems of gsm-mini are texts; give another")
    subject = Subject(policy, patience=how.patience)
    total = len(CLAIMS) + (0 if runs is None else max(len(runs), 1))
    total += 0 if loaded is None else len(_exact_calls(subject)) + 1
    return Verdicts(_verdicts(subject, policy, how, runs, golden, loaded), total)


def _runs(folder: Path) -> list[Case]:
    if not folder.is_dir():
        raise UsageError(f"--golden {folder} is not a folder; give the one that holds recorded runs")
    if not (found := list(cases(folder.resolve()))):
        raise UsageError(
            f"--golden {folder} holds no recorded run of a known method; a run is a JSON file with settings and steps"
        )
    return found


def _verdicts(
    subject: Subject,
    policy: str,
    how: VerifySettings,
    runs: list[Case] | None,
    golden: str | Path | None,
    model: Model | None,
) -> Iterator[Verdict]:
    yield from judge_all(subject, how.examples, how.seed)
    if runs is not None:
        yield from _recorded(parse_call(policy).name, runs, f"{golden}")
    if model is not None:
        yield from _on_model(subject, policy, model, how.seed)


def source_of(policy: str) -> str:
    """The distribution that a policy comes from."""
    return plugins().policies.get(parse_call(policy).name).source


def _is_of(case: Case, name: str) -> bool:
    """Whether a recorded run is of a method whose name begins with that of the policy: ``dkv-cache-pd`` for ``dkv``."""
    method = str(case.data["method"]).replace("_", "-")
    return method == name or method.startswith(f"{name}-")


def _recorded(name: str, runs: list[Case], folder: str) -> Iterator[Verdict]:
    """Every recorded run of the policy."""
    for case in runs:
        claim, text = f"golden:{case.name}", f"the recorded run {case.name} is reproduced"
        try:
            if reason := case.unsupported:
                yield Verdict(claim, text, "n/a", reason)
                continue
            case.check()
        except Exception as error:
            snippet = "from pathlib import Path\nfrom dcache.testing.golden import cases\n\n"
            snippet += f"next(c for c in cases(Path({folder!r})) if c.name == {case.name!r}).check()"
            yield Verdict(claim, text, "fail", describe(error), case.name, snippet)
        else:
            yield Verdict(claim, text, "pass")
    if not runs:
        yield Verdict("golden", "recorded runs are reproduced", "n/a", f"{folder} has no run of a method {name!r}")


def _exact_calls(subject: Subject) -> list[str]:
    """The configurations that equal no cache on any canvas, as they are written."""
    return [exact.policy for exact in subject.exacts if not exact.on and isinstance(exact.policy, str)]


def _on_model(subject: Subject, policy: str, model: Model, seed: int) -> Iterator[Verdict]:
    """The exact configuration and the policy itself on problems of the default task, in float32."""
    problems = plugins().tasks.get("gsm-mini").thing().problems("test", MODEL_PROMPTS, seed)
    prompts = [model.prompt_ids(problem.prompt) for problem in problems]
    settings = settings_from(gen_length=MODEL_ROWS, block_length=MODEL_ROWS, seed=seed)
    where = f"on {model.name}, {len(prompts)} problems of gsm-mini, {MODEL_ROWS} rows"

    def run(text: str) -> list[Output]:
        return Runner(model, text, settings).run(prompts)

    reference = run("none")
    for text in _exact_calls(subject):
        off = [b for b, (mine, want) in enumerate(zip(run(text), reference, strict=True)) if mine.canvas != want.canvas]
        detail = f"the texts of problems {off} differ" if off else ""
        yield Verdict("model:exact", f"{text} decodes what none decodes {where}", "fail" if off else "pass", detail)
    try:
        outputs = run(policy)
    except UsageError as error:
        yield Verdict("model:agreement", f"it decodes {where}", "n/a", str(error))
        return
    same = [
        i == j
        for out, want in zip(outputs, reference, strict=True)
        for i, j in zip(out.canvas, want.canvas, strict=True)
    ]
    share = sum(out.trace.row_share for out in outputs) / len(outputs)
    told = f"agrees with none in {sum(same)} of {len(same)} tokens, computing {share:.0%} of the rows"
    yield Verdict("model:agreement", f"it decodes {where}: {told}", "pass")
