"""Is a policy right? The conformance kit, recorded runs and a real model, as one list of verdicts.

What ``dcache verify`` prints, and the same for an installed policy as `dcache.testing.Conformance` for a test suite.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from dcache.calls import parse_call
from dcache.errors import UsageError
from dcache.generate import Output, Runner, settings_from
from dcache.plugins import load_model, make_policy, plugins
from dcache.testing.golden import cases
from dcache.testing.search import Verdict, describe, judge_all
from dcache.testing.subject import Subject

MODEL_PROMPTS, MODEL_ROWS = 2, 32  # of the check on a real model: seconds on a CPU


def verify(
    policy: str, *, examples: int = 20, seed: int = 0, golden: Path | None = None, model: str | None = None
) -> Iterator[Verdict]:
    """Verdicts on an installed policy, one by one.

    Args:
        policy: as for ``--policies``: a name, with knobs if you like.
        examples: canvases per claim of the kit.
        seed: of the drawing.
        golden: folder of recorded runs; those of this policy are replayed.
        model: a checkpoint; the exact configuration must equal `none` on it, and the agreement of the policy is told.

    Raises:
        UsageError: for unknown names, knobs out of bounds, and a folder without runs.
    """
    make_policy(policy)
    if golden is not None and not golden.is_dir():
        raise UsageError(f"--golden {golden} is not a folder")
    return _verdicts(policy, examples, seed, golden, model)


def _verdicts(policy: str, examples: int, seed: int, golden: Path | None, model: str | None) -> Iterator[Verdict]:
    subject = Subject(policy)
    yield from judge_all(subject, examples, seed)
    if golden is not None:
        yield from _recorded(parse_call(policy).name, golden)
    if model is not None:
        yield from _on_model(subject, policy, model, seed)


def source_of(policy: str) -> str:
    """The distribution that a policy comes from."""
    return plugins().policies.get(parse_call(policy).name).source


def _recorded(name: str, folder: Path) -> Iterator[Verdict]:
    """Every recorded run of a method whose name begins with that of the policy: ``dkv-cache-pd`` for ``dkv``."""
    found = False
    for case in cases(folder.resolve()):
        method = str(case.data["method"]).replace("_", "-")
        if method != name and not method.startswith(f"{name}-"):
            continue
        found = True
        claim, text = f"golden:{case.name}", f"the recorded run {case.name} is reproduced"
        if case.unsupported:
            yield Verdict(claim, text, "n/a", case.unsupported)
            continue
        try:
            case.check()
        except Exception as error:
            snippet = "from pathlib import Path\nfrom dcache.testing.golden import cases\n\n"
            snippet += f"next(c for c in cases(Path({str(folder)!r})) if c.name == {case.name!r}).check()"
            yield Verdict(claim, text, "fail", describe(error), case.name, snippet)
        else:
            yield Verdict(claim, text, "pass")
    if not found:
        yield Verdict("golden", "recorded runs are reproduced", "n/a", f"{folder} has no run of a method {name!r}")


def _on_model(subject: Subject, policy: str, name: str, seed: int) -> Iterator[Verdict]:
    """The exact configuration and the policy itself on problems of the default task, in float32."""
    model = load_model(name, dtype=torch.float32)
    problems = plugins().tasks.get("gsm-mini").thing().problems("test", MODEL_PROMPTS, seed)
    prompts = [model.prompt_ids(problem.prompt) for problem in problems]
    settings = settings_from(gen_length=MODEL_ROWS, block_length=MODEL_ROWS, seed=seed)
    where = f"on {name}, {len(prompts)} problems of gsm-mini, {MODEL_ROWS} rows"

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
