"""``lm_eval --model dcache`` and ``dcache eval``, on tasks that are files."""

import json
import os
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import dcache
from dcache.cli import main

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "golden" / "models" / "llada_mha"
POLICIES = {"elastic": "elastic(gamma=0.8;window=24)", "dkv": "dkv(interval=4)"}
# The harness's own command, once for each argument, without what takes longer than to decode: the index of its 14,000
# built-in tasks, and the description of the machine.
LM_EVAL = """
import shlex
import sys
import lm_eval.tasks
import torch.utils.collect_env
from lm_eval.api import registry

begin = lm_eval.tasks.TaskManager.__init__
lm_eval.tasks.TaskManager.__init__ = lambda self, *a, **k: begin(self, *a, **{**k, "include_defaults": False})
torch.utils.collect_env.get_pretty_env_info = str
if hasattr(registry, "load_plugins"):
    from lm_eval.__main__ import cli_evaluate as run
else:
    from dcache.evaluation.__main__ import main as run
for line in sys.argv[1:]:
    sys.argv = ["lm_eval", *shlex.split(line)]
    if code := run():
        sys.exit(code)
"""


@pytest.fixture(autouse=True)
def offline(tmp_path_factory, monkeypatch):
    """No network, and nothing in the user's cache."""
    import datasets.config

    home = tmp_path_factory.mktemp("huggingface")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home)
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", str)  # takes longer than to decode


def entry_points():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]


@pytest.fixture
def site(tmp_path):
    """The package on a path of its own, with its entry point, as an installer leaves it."""
    site = tmp_path / "site"
    info = site / f"dcache-{dcache.__version__}.dist-info"
    info.mkdir(parents=True)
    (site / "dcache").symlink_to(Path(dcache.__file__).parent)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dcache\nVersion: {dcache.__version__}\n")
    lines = [f"{name} = {target}" for name, target in entry_points().items()]
    (info / "entry_points.txt").write_text("\n".join(["[lm_eval.models]", *lines, ""]))
    return site


def lm_eval(site, *commands):
    env = {**os.environ, "PYTHONPATH": str(site), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    lines = [shlex.join(map(str, command)) for command in commands]
    return subprocess.run(
        [sys.executable, "-c", LM_EVAL, *lines], cwd=site.parent, env=env, capture_output=True, text=True
    )


def results_in(folder):
    (file,) = folder.rglob("results_*.json")
    return json.loads(file.read_text())


def texts_in(folder, task):
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    lines = sorted(map(json.loads, file.read_text().splitlines()), key=lambda line: line["doc_id"])
    return [line["resps"][0][0] for line in lines]


def test_the_harness_runs_two_policies_and_its_results_hold_policy_knobs_and_counters(site, tmp_path, local):
    done = lm_eval(
        site,
        *(
            [
                "run", "--model", "dcache", "--model_args", f"model=tiny-llada,policy={policy},device=cpu",
                "--tasks", local.gsm, "--apply_chat_template", "--output_path", tmp_path / name, "--log_samples",
            ]
            for name, policy in POLICIES.items()
        ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exact_match") == len(POLICIES)
    model = dcache.load_model("tiny-llada", device="cpu")
    knobs = {"elastic": {"gamma": 0.8, "window": 24}, "dkv": {"interval": 4}}
    for name, policy in POLICIES.items():
        written = policy.replace(";", ",")
        outputs = dcache.generate(model, [p.prompt for p in local.problems], written, gen_length=96)
        results = results_in(tmp_path / name)
        found = results["config"]["dcache"]
        assert texts_in(tmp_path / name, "gsm-local") == [output.text for output in outputs]
        assert (results["config"]["model"], found["policy"]) == ("dcache", written)
        assert found["knobs"].items() >= knobs[name].items()
        assert (found["unmask"], found["settings"]["block_length"]) == ("low-confidence", 32)
        counters = found["counters"]
        assert counters == {k: v for k, v in found["tasks"]["gsm-local"].items() if k != "settings"}
        assert counters["nfe"] == pytest.approx(sum(output.trace.nfe for output in outputs) / len(outputs), abs=1e-3)
        assert 0 < counters["row_share"] < 1
        assert counters["tok_s"] > 0
        correct = [f"#### {p.answer}" in output.text for p, output in zip(local.problems, outputs, strict=True)]
        assert results["results"]["gsm-local"]["exact_match,strict-match"] == pytest.approx(sum(correct) / len(outputs))


def test_the_entry_point_is_one_that_the_harness_can_load(site, monkeypatch):
    from lm_eval.api.registry import Registry

    from dcache.evaluation.harness import DCacheLM

    monkeypatch.syspath_prepend(site)
    (point,) = {p.value: p for p in metadata.entry_points(group="lm_eval.models", name="dcache")}.values()
    models = Registry("model")
    models.register(point.name, target=point)  # as versions that look for entry points do
    assert models.get("dcache") is DCacheLM


def test_the_harnesss_command_shows_our_errors_in_a_line(monkeypatch, capsys, local):
    from lm_eval.tasks import TaskManager

    from dcache.evaluation.__main__ import main

    begin = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", lambda *a, **k: begin(*a, **{**k, "include_defaults": False}))
    for given, said in [("policy=elatsic", "unknown policy 'elatsic'"), ("policy=dkv", "the model arguments name no")]:
        monkeypatch.setattr(
            "sys.argv", ["lm_eval", "run", "--model", "dcache", "--model_args", given, "--tasks", str(local.gsm)]
        )
        assert main() == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {said}")


# dcache eval


SMALL = ["--model", str(FOLDER), "--device", "cpu", "--gen-length", "8", "--block-length", "8", "--limit", "2"]


def said(capsys, *arguments):
    code = main(["eval", *map(str, arguments)])
    return code, *capsys.readouterr()


def refused(capsys, *arguments):
    code, out, err = said(capsys, *arguments)
    assert (code, out) == (2, "")
    return err.splitlines()[-1].removeprefix("error: ")


def test_eval_prints_scores_beside_what_decoding_cost_and_writes_a_file_for_each_policy(capsys, tmp_path, local):
    out = tmp_path / "runs"
    policies = "none,dkv(interval=1)"
    code, table, err = said(capsys, local.gsm, *SMALL, "--policies", policies, "--out", out, "--log-samples")
    assert code == 0, err
    first, second, task, titles, *rows = table.splitlines()
    assert first.startswith("llada_mha, float32, ")
    assert second == "low-confidence, batch 1, seed 0, gen 8, first 2 problems of each task"
    assert task == "gsm-local"
    assert titles.split() == (
        ["policy", "exact_match,strict-match", "tok/s", "NFE", "tokens/forward", "rows", "refreshes"]
    )
    assert [row.split()[:2] + row.split()[5:] for row in rows] == [
        ["none", "0.0000", "8.0", "1.00", "100", "%", "8.0"],
        ["dkv(interval=1)", "0.0000", "8.0", "1.00", "100", "%", "8.0"],
    ]
    assert err.splitlines()[0] == "none: policy 1 of 2"
    assert "it/s" not in err  # no bars where nobody looks
    files = [json.loads(file.read_text()) for file in out.rglob("results_*.json")]
    assert {file["config"]["dcache"]["policy"] for file in files} == set(policies.split(","))
    assert len([*out.rglob("samples_*.jsonl")]) == 2


def test_eval_scores_choices_by_likelihood_once_for_all_policies(capsys, local):
    code, out, err = said(
        capsys,
        local.choice,
        *SMALL,
        "--policies",
        "none,elastic",
        "--mc-num",
        "4",
        "--no-check-greedy",
        "--format",
        "json",
    )
    assert code == 0, err
    none, elastic = json.loads(out)
    assert (none["policy"], none["task"], none["metric"], none["nfe"]) == ("none", "choice-local", "acc", None)
    assert {**none, "policy": "elastic"} == elastic
    _, table, _ = said(capsys, local.choice, *SMALL, "--policies", "none", "--mc-num", "1", "--no-check-greedy")
    assert table.splitlines()[-1] == "Scored by likelihood, from whole passes: no policy changes these numbers."


def test_eval_says_that_unmaskers_differ(capsys, local):
    how = ["--policies", "none,elastic", "--unmask", "paired"]
    code, out, err = said(capsys, local.gsm, *SMALL, *how)
    assert code == 0, err
    assert out.splitlines()[1].startswith("paired unmaskers, batch 1")


def test_eval_shows_what_is_finished_when_it_is_interrupted(capsys, monkeypatch, local):
    from dcache.evaluation.run import Evaluator

    run = Evaluator.run

    def interrupted(self, policy):
        if policy.name == "dkv":
            raise KeyboardInterrupt
        return run(self, policy)

    monkeypatch.setattr(Evaluator, "run", interrupted)
    code, out, err = said(capsys, local.gsm, *SMALL, "--policies", "none,dkv")
    assert code == 130
    assert out.splitlines()[-1].split()[0] == "none"
    assert err.splitlines()[-1] == "interrupted. The table has what is finished."
    code, out, err = said(capsys, local.gsm, *SMALL, "--policies", "dkv")
    assert (code, out, err.splitlines()[-1]) == (130, "", "interrupted. Nothing was finished.")


def test_eval_sweeps_a_knob(capsys, local):
    code, out, err = said(
        capsys, local.gsm, *SMALL, "--policies", "dkv", "--sweep", "dkv.interval=1,4", "--format", "csv"
    )
    assert code == 0, err
    head, *lines = out.splitlines()
    assert head.startswith("policy,task,metric,value,stderr,texts,tokens,nfe,")
    assert [line.split(",")[0] for line in lines] == ["dkv(interval=1)", "dkv(interval=4)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "elatsic"], "unknown policy 'elatsic'. Did you mean 'elastic'?"),
        (["--policies", "none", "--gen-length", "0"], "the run: gen_length=0: "),
        (["--policies", "none", "--mc-num", "0"], "the evaluation: mc_num=0: "),
        (["--format", "xml"], "unknown format 'xml'; choose one of table, json, csv, markdown"),
        (["--log-samples"], "--log-samples writes files; say where with --out DIR"),
        (["--model", "tiny-lada"], "no model 'tiny-lada'"),
    ],
)
def test_eval_refuses_what_cannot_be(capsys, local, arguments, message):
    assert refused(capsys, local.gsm, *arguments).startswith(message)


def test_eval_refuses_a_task_file_that_is_none(capsys, tmp_path):
    assert refused(capsys, tmp_path / "lost.yaml", *SMALL).endswith(
        "No such file or directory: " + repr(str(tmp_path / "lost.yaml"))
    )
    (tmp_path / "list.yaml").write_text("- a\n")
    assert refused(capsys, tmp_path / "list.yaml", *SMALL).endswith("it has no line 'task: NAME'")


def test_eval_says_what_is_wrong_with_the_data_of_a_task(capsys, tmp_path, local):
    broken = tmp_path / "broken.yaml"
    broken.write_text(local.gsm.read_text().replace("gsm.jsonl", "lost.jsonl").replace("gsm-local", "broken"))
    assert refused(capsys, broken, *SMALL, "--policies", "none").startswith("the data of broken cannot be read: ")


def test_eval_refuses_a_folder_that_cannot_be_written_before_it_decodes(capsys, tmp_path, local):
    (tmp_path / "file").write_text("")
    message = refused(capsys, local.gsm, *SMALL, "--out", tmp_path / "file")
    assert message == f"results cannot be written to {tmp_path / 'file'}: File exists"
