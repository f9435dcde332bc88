"""The command line: what it prints where, and how it fails."""

import importlib
import io
import json
import re
import shutil
import sys
from itertools import count
from pathlib import Path

import pytest
import torch

import dcache
from dcache import PluginError, PolicyError
from dcache.cli import main
from dcache.results import FILE, read_results

FOLDER = Path(__file__).resolve().parent / "golden" / "models" / "llada_mha"
SMALL = ["--model", str(FOLDER), "--device", "cpu", "--gen-length", "8", "--block-length", "8"]
HUGE = "99999999999999999999"
COMPARE = ["compare", *SMALL, "--limit", "2", "--policies"]


@pytest.fixture
def clock(monkeypatch):
    """Every text takes half a second, every step two milliseconds, on a CPU that is always the same."""
    texts, steps = count(step=0.5), count(step=0.002)
    module = importlib.import_module("dcache.compare")
    monkeypatch.setattr(module, "perf_counter", lambda: next(texts))
    monkeypatch.setattr(importlib.import_module("dcache.decode"), "perf_counter", lambda: next(steps))
    monkeypatch.setattr(module, "device_name", lambda device: "Example CPU")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    return module


def said(capsys, *arguments):
    """Exit code, stdout, stderr."""
    code = main(arguments)
    return code, *capsys.readouterr()


def refused(capsys, *arguments, code=2):
    """The one line of an error."""
    found, out, err = said(capsys, *arguments)
    assert (found, out) == (code, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# compare

TABLE = f"""\
llada_mha (181k), float32, CPU Example CPU, 2 threads, torch 2.13.0, dcache {dcache.__version__};
gsm-mini test, 2 problems, gen 8, block 8, low-confidence, seed 0
policy           accuracy  agreement  tok/s  speedup  NFE  tokens/   rows  refreshes      step ms  cache
                     of 2                                  forward                      p50 / p95    MiB
none                  0 %      1.000   16.0     1.00    8     1.00  100 %          8  2.00 / 2.00   0.27
dkv(interval=1)       0 %      1.000   16.0     1.00    8     1.00  100 %          8  2.00 / 2.00   0.27

No policy was faster than none; dkv(interval=1) came closest, at 1.00 times its tok/s; accuracy 0 %
(none: 0 %), agreement 1.000.
"""

NOTES = """\
comparing none, dkv(interval=1) on 2 problems
warning: none itself answers only 0 % of the problems, so accuracy cannot show what a policy loses. Judge by \
agreement, or take a model that can do the task.
warning: dkv(interval=1) refreshed at every step, so it saved nothing. Try other knobs with --set dkv.KNOB=VALUE; it \
ran with variant=decode, interval=1, neighbours=0, cacheable=un.
warning: with 2 problems an accuracy is uncertain by up to 71 points. Raise --limit to 100 or more before quoting it.
warning: times on a CPU say little about a GPU, where few rows cost as much as one. Rows and NFE carry over, tok/s \
does not: measure with --device cuda.
"""


def test_compare_prints_exactly_this(capsys, clock):
    assert said(capsys, *COMPARE, "dkv(interval=1)") == (0, TABLE, NOTES)


def test_the_table_of_the_library_is_that_of_the_command_line(clock):
    model = dcache.load_model(FOLDER, device="cpu")
    comparison = dcache.compare(model, ["dkv(interval=1)"], limit=2, gen_length=8, block_length=8)
    assert comparison.table() == TABLE


def test_set_and_sweep_make_the_policies(capsys, tmp_path):
    assert main([*COMPARE, "dkv", "--set", "dkv.interval=4", "--limit", "1", "--format", "csv"]) == 0
    assert [row.split(",")[0] for row in capsys.readouterr().out.splitlines()[1:]] == ["none", "dkv(interval=4)"]
    assert main([*COMPARE, "none", "--sweep", "dkv.interval=2,3", "--limit", "1", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in found["policies"]] == ["none", "dkv(interval=2)", "dkv(interval=3)"]


def test_every_setting_reaches_the_run(capsys):
    flags = [
        *("--temperature", "0.5", "--seed", "3", "--batch-size", "2", "--unmask", "threshold(threshold=0.5)"),
        *("--forbid-eos", "--eos-last", "on", "--after-end", "drop", "--block-length", "none", "--repeats", "2"),
        *("--confidence", "filtered", "--top-p", "0.9", "--top-k", "40", "--no-graphs"),
        *("--split", "train", "--dtype", "float64", "--device", "cpu", "--task", "gsm-mini"),
    ]
    assert main([*COMPARE, "dkv", *flags, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["conditions"]
    assert found["settings"] == {
        "gen_length": 8, "block_length": None, "unmask": "threshold(threshold=0.5)", "batch_size": 2,
        "temperature": 0.5, "confidence": "filtered", "top_p": 0.9, "top_k": 40, "guidance": 0.0,
        "forbid_eos": True, "eos_last": "on", "after_end": "drop", "fill_every": 1, "no_graphs": True,
    }  # fmt: skip
    assert {k: found[k] for k in ("seed", "repeats", "split", "dtype", "device", "limit", "n_problems")} == {
        "seed": 3, "repeats": 2, "split": "train", "dtype": "float64", "device": "cpu", "limit": 2, "n_problems": 2,
    }  # fmt: skip


def test_prompts_of_a_file_are_decoded_and_those_with_an_answer_scored(capsys, tmp_path, clock):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "2 + 3 = ?", "answer": 5}\n{"prompt": "Hello"}\n')
    code, out, _ = said(capsys, "compare", *SMALL, "--policies", "dkv", "--prompts", str(file))
    assert code == 0
    assert out.splitlines()[1] == "prompts mine.jsonl, 2 problems, gen 8, block 8, low-confidence, seed 0"
    assert out.splitlines()[3].split() == ["of", "1", "forward", "p50", "/", "p95", "MiB"]


def test_ctrl_c_prints_the_table_so_far_and_how_to_continue(capsys, tmp_path, clock, monkeypatch):
    readings = iter([*range(10), KeyboardInterrupt, *range(10)])

    def interrupting():
        reading = next(readings)
        if reading is KeyboardInterrupt:  # the sixth text begins, and is lost
            raise reading
        return float(reading)

    monkeypatch.setattr(clock, "perf_counter", interrupting)
    arguments = ["compare", *SMALL, "--policies", "dkv", "--limit", "3", "--out", str(tmp_path)]
    code, out, err = said(capsys, *arguments)
    assert code == 130
    assert [line.split()[:3] for line in out.splitlines()[4:6]] == [["none", "0", "%"], ["dkv", "0", "%"]]
    assert "warning: only 2 of 3 texts per policy are finished" in err
    assert err.endswith(f"interrupted. To continue, repeat the command with --out {tmp_path}\n")
    code, out, err = said(capsys, *arguments)
    assert code == 0
    assert err.startswith("comparing none, dkv on 3 problems; 5 of 6 texts are there already\n")
    assert len((tmp_path / FILE).read_text().splitlines()) == 2 + 6


def test_ctrl_c_without_out_says_that_nothing_was_kept(capsys, clock, monkeypatch):
    def interrupting():
        raise KeyboardInterrupt

    monkeypatch.setattr(clock, "perf_counter", interrupting)
    code, out, err = said(capsys, *COMPARE, "dkv")
    assert code == 130
    assert out.endswith("No problem was finished by all policies yet.\n")
    assert err.splitlines()[-1] == "interrupted. Nothing was kept; give --out to be able to continue."


def test_a_terminal_gets_a_progress_bar_on_stderr_alone(capsys, clock, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    code, out, err = said(capsys, *COMPARE, "dkv(interval=1)")
    assert (code, out) == (0, TABLE)
    assert "4 of 4 texts" in err
    assert "comparing none, dkv" not in err


# generate


def test_generate_prints_the_text_to_stdout_and_the_rest_to_stderr(capsys):
    output = dcache.generate(dcache.load_model(FOLDER, device="cpu"), "Ann has 3", "dkv", gen_length=8, block_length=8)
    code, out, err = said(capsys, "generate", "Ann has 3", "--policy", "dkv", *SMALL)
    assert (code, out) == (0, f"{output.text}\n")
    assert re.fullmatch(r"8 tokens, 8 forward calls, \d+ % of the rows, 2 refreshes, \d+\.\d\d s, \d+\.\d tok/s\n", err)


def test_generate_reads_stdin(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Ann has 3"))
    _, piped, _ = said(capsys, "generate", "-", *SMALL)
    _, typed, _ = said(capsys, "generate", "Ann has 3", *SMALL)
    assert piped == typed


def test_trace_prints_one_line_per_step(capsys):
    _, _, err = said(capsys, "generate", "Ann has 3", "--policy", "dkv", "--trace", *SMALL)
    lines = err.splitlines()
    assert len(lines) == 8 + 1
    assert re.fullmatch(r"step    0  rows +\d+  commits at \d+  refresh", lines[0])
    assert "refresh" not in lines[3]


def test_generate_writes_json_lines_for_a_file_of_prompts(capsys, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "Ann"}\n{"prompt": "Ben", "id": "b"}\n')
    code, out, _ = said(capsys, "generate", "--prompts", str(file), "--batch-size", "2", *SMALL)
    assert code == 0
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["line-1", "b"]


def test_what_a_model_writes_cannot_command_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr("dcache.models.loading.Model.text", lambda self, ids: "[bold]a\x1b[2Jb\r")
    _, out, _ = said(capsys, "generate", "Ann", *SMALL)
    assert out == "[bold]a\\x1b[2Jb\\x0d\n"


# policies, version, help


def test_policies_lists_each_with_its_paper_and_knobs(capsys):
    code, out, _ = said(capsys, "policies")
    assert code == 0
    assert (
        "dkv: Delayed caching of decoded tokens.\n"
        "    paper: dKV-Cache: The Cache for Diffusion Language Models, arXiv 2505.15781\n"
        "    pairs with: low-confidence\n"
        "    equals no cache with: variant=decode,interval=1\n"
        "    variant = decode  (decode, greedy, prefill, pd)\n"
        "        decode reuses decoded rows; greedy all but those decoded now and by the last step; prefill\n"
        "        the prompt, for ever; pd the prompt for ever and decoded rows between refreshes\n"
        "    interval = 8  (integer ≥ 1)\n"
    ) in out
    assert max(map(len, out.splitlines())) <= 100


def test_policies_and_unmaskers_come_as_json(capsys):
    for flags, name in ((["--json"], "elastic"), (["--json", "--unmaskers"], "threshold")):
        code, out, _ = said(capsys, "policies", *flags)
        found = {entry["name"]: entry for entry in json.loads(out)}
        assert code == 0
        assert found[name]["source"] == "dcache"
        assert all(knob["description"] for knob in found[name]["knobs"])


def test_version_is_that_of_the_package(capsys):
    assert said(capsys, "--version") == (0, f"dcache {dcache.__version__}\n", "")


def test_no_command_prints_the_help(capsys):
    code, out, err = said(capsys)
    assert (code, err) == (0, "")
    assert out == said(capsys, "--help")[1]


@pytest.mark.parametrize("command", ["compare", "generate"])
def test_the_help_holds_the_descriptions_and_defaults_of_the_settings(capsys, command):
    text = " ".join(said(capsys, command, "--help")[1].split())
    fields = dict(dcache.config.DecodeSettings.model_fields)
    fields |= dcache.config.CompareSettings.model_fields if command == "compare" else {}
    for name, field in fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description.replace("-", "") in text.replace("- ", "").replace("-", "")
        if field.default not in (None, False):
            assert f"[default: {field.default}]" in text.replace("- ", "-")


# Failing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "elatsic"], "unknown policy 'elatsic'. Did you mean 'elastic'?"),
        (["--policies", "elastic(gama=1)"], "policy 'elastic' has no knob 'gama'. Did you mean 'gamma'?"),
        (["--policies", "dkv(interval=0)"], "policy 'dkv': interval=0: input should be greater than or equal to 1"),
        (["--policies", "elastic(gamma=1"], "'elastic(gamma=1': a '(' is not closed; write name(knob=value,...)"),
        (["--policies", "dkv,dkv"], "policy 'dkv' is listed twice"),
        (["--policies", ""], "'' does not begin with a name"),
        (["--unmask", "best"], "unknown unmasker 'best'."),
        (["--task", "gsm-mni"], "unknown task 'gsm-mni'. Did you mean 'gsm-mini'?"),
        (["--split", "dev"], "task 'gsm-mini' has no split 'dev'"),
        (["--limit", "0"], "the comparison: limit=0: input should be greater than or equal to 1"),
        (["--limit", "few"], "the comparison: limit='few': input should be a valid integer"),
        (["--set", "elastic.gama=1"], "policy 'elastic' has no knob 'gama'."),
        (["--set", "gamma=1"], "--set gamma=1: write --set policy.knob=value"),
        (["--sweep", "dkv.interval="], "--sweep dkv.interval=: write --sweep policy.knob=v1,v2,..."),
        (["--sweep", "dkv.interval=1,0"], "policy 'dkv': interval=0: "),
        (["--format", "html"], "unknown format 'html'; choose one of table, json, csv, markdown"),
        (["--prompts", "no-such-file.jsonl"], "no-such-file.jsonl: no such file"),
        (["--model", "no-such-folder"], "no model 'no-such-folder': there is no such folder."),
        (["--gen-length", "12", "--block-length", "8"], "gen_length 12 is not divisible by block_length 8"),
        (["--gen-length", "256", "--block-length", "none"], "problem 'gsm-mini/test/0/0' has a prompt of"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--temperature", "warm"], "the run: temperature='warm': input should be a valid number"),
        (["--top-p", "0"], "the run: top_p=0: input should be greater than 0"),
        (["--top-k", "2.5"], "the run: top_k=2.5: input should be a valid integer"),
        (["--repeats", "x"], "the comparison: repeats='x': input should be a valid integer"),
        (["--gen-length", HUGE], f"the run: gen_length={HUGE}: input should be less than or equal to 2147483647"),
        (["--block-length", HUGE], f"the run: block_length={HUGE}: input should be less than or equal to"),
        (["--batch-size", HUGE], f"the run: batch_size={HUGE}: input should be less than or equal to"),
        (["--limit", HUGE], f"the comparison: limit={HUGE}: input should be less than or equal to"),
        (["--repeats", HUGE], f"the comparison: repeats={HUGE}: input should be less than or equal to"),
        (["--gen-length", "4096"], "gen_length 4096 alone exceeds the 256 positions that the model was built for"),
        (["--device", "meta"], "weights on the device 'meta' have shapes only"),
        (["--family", "lada"], "unknown model family 'lada'. Did you mean 'llada'?"),
        (["--no-such-option"], "No such option: --no-such-option"),
    ],
)
def test_a_mistake_in_compare_exits_2_with_one_line(capsys, arguments, message):
    assert refused(capsys, "compare", *SMALL, *arguments).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no prompts; write one JSON object per line"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2, column 12: not valid JSON"),
        ('{"prompt": ""}\n', "line 1: 'prompt' is empty"),
        (r'{"prompt": "\ud800"}', "line 1: 'prompt' holds a lone surrogate"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "generate"])
def test_a_bad_prompts_file_exits_2_naming_the_line(capsys, tmp_path, command, content, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    assert message in refused(capsys, command, "--prompts", str(file), *SMALL)


@pytest.mark.parametrize("extra", [["--task", "gsm-mini"], ["--split", "test"]])
def test_prompts_and_a_task_exclude_each_other(capsys, tmp_path, extra):
    assert refused(capsys, "compare", "--prompts", "x", *extra) == f"--prompts replaces the task; leave {extra[0]} out"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a prompt or --prompts FILE, and not both"),
        (["a", "--prompts", "b"], "give a prompt or --prompts FILE, and not both"),
        ([" "], "the prompt is empty"),
        (["a", "--policy", "elatsic"], "unknown policy 'elatsic'."),
        (["a", "--gen-length", "0"], "the run: gen_length=0: input should be greater than or equal to 1"),
        (["a" * 300], "prompt 0 has 3"),
        (["a\udcffb"], "the text holds a lone surrogate, '\\udcff', at character 2"),
        (["a", "--gen-length", HUGE], f"the run: gen_length={HUGE}: input should be less than or equal to"),
        (["a", "--gen-length", "2147483647", "--block-length", "none"], "gen_length 2147483647 alone exceeds the"),
        (["a", "--device", "meta"], "weights on the device 'meta' have shapes only"),
        (["a", "--family", "lada"], "unknown model family 'lada'."),
    ],
)
def test_a_mistake_in_generate_exits_2_with_one_line(capsys, arguments, message):
    assert refused(capsys, "generate", *SMALL, *arguments).startswith(message)


def test_results_of_other_conditions_exit_2(capsys, tmp_path):
    assert main([*COMPARE, "dkv", "--limit", "1", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    message = refused(capsys, *COMPARE, "dkv", "--limit", "1", "--out", str(tmp_path), "--seed", "1")
    assert message.startswith(f"{tmp_path}/results.jsonl holds results of other conditions: seed was 0 and is 1 now")


@pytest.mark.parametrize("command", [["compare", "--limit", "1", "--policies", "none"], ["generate", "a"]])
def test_a_family_is_used_whatever_the_config_declares(capsys, tmp_path, command):
    folder = shutil.copytree(FOLDER, tmp_path / "renamed")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "qwen2"}
    (folder / "config.json").write_text(json.dumps(config))
    arguments = [*command, "--model", str(folder), "--device", "cpu", "--gen-length", "8"]
    assert "--family llada" in refused(capsys, *arguments)
    assert said(capsys, *arguments, "--family", "llada")[0] == 0


def test_a_comparison_that_fails_before_its_first_result_leaves_the_folder_free(capsys, tmp_path):
    wrong = [*COMPARE, "dkv", "--block-length", "4", "--unmask", "low-confidence(steps=7)", "--out", str(tmp_path)]
    assert said(capsys, *wrong)[0] == 2
    right = [*COMPARE, "dkv", "--out", str(tmp_path)]
    assert said(capsys, *right)[0] == 0
    assert len(read_results(tmp_path / FILE)[0]) == 1


def test_a_command_that_does_not_exist_exits_2(capsys):
    assert refused(capsys, "compere").startswith("No such command 'compere'.")


@pytest.mark.parametrize("error", [PluginError, PolicyError, dcache.UnmaskerError, dcache.NumericsError])
def test_a_defect_exits_1_with_one_line(capsys, monkeypatch, error):
    def broken(*arguments):
        raise error("policy 'x', step 3: broken\n  in two lines")

    monkeypatch.setattr(importlib.import_module("dcache.generate"), "decode", broken)
    assert refused(capsys, "generate", "a", *SMALL, code=1) == "policy 'x', step 3: broken   in two lines"


def test_an_error_cannot_command_the_terminal(capsys):
    assert "\x1b" not in refused(capsys, "compare", *SMALL, "--prompts", "\x1b[2J")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(importlib.import_module("dcache.generate"), "decode", broken)
    with pytest.raises(ZeroDivisionError):
        main(["generate", "a", *SMALL])
