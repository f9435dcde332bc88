"""``dcache bench`` from the command line, on a small model and a CPU."""

import builtins
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.main import get_command

from dcache.bench import clock, e2e, profile
from dcache.bench import commands as bench
from dcache.bench.activity import FIRST_PASS, Span, Step
from dcache.bench.reports import EndToEndReport, FloorReport, read
from dcache.cli import main
from dcache.errors import PolicyError
from dcache.progress import Meter

ROOT = Path(__file__).resolve().parents[2]
SMALL = str(ROOT / "tests" / "golden" / "models" / "llada_mha")
SHORT = ["--prompt", "6", "--gen", "4", "--block", "4", "--device", "cpu", "--repeats", "1"]
E2E = ["bench", "e2e", SMALL, *SHORT, "--policies"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(clock, "LEAST", 1)
    monkeypatch.setattr(clock, "MOST", 1)


def refused(capsys, *arguments):
    """The one line of an error."""
    code = main(["bench", *arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    return line.removeprefix("error: ")


def test_the_reference_explains_every_option_of_every_command():
    _, _, text = (ROOT / "docs" / "reference" / "cli.md").read_text().partition("## `dcache bench`")
    text, _, _ = text.partition("\n## ")
    missing = []
    for name, command in get_command(bench.app).commands.items():
        _, _, mine = text.partition(f"`dcache bench {name}`")
        mine, _, _ = mine.partition("\n`dcache bench ")
        flags = [flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")]
        missing += [f"{name} {flag}" for flag in flags if f"`{flag}`" not in mine]
    assert missing == []


def test_floor_writes_and_prints_a_line_per_row_count(capsys, tmp_path):
    assert main(["bench", "floor", SMALL, "--rows", "1,16", "--device", "cpu", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == ["1 rows", "16 rows"]
    assert out.startswith("llada_mha, float32, ")
    assert out.splitlines()[1].split() == ["rows", "head", "rows", "ms", "TFLOP/s", "TB/s"]
    report = read(tmp_path / "floor-llada_mha.json")
    assert isinstance(report, FloorReport)
    assert [(p.rows, p.head_rows) for p in report.results] == [(1, 32), (16, 32)]
    assert "| 16 | 32 |" in (tmp_path / "floor-llada_mha.md").read_text()


def test_e2e_runs_each_policy_at_each_batch_size_and_writes_what_it_found(capsys, tmp_path):
    assert main([*E2E, "none,elastic(gamma=0)", "--batch", "1,2", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    names = [("none", 1), ("elastic(gamma=0.0)", 1), ("none", 2), ("elastic(gamma=0.0)", 2)]
    assert [line.split(":")[0] for line in err.splitlines()] == [f"{name}, batch {n}" for name, n in names]
    assert "prompt 6, gen 4, block 4, 1 repeats" in out
    report = read(tmp_path / "e2e-llada_mha.json")
    assert isinstance(report, EndToEndReport)
    assert [(r.policy, r.batch) for r in report.results] == names
    none, elastic, *_ = report.results
    assert (none.steps, none.nfe, none.rows, none.row_share, none.head_rows) == (4, 4, 10, 1, 2.5)
    assert elastic.rows < none.rows
    assert all(r.all.n == 4 and r.all.p5 <= r.all.p50 <= r.all.p95 for r in report.results)
    assert all(r.tok_s > 0 and r.store_bytes > 0 and r.peak_bytes is None for r in report.results)
    assert {10, 20} <= {p.rows for p in report.floor}
    assert not none.graphs


def test_several_tokens_per_step_take_fewer_steps(tmp_path):
    assert main([*E2E, "none", "--tokens-per-step", "1,2", "--out", str(tmp_path)]) == 0
    assert [r.steps for r in read(tmp_path / "e2e-llada_mha.json").results] == [4, 2]


STEP = Step(0.0, 1000.0, [Span(0.0, 900.0, FIRST_PASS)], [Span(100.0, 800.0, "gemm")], syncs=1)


@pytest.fixture
def profiler(monkeypatch, tmp_path):
    """A profiler that works on a CPU; what was called in which order, and in `files` what each profile found written.

    `fails` makes the errors of profiles, by their number.
    """
    found = SimpleNamespace(calls=[], files=[], meters=[], engines=[], fails={})
    decode, engine = e2e.decode, e2e.Engine

    def called(name, work):
        def calling(*given, **named):
            found.calls.append(name)
            return work(*given, **named)

        return calling

    def made(*given, **named):
        assert [old() for old in found.engines] == [None] * len(found.engines)  # one at a time
        new = engine(*given, **named)
        found.engines.append(weakref.ref(new))
        return new

    def steps(engine, state):
        found.calls.append("profile")
        found.files.append(read(tmp_path / "e2e-llada_mha.json").results)
        decode(engine, state())
        if error := found.fails.get(len(found.files)):
            raise error()
        return [STEP]

    @contextmanager
    def meter(what, total, unit, lines):
        bar = Meter(total, unit)
        yield bar
        found.meters.append((what, bar.total, bar.done))

    monkeypatch.setattr(profile, "require_gpu", lambda device: None)
    monkeypatch.setattr(e2e, "Engine", made)
    monkeypatch.setattr(e2e, "decode", called("decode", decode))
    monkeypatch.setattr(e2e, "summary", called("floor", e2e.summary))
    idle = profile.Idle(0.25, 0.3, (0.2, 0.3), (60, 90))
    monkeypatch.setattr(e2e, "idle_share", called("idle", lambda engine, state, limit: idle))
    monkeypatch.setattr(e2e, "profiled_steps", steps)
    monkeypatch.setattr(bench, "meter", meter)
    return found


def test_no_profile_is_made_before_the_times_of_all_lines_are_in_the_file(capsys, tmp_path, profiler):
    assert main([*E2E, "none,elastic", "--batch", "1,2", "--split", "--trace", "--out", str(tmp_path)]) == 0
    assert profiler.calls == ["decode", "decode", "idle", "floor"] * 4 + ["profile"] * 4
    assert len(profiler.engines) == 8
    for i, results in enumerate(profiler.files):
        assert [r.all is not None for r in results] == [True] * 4
        assert [bool(r.split) for r in results] == [r.gaps is not None for r in results] == [n < i for n in range(4)]
    last = read(tmp_path / "e2e-llada_mha.json").results
    assert [r.model_copy(update={"split": [], "gaps": None}) for r in last] == profiler.files[0]
    assert [(r.split[0].wall, r.gaps.syncs, r.gaps.idle, r.gaps.idle_mean) for r in last] == [(1.0, 1, 0.25, 0.3)] * 4
    assert [(r.gaps.idle_decodes, r.gaps.idle_probes) for r in last] == [((0.2, 0.3), (60, 90))] * 4
    assert profiler.meters == [("measuring", 4, 4), ("profiling", 4, 4)]
    out, err = capsys.readouterr()
    assert [line.endswith(": profiled") for line in err.splitlines()] == [False] * 4 + [True] * 4
    assert "Where the time goes" in out
    assert "What the device waits for" in out
    assert "20.00 to 30.00 %" in out
    assert "20.00 % (1 of 2)" in out


def test_without_split_and_trace_nothing_is_profiled(tmp_path, profiler):
    assert main([*E2E, "none", "--out", str(tmp_path)]) == 0
    assert profiler.calls == ["decode", "decode", "floor"]
    assert profiler.meters == [("measuring", 1, 1)]


@pytest.mark.parametrize(("flag", "split", "trace"), [("--split", True, False), ("--trace", False, True)])
def test_a_profile_tells_what_was_asked_for(flag, split, trace, tmp_path, profiler):
    assert main([*E2E, "none", flag, "--out", str(tmp_path)]) == 0
    (found,) = read(tmp_path / "e2e-llada_mha.json").results
    assert (bool(found.split), found.gaps is not None) == (split, trace)
    assert profiler.calls == ["decode", "decode", *["idle"] * trace, "floor", "profile"]


def test_a_line_without_times_is_not_profiled_and_keeps_its_place(tmp_path, profiler):
    assert main([*E2E, "dkv(variant=greedy),none", "--split", "--out", str(tmp_path)]) == 0
    failed, good = read(tmp_path / "e2e-llada_mha.json").results
    assert failed.failure.startswith("it cannot run like this: ")
    assert (failed.split, failed.unprofiled) == ([], None)
    assert good.split
    assert profiler.calls.count("profile") == 1
    assert profiler.meters == [("measuring", 2, 2), ("profiling", 1, 1)]


@pytest.mark.parametrize(
    ("error", "why"),
    [(torch.OutOfMemoryError, "out of memory with batch 1"), (lambda: PolicyError("no rows"), "no rows")],
    ids=["memory", "policy"],
)
def test_times_survive_a_profile_that_fails(error, why, capsys, tmp_path, profiler):
    profiler.fails[1] = error
    assert main([*E2E, "none,elastic", "--trace", "--out", str(tmp_path)]) == 0
    failed, good = read(tmp_path / "e2e-llada_mha.json").results
    assert failed.all is not None
    assert failed.failure is None
    assert why in failed.unprofiled
    assert good.gaps is not None
    out, err = capsys.readouterr()
    assert f"none, batch 1, 1 a step: no profile: {why}" in out
    assert err.splitlines()[2:] == ["none, batch 1: profile failed", f"{good.policy}, batch 1: profiled"]


def test_an_interrupted_profile_leaves_all_times_and_the_profiles_before_it(tmp_path, profiler):
    profiler.fails[2] = KeyboardInterrupt
    assert main([*E2E, "none,dkv,elastic", "--split", "--out", str(tmp_path)]) == 130
    found = read(tmp_path / "e2e-llada_mha.json").results
    assert [(r.all is not None, bool(r.split)) for r in found] == [(True, True), (True, False), (True, False)]


def test_a_budget_stops_decodes_early_and_says_so(capsys, tmp_path):
    arguments = ["--prompt", "6", "--gen", "12", "--block", "none", "--repeats", "2", "--seconds", "0.0001"]
    assert main(["bench", "e2e", SMALL, "--device", "cpu", "--policies", "none", *arguments]) == 0
    assert "none, batch 1, 1 a step: stopped after 8 steps of each decode" in capsys.readouterr().out


def test_a_figure_is_drawn_from_what_was_written(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert main([*E2E, "none,dkv", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["bench", "plot", str(tmp_path / "e2e-llada_mha.json"), "--out", str(tmp_path / "new" / "steps")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "new" / f"steps.{end}") for end in ("svg", "png")]
    drawing = (tmp_path / "new" / "steps.svg").read_text()
    assert all(text in drawing for text in ("floor: linear layers alone", "dkv", "ms per step"))


def test_drawing_without_matplotlib_says_what_to_install(capsys, tmp_path, monkeypatch):
    assert main([*E2E, "none", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'dcache[plot]'" in refused(capsys, "plot", str(tmp_path / "e2e-llada_mha.json"))


def test_mistakes_are_told_before_anything_is_loaded(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("dcache.bench.commands.load_model", None)
    e2e = ("e2e", SMALL)
    assert "unknown policy 'elatsic'" in refused(capsys, *e2e, "--policies", "elatsic")
    assert "--batch is '1,x'" in refused(capsys, *e2e, "--batch", "1,x")
    assert "must be at least 1" in refused(capsys, *e2e, "--batch", "0")
    assert "repeats=0" in refused(capsys, *e2e, "--repeats", "0")
    assert "--rows is '16;64'" in refused(capsys, "floor", SMALL, "--rows", "16;64")
    assert "unknown op 'atend'" in refused(capsys, "kernels", "--ops", "atend")
    assert "unknown dtype 'int8'" in refused(capsys, "kernels", "--dtype", "int8")


def test_a_canvas_that_does_not_fit_ends_the_command(capsys):
    assert "divisible" in refused(capsys, "e2e", SMALL, *SHORT, "--block", "3", "--policies", "none")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_what_needs_a_gpu_says_so(capsys):
    assert "needs a CUDA device" in refused(capsys, "kernels")
    assert "profile a GPU" in refused(capsys, "e2e", SMALL, *SHORT, "--policies", "none", "--split")
