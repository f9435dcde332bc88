"""What a shell is offered after TAB, and that it need not wait for torch."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import dcache
from dcache import completion
from dcache.bench import commands as bench
from dcache.cli import app, main
from dcache.plugins import plugins

HOME = Path(dcache.__file__).parents[1]  # site-packages, or the checkout when dcache is not installed
SCRIPT = """\
#!{python}
import atexit, sys
atexit.register(lambda: print("torch" in sys.modules, file=sys.stderr))
from dcache.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def outline():
    return completion.outline_of(app)


@pytest.fixture
def kept(outline, tmp_path, monkeypatch):
    """An outline that was kept by an earlier TAB; returns the file."""
    monkeypatch.setenv("DCACHE_CACHE_DIR", str(tmp_path / "cache"))
    file = completion._file()
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(outline | {"stamp": completion.stamp()}))
    return file


@pytest.fixture
def offered(outline, monkeypatch, capsys):
    """What bash is offered for a line; the last word is completed."""

    def complete(line):
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        monkeypatch.setenv(completion.ASKED, "complete_bash")
        with pytest.raises(SystemExit):
            completion._reply(outline)
        return capsys.readouterr().out.split()

    return complete


def test_every_command_and_option_is_in_the_outline(outline):
    def flags(command):
        return {
            name: sorted(flag for p in inner.params for flag in p.opts if flag.startswith("--") and flag != "--help")
            for name, inner in typer.main.get_command(command).commands.items()
            if not hasattr(inner, "commands")
        }

    def outlined(entry):
        found = entry["commands"].items()
        return {n: sorted(f for p in c["parameters"] for f in p["flags"]) for n, c in found if not c["commands"]}

    assert outlined(outline["root"]) == flags(app)
    assert outlined(outline["root"]["commands"]["bench"]) == flags(bench.app)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dcache comp", ["compare"]),
        ("dcache bench fl", ["floor"]),
        ("dcache compare --conf", ["--config", "--confidence"]),
        ("dcache compare --policies elas", ["elastic"]),
        ("dcache compare --policies dkv,elas", ["dkv,elastic"]),
        ("dcache compare --limit 3 --policies dkv,d", ["dkv,d2", "dkv,dkv", "dkv,dllm-cache"]),
        ("dcache compare --policies elastic(gam", []),
        ("dcache compare --policies elastic(gamma=1,", []),
        ("dcache generate --policy vl", ["vlcache"]),
        ("dcache verify vl", ["vlcache"]),
        ("dcache compare --unmask pa", ["paired"]),
        ("dcache compare --unmask low", ["low-confidence"]),
        ("dcache compare --model tiny-l", ["tiny-llada", "tiny-llada-v"]),
        ("dcache bench floor llada-8", ["llada-8b:random"]),
        ("dcache compare --task gs", ["gsm-mini"]),
        ("dcache compare --family dr", ["dream"]),
        ("dcache compare --eos-last ", ["off", "on", "published"]),
        ("dcache compare --dtype fp", ["fp16", "fp32"]),
        ("dcache --install", ["--install-completion"]),
        ("dcache compare --out ", []),
    ],
)
def test_names_are_offered_where_they_are_taken(offered, line, expected):
    assert offered(line) == expected


def test_every_installed_name_is_offered(offered):
    assert set(offered("dcache generate --policy ")) == set(plugins().policies.entries)
    assert set(offered("dcache generate --unmask ")) == {*plugins().unmaskers.entries, "paired"}


@pytest.mark.parametrize(
    ("shell", "said"), [("zsh", '"elastic":"'), ("fish", "elastic\t"), ("powershell", "elastic:::")]
)
def test_other_shells_are_told_what_a_name_is(outline, monkeypatch, capsys, shell, said):
    monkeypatch.setenv(completion.ASKED, f"complete_{shell}")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "dcache verify elas")
    monkeypatch.setenv("_TYPER_COMPLETE_WORD_TO_COMPLETE", "elas")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    with pytest.raises(SystemExit):
        completion._reply(outline)
    out = capsys.readouterr().out
    assert said in out
    assert plugins().policies.entries["elastic"].thing.__doc__.split()[0] in out


def asked(tmp_path, *command, **environment):
    """Run a program of the name dcache; its stdout, and whether it loaded torch."""
    program = tmp_path / "bin" / "dcache"
    program.parent.mkdir(exist_ok=True)
    program.write_text(SCRIPT.format(python=sys.executable))
    program.chmod(0o755)
    given = {"PYTHONPATH": str(HOME), "PYTHONSAFEPATH": "1", "PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = subprocess.run(command or [program], env=os.environ | given | environment, capture_output=True, text=True)
    return done.stdout, done.stderr.splitlines()[-1]


def test_a_shell_that_asks_again_does_not_wait_for_torch(kept, tmp_path):
    line = {"COMP_WORDS": "dcache verify elas", "COMP_CWORD": "2", completion.ASKED: "complete_bash"}
    assert asked(tmp_path, **line) == ("elastic\n", "False")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_with_the_script_that_is_installed(kept, tmp_path):
    script, _ = asked(tmp_path, **{completion.ASKED: "source_bash"})
    line = "COMP_WORDS=(dcache compare --policies dkv,elas); COMP_CWORD=3; _dcache_completion dcache"
    out, torch = asked(tmp_path, "bash", "--norc", "-c", f'{script}\n{line}; echo "${{COMPREPLY[@]}}"')
    assert (out, torch) == ("dkv,elastic\n", "False")


def test_the_first_question_is_answered_and_its_outline_kept(outline, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DCACHE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("COMP_WORDS", "dcache verify elas")
    monkeypatch.setenv("COMP_CWORD", "2")
    monkeypatch.setenv(completion.ASKED, "complete_bash")
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().out == "elastic\n"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/dcache"])
    with pytest.raises(SystemExit):
        completion.answer()
    assert capsys.readouterr().out == "elastic\n"


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"stamp": "other"}', b"\xff"])
def test_without_a_valid_outline_there_is_no_early_answer(kept, monkeypatch, content):
    monkeypatch.setenv(completion.ASKED, "complete_bash")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/dcache"])
    kept.unlink() if content is None else kept.write_bytes(content)
    completion.answer()


def test_other_programs_that_import_dcache_answer_nothing(kept, monkeypatch):
    monkeypatch.setenv(completion.ASKED, "complete_bash")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/python"])
    completion.answer()


def test_an_outline_is_out_of_date_when_a_file_or_a_plugin_changes(monkeypatch):
    before = completion.stamp()
    assert completion.stamp() == before
    point = importlib.metadata.EntryPoint("mine", "mine", "dcache")
    monkeypatch.setattr(completion.metadata, "entry_points", lambda group: [point])
    with_plugin = completion.stamp()
    assert with_plugin != before
    monkeypatch.setattr(completion, "SUBPACKAGES", ())
    assert completion.stamp() != with_plugin


def test_a_cache_folder_that_cannot_be_written_costs_only_time(outline, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DCACHE_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setenv("COMP_WORDS", "dcache verify elas")
    monkeypatch.setenv("COMP_CWORD", "2")
    monkeypatch.setenv(completion.ASKED, "complete_bash")
    with pytest.raises(SystemExit):
        completion.learn(app)
    assert capsys.readouterr().out == "elastic\n"
