"""Accuracy and agreement of every policy on many held-out problems, under several unmaskers.

``python benchmarks/quality.py --out benchmarks/results`` writes one table per unmasker, with its conditions. Quality
does not depend on the device (float32; TF32 is never used), so run it where it is quick; its times mean nothing,
because prompts are decoded many at a time.
"""

import argparse
import sys
from pathlib import Path

import dcache
from dcache import report

POLICIES = [
    "elastic",
    "elastic(gamma=0.5)",
    "elastic(gamma=0.8)",
    "elastic(gamma=0.95)",
    "elastic(gamma=0.99)",
    "elastic(variant=paper)",
    "dkv",
    "dkv(interval=2)",
    "dkv(interval=4)",
    "dkv(interval=16)",
]
RUNS: dict[str, tuple[list[str], dict[str, object]]] = {
    "one-token": (POLICIES, {"unmask": "low-confidence", "block_length": 32}),
    "one-block": (["elastic", "dkv"], {"unmask": "low-confidence", "block_length": None}),
    "two-tokens": (["elastic", "dkv"], {"unmask": "low-confidence(tokens_per_step=2)", "block_length": 32}),
    "four-tokens": (["elastic", "dkv"], {"unmask": "low-confidence(tokens_per_step=4)", "block_length": 32}),
    "eight-tokens": (["elastic", "dkv"], {"unmask": "low-confidence(tokens_per_step=8)", "block_length": 32}),
    "threshold": (POLICIES, {"unmask": "threshold(threshold=0.9)", "block_length": 32}),
    "threshold-window": (
        POLICIES,
        {"unmask": "threshold(threshold=0.9,window=16)", "block_length": None, "after_end": "drop-once"},
    ),
    "random": (["elastic", "dkv"], {"unmask": "random", "block_length": 32}),
}


def main() -> None:
    """Run what is asked for; one Markdown file per run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-llada")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--policies", nargs="*", help="instead of those of each run")
    given = parser.parse_args()
    model = dcache.load_model(given.model, device=given.device, dtype="float32")
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.only:
        policies, settings = RUNS[name]
        policies = given.policies or policies
        result = dcache.compare(model, policies, limit=given.limit, batch_size=given.batch_size, **settings)
        text = report.markdown(result.conditions, result.standings)
        (given.out / f"quality-{name}.md").write_text(text + "\n", encoding="utf-8")
        print(f"## {name}\n{text}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
