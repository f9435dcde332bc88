"""A task of lm-evaluation-harness that needs no network: problems of gsm-mini, in files."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from dcache.tasks.base import Problem
from dcache.tasks.gsm_mini import GsmMini

GSM = """\
task: gsm-local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["Question:"], max_gen_toks: 96, do_sample: false}}
filter_list:
  - name: strict-match
    filter:
      - function: regex
        regex_pattern: "#### (-?[0-9]+)"
      - function: take_first
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
CHOICE = """\
task: choice-local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["#### {{{{answer}}}}", "#### 1"]
doc_to_target: 0
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


@dataclass(frozen=True)
class Local:
    """Tasks as files.

    Attributes:
        gsm: a task of generation.
        choice: the same questions, with two answers to choose from.
        problems: what stands in both.
    """

    gsm: Path
    choice: Path
    problems: list[Problem]


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Local:
    """Two problems of gsm-mini."""
    folder = tmp_path_factory.mktemp("tasks")
    problems = GsmMini().problems("test", 2, 0)
    data = folder / "gsm.jsonl"
    data.write_text("".join(json.dumps({"question": p.prompt, "answer": p.answer}) + "\n" for p in problems))
    for name, text in (("gsm", GSM), ("choice", CHOICE)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return Local(folder / "gsm.yaml", folder / "choice.yaml", problems)
