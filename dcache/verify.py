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


def verify(
    policy: str, *, golden: str | Path | None = None, model: str | None = None, **settings: Any
) -> Iterator[Verdict]:
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
    runs = None if golden is None else _runs(Path(golden))
    loaded = None if model is None else load_model(model, dtype=torch.float32)
    if loaded is not None and loaded.tokenizer is None:
        raise UsageError(f"--model {model} has no tokenizer, and the problems of gsm-mini are texts; give another")
    return _verdicts(Subject(policy, patience=how.patience), policy, how, runs, golden, loaded)


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


def _recorded(name: str, runs: list[Case], folder: str) -> Iterator[Verdict]:
    """Every recorded run of a method whose name begins with that of the policy: ``dkv-cache-pd`` for ``dkv``."""
    found = False
    for case in runs:
        method = str(case.data["method"]).replace("_", "-")
        if method != name and not method.startswith(f"{name}-"):
            continue
        found = True
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
    if not found:
        yield Verdict("golden", "recorded runs are reproduced", "n/a", f"{folder} has no run of a method {name!r}")


def _on_model(subject: Subject, policy: str, model: Model, seed: int) -> Iterator[Verdict]:
    """The exact configuration and the policy itself on problems of the default task, in float32."""
    problems = plugins().tasks.get("gsm-mini").thing().problems("test", MODEL_PROMPTS, seed)
    prompts = [model.prompt_ids(problem.prompt) for problem in problems]
    settings = settings_from(gen_length=MODEL_ROWS, block_length=MODEL_ROWS, seed=seed)
    where = f"on {model.name}, {len(prompts)} problems of gsm-mini, {MODEL_ROWS} rows"

    def run(text: str) -> list[Output]:
        return Runner(model, text, settings).run(prompts)

    reference = run("none")
    for text in [exact.policy for exact in subject.exacts if not exact.on and isinstance(exact.policy, str)]:
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
