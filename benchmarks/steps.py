"""Time of one denoising step at the shapes of a published model with random weights.

Random weights commit noise, so the number of rows a policy computes is not that of a real text: the table states it
beside the time. Each policy decodes the same prompt several times after a warm-up; medians over all steps of all runs
but the first, with the 5th and 95th percentile. ``floor`` is the matrix products alone, for the mean number of rows.
"""

import argparse
import json
import sys
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch.nn.functional import linear

import dcache
from dcache.decode import decode
from dcache.engine import Engine
from dcache.models.transformer import Transformer
from dcache.plugins import make_policy, make_unmasker


def floor_ms(model: Transformer, rows: int, repeats: int = 20) -> float:
    """Median milliseconds of all products of a pass over `rows` rows, and the head for 32."""
    x = torch.randn(1, rows, model.spec.d_model, device=model.device, dtype=model.dtype)
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = perf_counter()
        for block in model.blocks():
            q = linear(x, block.qkv)[..., : model.spec.q_width]
            linear(q, block.out)
            linear(linear(x, block.gate_up)[..., : model.spec.mlp_size], block.down)
        if model.head is not None:
            linear(x[:, :32], model.head)
        torch.cuda.synchronize()
        times.append((perf_counter() - began) * 1e3)
    return float(np.median(times))


def measure(model: Transformer, policy: str, prompt: int, gen: int, repeats: int) -> dict[str, object]:
    """Decode `repeats` times and describe the steps."""
    draw = np.random.default_rng(0)
    ids = draw.integers(0, model.spec.mask_id, size=prompt).tolist()
    engine = Engine(model, make_policy(policy), make_unmasker("low-confidence"))
    steps = []
    for n in range(repeats + 1):
        trace = decode(engine, dcache.State(model.spec, [ids], gen, 32))
        steps += trace if n else []
    times = np.array([s.seconds * 1e3 for s in steps])
    rows = np.array([s.row_layers.sum() / model.spec.n_layers for s in steps])
    again = np.array([s.again is not None for s in steps])
    quiet = times[~again] if (~again).any() else times
    return {
        "policy": policy,
        "steps": len(steps),
        "rows": round(float(rows.mean()), 1),
        "second_passes": round(float(again.mean()), 3),
        "p50_ms": round(float(np.median(times)), 2),
        "p5_ms": round(float(np.percentile(times, 5)), 2),
        "p95_ms": round(float(np.percentile(times, 95)), 2),
        "p50_one_pass_ms": round(float(np.median(quiet)), 2),
        "floor_ms": round(floor_ms(model, max(1, round(float(rows.mean())))), 2),
        "store_gib": round(sum(engine.store_bytes.values()) / 2**30, 3),
    }


def main() -> None:
    """Print one line per policy and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llada-8b:random")
    parser.add_argument("--policies", nargs="*", default=["none", "elastic", "elastic(gamma=0)", "dkv"])
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--gen", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/steps.json"))
    given = parser.parse_args()
    model = dcache.load_model(given.model)
    print(f"{given.model} on {torch.cuda.get_device_name()}, torch {torch.__version__}, {model.dtype}", flush=True)
    lines = []
    for policy in given.policies:
        lines.append(measure(model.transformer, policy, given.prompt, given.gen, given.repeats))
        print(json.dumps(lines[-1]), flush=True)
    conditions = {
        "model": given.model,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "dcache": dcache.__version__,
        "dtype": str(model.dtype),
        "prompt": given.prompt,
        "gen": given.gen,
        "repeats": given.repeats,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"conditions": conditions, "steps": lines}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
