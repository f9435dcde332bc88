"""Comparisons made by hand, whose texts are those of an attacker, and real ones on a small random model."""

from pathlib import Path

import numpy as np
import pytest

import dcache
from dcache.compare import Comparison, Experiment, Run
from dcache.results import Conditions, Entrant, Result, line_of
from dcache.view.packed import Packed
from dcache.view.recording import FILE, Candidates, Recording

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests" / "golden" / "models" / "llada_mha"
SETTINGS = {
    "temperature": 0.0, "forbid_eos": False, "eos_last": "off", "after_end": "drop", "gen_length": 4,
    "block_length": 2, "unmask": "low-confidence", "batch_size": 1,
}  # fmt: skip


class Made:
    """Hand-made parts of a comparison."""

    @staticmethod
    def conditions(*entrants, **changes):
        facts = {
            "dcache": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "triton": None, "device": "cpu",
            "device_name": "Example CPU", "threads": 2, "dtype": "float32", "model": "tiny", "n_parameters": 3_600_000,
            "weights": "0", "task": "gsm-mini", "split": "test", "limit": 2, "n_problems": 2, "seed": 0, "repeats": 1,
            "settings": SETTINGS, "policies": list(entrants), "started": "2025-01-01T00:00:00+00:00",
        }  # fmt: skip
        return Conditions(**(facts | changes))

    @staticmethod
    def entrant(policy, name=None, unmask="low-confidence", **knobs):
        return Entrant(policy=policy, name=name or policy, source="dcache", knobs=knobs, unmask=unmask)

    @staticmethod
    def result(policy, problem="a", repeat=0, canvas=(1, 2, 3, 4), **changes):
        facts = {
            "repeat": repeat, "problem": problem, "prompt": "0", "policy": policy, "text": "".join(map(str, canvas)),
            "correct": True, "tokens": canvas, "canvas": canvas, "n_tokens": len(canvas), "nfe": 4, "seconds": 1.0,
            "batch": 1, "row_layers": 48, "kv_row_layers": 48, "full_row_layers": 48, "row_share": 1.0,
            "refreshes": 2, "step_ms": [1.0, 2.0], "peak_bytes": None, "cache_bytes": 2**20,
        }  # fmt: skip
        return Result(**(facts | changes))

    @staticmethod
    def recording(policy, problem="a", **changes):
        """Two steps of two layers over two prompt tokens and four generated ones; the second computes one row."""
        rows = np.ones((2, 2, 6), dtype=bool)
        rows[1] = False
        rows[1, :, 4] = True
        facts = {
            "policy": policy, "problem": problem, "prompt": "0", "question": "why?", "answer": "42",
            "prompt_ids": [7, 8], "images": [], "n_layers": 2, "block_length": 2, "length": 6, "canvas": [1, 2, 3, 4],
            "text": "1234", "ends": [1, 2, 3, 4], "pieces": {1: "1", 2: "2", 3: "3", 4: "4", 7: "se", 8: "ven"},
            "same": True, "rows": Packed.bits(rows), "kv_rows": None, "again": None, "refresh": [True, False],
            "row_layers": [12, 2], "commits": [[2, 3], [4, 5]], "remasks": [[], []],
            "candidates": [Candidates(at=[2, 3], tokens=[1, 2], confidence=[0.9, 0.8]),
                           Candidates(at=[4, 5], tokens=[3, 4], confidence=[0.7, 0.25])],
            "step_ms": [3.0, 1.0], "begin_ms": 1.0, "split_ms": {"pass": [2.0, 0.5], "plan": [1.0, 0.5]}, "drift": None,
        }  # fmt: skip
        return Recording(**(facts | changes))

    @staticmethod
    def save(folder, conditions, results, recordings=()):
        Comparison(conditions, list(results)).save(folder)
        if recordings:
            lines = [line_of(conditions), *(r.model_dump_json().encode() + b"\n" for r in recordings)]
            (folder / FILE).write_bytes(b"".join(lines))
        return folder


@pytest.fixture(scope="session")
def made():
    return Made


@pytest.fixture(scope="session")
def model():
    return dcache.load_model(MODEL, device="cpu")


@pytest.fixture(scope="session")
def compared(model):
    """A function that runs a comparison into a folder, as the command does."""

    def run(folder, policies="elastic,dkv", **settings):
        found = Run(
            Experiment(policies, **({"limit": 2, "gen_length": 8, "block_length": 4} | settings)), model, folder
        )
        for _ in found:
            pass
        return found

    return run
