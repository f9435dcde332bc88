"""Comparisons in files: what may stand there, what wins, what a mistake says; a saved one does the same again."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import dcache
from dcache import CompareConfig, Comparison, UsageError, yaml_files
from dcache.calls import Call, policy_calls
from dcache.cli import main
from dcache.compare_config import FILE, HEADER, _Content

FOLDER = Path(__file__).resolve().parent / "golden" / "models" / "llada_mha"
RUN = f"model: {FOLDER}\ndevice: cpu\nlimit: 1\ngen_length: 8\n"


@pytest.fixture
def written(tmp_path):
    """Writes a file; returns it."""

    def write(text, name="sweep.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def policies(config):
    return [str(call) for call in config.policies]


def conditions(out):
    """Without the time, which is never the same."""
    return Comparison.load(out).conditions.model_copy(update={"started": ""})


def refused(written, text):
    """What is said about a file, from its line on."""
    file = written(text)
    with pytest.raises(UsageError) as caught:
        CompareConfig.read(file)
    said = str(caught.value)
    assert said.startswith(str(file))
    return said.removeprefix(str(file)).removeprefix(", ")


# What may stand in a file


def test_lists_of_knobs_give_all_combinations_in_order(written):
    config = CompareConfig.read(
        written("policies:\n- dkv(interval=4)\n- elastic: {gamma: [0.8, 0.9], window: [8, none]}")
    )
    assert policies(config) == [
        "dkv(interval=4)",
        "elastic(gamma=0.8,window=8)", "elastic(gamma=0.8,window=none)",
        "elastic(gamma=0.9,window=8)", "elastic(gamma=0.9,window=none)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("policies: elastic(gamma=0.9,window=8),dkv", ["elastic(gamma=0.9,window=8)", "dkv"]),
        ("policies: ['elastic(gamma=0.9,window=8)', dkv]", ["elastic(gamma=0.9,window=8)", "dkv"]),
        ("policies: none", ["none"]),
        ("policies:\n- dkv:\n- none", ["dkv", "none"]),
        ("policies: [{dkv: {variant: pd}}]", ["dkv(variant=pd)"]),
        ("policies: [{suffix: {inner: 'elastic( gamma = 0.9 )'}}]", ["suffix(inner=elastic(gamma=0.9))"]),
        ("limit: 3", ["elastic", "dkv"]),
        ("", ["elastic", "dkv"]),
        ('{"policies": ["dkv"], "limit": 3}', ["dkv"]),
    ],
)
def test_policies_may_be_a_text_or_a_list_of_texts_and_mappings(written, text, expected):
    assert policies(CompareConfig.read(written(text))) == expected


def test_every_setting_may_stand_there_with_the_values_of_the_command_line(written):
    text = (
        "eos_last: on\nafter_end: fill\ntemperature: 1e-3\nblock_length: none\nlimit: null\nforbid_eos: true\ntop_k: 5"
    )
    experiment = CompareConfig.read(written(text)).experiment()
    run = experiment.settings
    assert (run.eos_last, run.after_end, run.temperature, run.block_length) == ("on", "fill", 0.001, None)
    assert (experiment.run.limit, run.forbid_eos, run.top_k) == (None, True, 5)
    fields = set(dcache.config.DecodeSettings.model_fields) | set(dcache.config.CompareSettings.model_fields)
    assert fields < set(_Content.model_fields)


def test_paths_are_relative_to_the_file(written, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    (tmp_path / "mine.jsonl").write_text('{"prompt": "Ann"}\n')
    (tmp_path / "weights").mkdir()
    config = CompareConfig.read(written("model: weights\nprompts: mine.jsonl\nout: runs/a"))
    assert (config.model, config.prompts, config.out) == (
        str(tmp_path / "weights"), tmp_path / "mine.jsonl", tmp_path / "runs" / "a",
    )  # fmt: skip
    assert [problem.prompt for problem in config.experiment().problems] == ["Ann"]
    assert CompareConfig.read(written("model: tiny-llada\nout: /runs")).model == "tiny-llada"


# Mistakes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("limit: 3\nlimitt: 4", "line 2: there is no field 'limitt'. Did you mean 'limit'?  Fields: "),
        ("limit: 3\n\nrepeats: 0", "line 3: repeats is 0: input should be greater than or equal to 1"),
        ("gen_length: few", "line 1: gen_length is 'few': input should be a valid integer"),
        ("temperature: [1]", "line 1: temperature is [1]: input should be a valid number"),
        ("unmask: best", "line 1: unknown unmasker 'best'."),
        ("task: gsm-mni", "line 1: unknown task 'gsm-mni'. Did you mean 'gsm-mini'?"),
        ("policies: []", "line 1: policies is []: list should have at least 1 item"),
        ("policies: 5", "line 1: policies is 5: input should be a valid list"),
        ("policies:\n- dkv\n- elatsic", "line 3: unknown policy 'elatsic'. Did you mean 'elastic'?"),
        ("policies:\n- elastic:\n    gama: [1]", "line 2: policy 'elastic' has no knob 'gama'. Did you mean 'gamma'?"),
        ("policies:\n- dkv: {interval: [1, 0]}", "line 2: policy 'dkv': interval=0: input should be greater"),
        ("policies:\n- dkv: {interval: {a: 1}}", "line 2: dkv: interval is {'a': 1}; give a number"),
        ("policies: [elastic(gamma=0.9,window=8)]", "line 1: 'elastic(gamma=0.9': the '(' is not closed; write name("),
        ("policies:\n- {a: {}, b: {}}", "line 2: a policy is {'a': {}, 'b': {}}; write name"),
        ("policies: [[dkv]]", "line 1: a policy is ['dkv']; write name"),
        ("policies: [{dkv: 4}]", "line 1: a policy is {'dkv': 4}; write name"),
        ("prompts: a.jsonl\ntask: gsm-mini", "line 2: prompts replace the task; leave task out"),
        ("prompts: a.jsonl\nsplit: test", "line 2: prompts replace the task; leave split out"),
        ("- dkv", ": expected lines such as 'limit: 24', found list"),
        ("limit", ": expected lines such as 'limit: 24', found str"),
        ("limit: 1\n5: 2", "line 2: there is no field '5'.  Fields: "),
        ("limit: 1\nlimit: 2", "line 2: 'limit' is given twice, first in line 1"),
        ("policies:\n- dkv: {interval: 1, interval: 2}", "line 2: 'interval' is given twice"),
        ("limit: [1", "line 1, column 10: not valid YAML: "),
        ("limit: !!python/object/apply:os.abort []", "line 1, column 8: not valid YAML: could not determine a constr"),
        ("a: &a [1]\nb: *a", "line 2: anchors and aliases are not read; write it out"),
        ("limit: 1\n---\nlimit: 2", "line 2, column 1: not valid YAML: "),
        ("[" * 100, ""),
        ("a: " + "[" * 20 + "]" * 20, "line 1 is nested too deeply"),
        ("[" * 2000, " is nested too deeply"),
        (f"limit: {'9' * 5000}", ": Exceeds the limit"),
        ("out: a\0b", ": not valid YAML: special characters are not allowed"),
        ("dkv: {}", "line 1: there is no field 'dkv'."),
    ],
)
def test_a_mistake_names_the_file_the_line_and_the_field(written, text, said):
    assert refused(written, text).startswith(said)


def test_too_many_combinations_are_refused_before_they_are_made(written):
    values = list(range(1, 200))
    text = f"policies:\n- elastic: {{window: {values}, gamma: {values}, track: {values}}}"
    assert "elastic would run with 7880599 combinations of its knobs; give at most 1000" in refused(written, text)


def test_several_mistakes_are_all_told(written):
    said = refused(written, "limit: 0\nrepeats: 0")
    assert "line 1: limit is 0" in said
    assert "line 2: repeats is 0" in said


@pytest.mark.parametrize(("data", "said"), [(b"\xff\xfe", "is not UTF-8 text"), (b"#" * 2_000_000, "at most 1000000")])
def test_what_is_no_text_to_read_is_refused(tmp_path, data, said):
    (tmp_path / "a.yaml").write_bytes(data)
    with pytest.raises(UsageError, match=said):
        CompareConfig.read(tmp_path / "a.yaml")


def test_a_file_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"a\.yaml cannot be read: No such file"):
        CompareConfig.read(tmp_path / "a.yaml")
    with pytest.raises(UsageError, match=r"compare\.yaml cannot be read: No such file"):
        CompareConfig.read(tmp_path)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(value=st.dictionaries(st.text(min_size=1), SCALARS | st.lists(SCALARS)))
def test_what_is_written_is_read_as_it_was(tmp_path_factory, value):
    file = tmp_path_factory.getbasetemp() / "some.yaml"
    file.write_text(yaml_files.write(value), encoding="utf-8")
    assert yaml_files.read(file)[0] == value
    assert yaml.safe_load(file.read_text(encoding="utf-8")) == value  # version 1.1


# The command line


def test_the_command_line_overrides_the_file(written, capsys):
    file = str(written(RUN + "policies: [dkv]\nseed: 3\nrepeats: 2"))
    flags = ["--policies", "elastic", "--set", "elastic.window=8", "--seed", "4", "--format", "json"]
    assert main(["compare", "--config", file, *flags]) == 0
    found = json.loads(capsys.readouterr().out)["conditions"]
    assert [entrant["policy"] for entrant in found["policies"]] == ["none", "elastic(window=8)"]
    assert (found["seed"], found["repeats"], found["limit"], found["model"]) == (4, 2, 1, "llada_mha")


def test_set_and_sweep_change_the_policies_of_the_file(written, capsys):
    file = str(written(RUN + "policies: [dkv, none]"))
    assert main(["compare", "--config", file, "--sweep", "dkv.interval=2,4", "--format", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split(",")[0] for line in lines] == ["none", "dkv(interval=2)", "dkv(interval=4)"]


def test_a_generation_that_the_command_line_makes_longer_has_the_usual_blocks(written):
    config = CompareConfig.read(written("gen_length: 16"), gen_length=64)
    assert config.experiment().settings.block_length == 32


def test_prompts_and_a_task_replace_each_other(written, tmp_path):
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text('{"prompt": "Ann"}\n')
    from_task = CompareConfig.read(written("task: gsm-mini\nsplit: train"))
    assert [p.prompt for p in from_task.but(prompts=prompts).experiment().problems] == ["Ann"]
    from_prompts = CompareConfig.read(written(f"prompts: {prompts}"))
    assert from_prompts.but(task="gsm-mini").experiment().task_name == "gsm-mini"


def test_a_mistake_in_the_file_is_one_line_and_exit_code_2(written, capsys):
    file = written("limit: 0")
    assert main(["compare", "--config", str(file)]) == 2
    assert capsys.readouterr().err == f"error: {file}, line 1: limit is 0: input should be greater than or equal to 1\n"


# What is left beside results


def test_a_saved_file_does_the_same_again_in_the_same_folder_and_in_another(written, tmp_path, capsys, monkeypatch):
    flags = ["--model", str(FOLDER), "--device", "cpu", "--gen-length", "8", "--limit", "1", "--repeats", "2"]
    flags += ["--unmask", "threshold(threshold=0.5)", "--eos-last", "on", "--temperature", "0.5", "--block-length", "4"]
    first, second = tmp_path / "a", tmp_path / "b"
    assert main(["compare", *flags, "--policies", "elastic(gamma=0.8),dkv", "--out", str(first)]) == 0
    table = capsys.readouterr().out
    monkeypatch.chdir("/")
    assert main(["compare", "--config", str(first)]) == 0  # everything is there already
    assert capsys.readouterr().out == table
    assert len(Comparison.load(first).results) == 6
    assert main(["compare", "--config", str(first / FILE), "--out", str(second)]) == 0
    assert conditions(second) == conditions(first)
    assert (second / FILE).read_bytes() == (first / FILE).read_bytes()
    results = [[(r.key, r.canvas, r.nfe) for r in Comparison.load(out).results] for out in (first, second)]
    assert results[0] == results[1]


def test_the_library_reads_runs_and_saves_the_same(written, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "Ann"}\n{"prompt": "Ben"}\n')
    text = f"model: {FOLDER}\ndevice: cpu\ngen_length: 8\nprompts: mine.jsonl\nout: a\n"
    text += "policies: [{dkv: {interval: [2, 4]}}]"
    result = CompareConfig.read(written(text)).compare()
    assert [entrant.policy for entrant in result.conditions.policies] == ["none", "dkv(interval=2)", "dkv(interval=4)"]
    again = CompareConfig.read(tmp_path / "a", out=tmp_path / "b").compare()
    assert conditions(tmp_path / "b") == conditions(tmp_path / "a")
    assert again.conditions.task == "prompts mine.jsonl"


def test_more_problems_are_written_into_the_saved_file(written, tmp_path):
    config = CompareConfig.read(written(RUN + "policies: [none]\nout: a"))
    config.compare()
    config.but(limit=2).compare()
    again = CompareConfig.read(tmp_path / "a")
    assert again.settings["limit"] == 2
    assert len(again.compare().results) == 2


def test_a_file_of_somebody_else_is_left_alone(written, tmp_path):
    text = RUN + "policies: [none]\nout: .\n"
    CompareConfig.read(written(text, FILE)).compare()
    assert (tmp_path / FILE).read_text() == text
    assert len(Comparison.load(tmp_path).results) == 1


def test_a_file_that_cannot_be_saved_ends_the_run_and_lets_go_of_the_folder(written, tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = CompareConfig.read(written(RUN + "policies: [none]\nout: a"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fails)
        with pytest.raises(UsageError, match=r"compare\.yaml cannot be written: No space left on device"):
            config.compare()
    assert len(config.compare().results) == 1


def test_a_run_in_memory_leaves_no_file(written, tmp_path):
    CompareConfig.read(written(RUN + "policies: [none]")).compare()
    assert os.listdir(tmp_path) == ["sweep.yaml"]


@pytest.mark.parametrize(
    "call", [Call("dkv"), Call("elastic", {"gamma": 0.5, "window": None}), Call("a", {"b": "c d"})]
)
def test_a_call_is_saved_so_that_it_is_read_again(call):
    from dcache.compare_config import _calls, _written

    assert list(_calls(_written(call))) == [call]


def test_the_saved_file_says_what_it_is_for(written, tmp_path):
    CompareConfig.read(written(RUN + "policies: [dkv]\nout: a")).compare()
    text = (tmp_path / "a" / FILE).read_text()
    assert text.startswith(HEADER)
    assert (
        f"model: {FOLDER}\ndevice: cpu\ndtype: float32\npolicies:\n- dkv\ntask: gsm-mini\nsplit: test\nlimit: 1\n"
        in text
    )
    assert text.endswith("out: .\n")


def test_the_page_shows_a_file_that_can_be_read_and_the_error_that_it_gives(written):
    page = (Path(__file__).resolve().parents[1] / "docs" / "how-to" / "comparisons-in-files.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    config = CompareConfig.read(written(text))
    assert len(config.experiment().policies) == 1 + 8
    (assignment,) = re.findall(r"--config sweep.yaml --limit none --set (\S+)", page)
    changed = config.but(policies=tuple(policy_calls(config.policies, [assignment])))
    assert "fast-dllm(mode=prefix)" in changed.experiment().policies
    (shown,) = re.findall(r"error: sweep.yaml, (line \d+: .*), \.\.\.\n", page)
    assert refused(written, text.replace("gamma:", "gama:")).startswith(shown)
