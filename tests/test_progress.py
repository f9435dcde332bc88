"""How far a command is: what a terminal shows, what a log gets, and that nothing of it reaches stdout."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from dcache.bench import tables
from dcache.cli import main
from dcache.progress import Lines, Meter, duration, meter, note

FOLDER = Path(__file__).resolve().parent / "golden" / "models" / "llada_mha"
SMALL = ["--model", str(FOLDER), "--device", "cpu", "--gen-length", "8", "--block-length", "8"]
TINY = {"model": "tiny-llada"}
COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-8]|4[0-8]|9[0-7])[0-9;]*m")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def terminal(monkeypatch):
    """Makes stderr a terminal that can do everything; called in the test, whose stderr is not that of its fixtures."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return lambda: monkeypatch.setattr("sys.stderr.isatty", lambda: True)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3569, "59 min"), (3571, "1 h"), (12_000, "3 h 20 min"),
        (47.9 * 3600, "47 h 54 min"), (48 * 3600, "2 days"), (1e6, "12 days"),
    ],
)  # fmt: skip
def test_durations_have_two_units_at_the_most(seconds, text):
    assert duration(seconds) == text


def test_the_time_left_is_that_of_what_was_finished_now_and_not_of_what_was_there():
    clock = Clock()
    counted = Meter(total=30, unit="text", done=20, clock=clock)
    assert str(counted) == "20 of 30 texts"
    clock.now = 60
    counted.advance(2)
    assert str(counted) == "22 of 30 texts, about 4 min left"
    counted.advance(8)
    assert str(counted) == "30 of 30 texts"


def test_a_log_gets_a_line_now_and_then_and_the_fewer_the_longer_it_takes(capsys):
    clock = Clock()
    lines = Lines(total=1000, unit="text", clock=clock)
    for n in range(1000):
        clock.now = 20.0 * (n + 1)
        lines.advance()
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "31 of 1000 texts, about 5 h 23 min left"  # ten minutes
    assert 1000 * 20 / 600 - 2 < len(told) < 1000 * 20 / 600
    quick = Lines(total=1000, unit="text", clock=clock)
    for _ in range(1000):
        clock.now += 0.5
        quick.advance()
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == [str(61 * n) for n in range(1, 17)]


def test_a_terminal_gets_a_bar_with_count_and_time_left_that_is_gone_at_the_end(capsys, terminal):
    terminal()
    with meter("comparing", 3, "text", done=1) as bar:
        bar.advance()
        print("to stdout")
        note("to stderr")
    out, err = capsys.readouterr()
    assert out == "to stdout\n"
    assert "1 of 3 texts" in err
    assert re.search(r"2 of 3 texts, about 0 s left", err)
    assert "to stderr\n" in err
    assert err.endswith("\x1b[2K")  # the line of the bar, erased


def test_no_color_is_a_bar_without_colours(capsys, terminal, monkeypatch):
    terminal()
    with meter("comparing", 2, "text") as bar:
        bar.advance()
    assert COLOUR.search(capsys.readouterr().err)
    monkeypatch.setenv("NO_COLOR", "1")
    with meter("comparing", 2, "text") as bar:
        bar.advance()
    err = capsys.readouterr().err
    assert "1 of 2 texts" in err
    assert not COLOUR.search(err)


def test_a_dumb_terminal_gets_lines_without_an_escape(capsys, terminal, monkeypatch):
    terminal()
    monkeypatch.setenv("TERM", "dumb")
    assert main(["compare", *SMALL, "--policies", "dkv", "--limit", "1"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("comparing none, dkv on 1 problem\n")
    assert "\x1b" not in out + err


@pytest.mark.parametrize("no_colour", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_tables_of_benchmarks_have_no_colours_where_none_are_wanted(capsys, terminal, monkeypatch, no_colour):
    terminal()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for name, value in no_colour.items():
        monkeypatch.setenv(name, value)
    tables.show(tables.Table("heading", ["policy", "ms"], [["none", "1.0"]], ["a note"]))
    out = capsys.readouterr().out
    assert "none" in out
    assert not COLOUR.search(out)


def test_what_goes_on_cannot_command_the_terminal(capsys, terminal):
    terminal()
    with meter("[red]a\x1b]0;b\x07", 1, "text"):
        pass
    assert "[red]a\\x1b]0;b\\x07" in capsys.readouterr().err


def test_many_texts_are_counted_and_stdout_is_json_alone(capsys, terminal, tmp_path):
    terminal()
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "Ann"}\n{"prompt": "Ben"}\n')
    assert main(["generate", "--prompts", str(file), *SMALL]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["line-1", "line-2"]
    assert "generating" in err
    assert "2 of 2 texts" in err


def test_one_prompt_has_no_bar(capsys, terminal):
    terminal()
    assert main(["generate", "Ann", *SMALL]) == 0
    assert "generating" not in capsys.readouterr().err


def test_verify_counts_every_verdict_of_claims_recorded_runs_and_the_model(capsys, terminal, monkeypatch, tmp_path):
    terminal()
    from dcache.testing.search import Verdict
    from dcache.verify import verify

    methods = ("dkv", "dkv_cache_pd", "spa")
    runs = [SimpleNamespace(name=m, data={"method": m}, unsupported=None, check=lambda: None) for m in methods]
    monkeypatch.setattr("dcache.verify.cases", lambda folder: runs)
    monkeypatch.setattr("dcache.verify.MODEL_ROWS", 4)
    monkeypatch.setattr("dcache.testing.search.judge", lambda claim, *rest: Verdict(claim.name, claim.text, "pass"))
    for policy, more in (("dkv", {}), ("dkv", {"golden": tmp_path}), ("d2", {"golden": tmp_path}), ("dkv", TINY)):
        found = verify(policy, examples=1, **more)
        assert found.total == len(list(found)), (policy, more)
    assert main(["verify", "dkv", "--examples", "1"]) == 0
    assert f"of {verify('dkv').total} claims" in capsys.readouterr().err


def test_a_benchmark_counts_its_lines(capsys, terminal, monkeypatch):
    terminal()
    monkeypatch.setattr("dcache.bench.clock.LEAST", 1)
    monkeypatch.setattr("dcache.bench.clock.MOST", 1)
    assert main(["bench", "floor", str(FOLDER), "--rows", "1,16", "--device", "cpu"]) == 0
    err = capsys.readouterr().err
    assert "16 rows\n" in err
    assert "2 of 2 row counts" in err
