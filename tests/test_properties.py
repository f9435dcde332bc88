"""Claims about every built-in policy, by the conformance kit; and those that are about one policy alone.

`BUILT_INS` is the one table of what is tested: a row is a policy with its main configuration, and runs every claim of
`dcache.testing.claims` with every installed unmasker, with and without a logit shift.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from dcache.plugins import BUILT_IN, plugins
from dcache.testing import Canvas, Conformance, Exact, Subject, hold
from dcache.testing.runs import Run
from dcache.testing.watch import watched

# On one layer K and V depend on the token alone; under a logit shift dkv may cache a row that still holds the mask.
ONE_LAYER = {"n_layers": 1, "shift": 0}
TWO_PER_BLOCK = {"unmask": "low-confidence(tokens_per_step=2)", "block_length": 4, "shift": 0}
# With a logit shift, a row that predicts nothing any more keeps key and value of the mask until the next refresh, as
# released: that of cacheable=un, and the last one of a block. Whether the others wait, the exact configurations show.
WAITS = {"a_committed_row_is_computed_again_with_its_token": "with a logit shift some rows wait for the next refresh"}

BUILT_INS: dict[str, Mapping[str, Any]] = {
    "none": {},
    "elastic": {"exact": ["elastic(refresh=always)", *(Exact(f"elastic(track_num={n})", n_layers=1) for n in (0, 1))]},
    "elastic(gamma=0.99,track_num=3)": {"exact": Exact("elastic(gamma=0.5,track_num=3)", n_layers=1)},
    "elastic(block_caching=false)": {},
    "elastic(variant=paper,window=6)": {},
    "dkv(interval=4)": {"exact": ["dkv(interval=1)", Exact("dkv(interval=100)", **ONE_LAYER)]},
    "dkv(interval=100)": {"exact": Exact("dkv(interval=7)", **TWO_PER_BLOCK), "exempt": WAITS},
    "dkv(variant=greedy,neighbours=2)": {"exact": "dkv(variant=greedy,interval=1)"},
    "dkv(variant=prefill)": {"exact": Exact("dkv(variant=prefill)", **ONE_LAYER)},
    "dkv(variant=pd,interval=3,cacheable=un_right)": {"exact": Exact("dkv(variant=pd,interval=3)", **ONE_LAYER)},
    "fast-dllm": {"exact": ["fast-dllm(interval=1)", Exact("fast-dllm", **ONE_LAYER)]},
    "fast-dllm(full_passes=2,interval=3)": {},
    "fast-dllm(mode=prefix)": {"exact": Exact("fast-dllm(mode=prefix)", **ONE_LAYER)},
    "d2(current_k=3,inflate_w=2)": {"exact": ["d2(refresh=always)", Exact("d2(current_k=12)", n_layers=1)]},
    "d2(current_k=5,rollout_p=0.3,confidence=latest,search=blocks,nucleus=above)": {},
    "dllm-cache(prompt_interval=3,gen_interval=4)": {
        "exact": [
            "dllm-cache(prompt_interval=1,gen_interval=1)",
            "dllm-cache(prompt_interval=1,transfer_ratio=1)",
            Exact("dllm-cache", n_layers=1),
        ]
    },
    "dllm-cache(prompt_interval=4,gen_interval=9,transfer_ratio=0.6,first_layer=scheduled)": {},
    "freecache(block_length=4)": {
        "exact": [
            "freecache(refresh_every=1)",
            Exact("freecache(freeze_prompt=false)"),
            Exact("freecache", **ONE_LAYER),
        ]
    },
    "freecache(block_length=none,freeze_delay=2,refresh_every=5)": {},
    "suffix(window=2)": {"equals": [("suffix(window=12)", "fast-dllm(mode=prefix)")]},
    "suffix(inner=elastic(gamma=0.95),window=1)": {
        "equals": [("suffix(inner=elastic(gamma=0.95),window=12)", "elastic(gamma=0.95)")]
    },
    "suffix(inner=dkv,window=0,decay=gauss,sigma=3)": {"equals": [("suffix(inner=dkv,window=12,decay=gauss)", "dkv")]},
    "suffix(inner=es-dllm,window=1)": {"exact": "suffix(inner=es-dllm(refresh_every=1),window=12)"},
    "es-dllm": {"equals": [(f"es-dllm({knobs})", "fast-dllm") for knobs in ("first=none,second=none", "share=1")]},
    "es-dllm(first=0,second=1,share=0.3,alpha=0.2,refresh_every=4)": {},
    "sparse-dllm": {"equals": [("sparse-dllm(keep=1)", "fast-dllm(full_passes=2)")], "exempt": WAITS},
    "sparse-dllm(inner=elastic,keep=0.4,kernel=none)": {"equals": [("sparse-dllm(inner=elastic,keep=1)", "elastic")]},
    "sparse-dllm(compact=true)": {"equals": [("sparse-dllm(compact=true)", "sparse-dllm")], "exempt": WAITS},
    "vlcache": {},
    "vlcache(fill=first)": {
        "equals": [("vlcache(inner=elastic,fill=first)", "elastic"), ("vlcache(ratio=0,fill=first)", "fast-dllm")]
    },
    "spa(interval=5,gen_interval=3,rank=4)": {"exact": ["spa(interval=1)", Exact("spa(rank=1)", **ONE_LAYER)]},
    "spa(border=repaired,ratios=0.5)": {"exact": Exact("spa(border=repaired,warm_up=0)", n_layers=1)},
}
EXAMPLES = int(os.environ.get("DCACHE_EXAMPLES", "4"))  # per claim; more by hand, before a release


def class_name(policy: str) -> str:
    """``dkv(interval=4)`` is tested by ``TestDkvInterval4``."""
    return "Test" + "".join(word.title() for word in re.findall(r"[a-zA-Z0-9]+", policy))


for _policy, _told in BUILT_INS.items():
    _body = {"policy": _policy, "examples": EXAMPLES, "__module__": __name__, **_told}
    globals()[class_name(_policy)] = type(class_name(_policy), (Conformance,), _body)


def test_the_table_has_every_built_in_policy() -> None:
    built_in = {name for name, entry in plugins().policies.entries.items() if entry.source == BUILT_IN}
    assert {policy.partition("(")[0] for policy in BUILT_INS} == built_in


@pytest.mark.parametrize("policy", [policy for policy in BUILT_INS if policy != "none"])
def test_a_built_in_reuses_rows_so_that_the_claims_about_them_say_something(policy: str) -> None:
    unmask = "random-order" if "greedy" in policy else "low-confidence"
    assert watched(Subject(policy), Canvas(lengths=((5, 12),), unmask=unmask)).kept > 0


@pytest.mark.parametrize("policy", ["none", "elastic", "d2(current_k=3)", "fast-dllm", "dkv"])
@pytest.mark.parametrize("unmask", ["wino", "klass"])
def test_shadow_rows_and_further_reads_are_accounted_for(policy: str, unmask: str) -> None:
    hold("accounting_equals_a_counting_hook", policy, Canvas(lengths=((5, 8), (3, 12)), unmask=unmask))


def test_elastic_with_gamma_above_one_is_not_no_cache() -> None:
    """Layer 0 still reuses rows; the recorded case `gamma_above_one` shows the same of the released code."""
    canvas = Canvas(lengths=((9, 12),), unmask="low-confidence(window=4)")
    reference, run = Run("none", canvas).go(), Run("elastic(gamma=1.1)", canvas).go()
    assert [int(s.start[0]) for s in run.trace[1:] if s.start is not None] == [1] * (len(run.trace) - 1)
    assert any(
        not np.allclose(a.confidence[a.commit], b.confidence[a.commit], atol=1e-4)
        for a, b in zip(run.trace[1:], reference.trace[1:], strict=False)
    )
