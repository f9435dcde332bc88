"""What only a GPU can show; CI has none, so these run by hand: ``pytest -m gpu``."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import dcache
from dcache import Sampling, State
from dcache.decode import decode
from dcache.engine import Engine
from dcache.engine.graphs import Graphs
from dcache.engine.packet import Packet
from dcache.models.transformer import Transformer
from dcache.plugins import make_policy, make_unmasker
from dcache.policy import Plan
from dcache.testing.models import random_model
from dcache.trace import Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
POLICIES = ["none", "elastic", "elastic(gamma=0.99,track_num=3)", "dkv(interval=4)", "dkv(variant=prefill)"]
POLICIES += ["dkv(variant=pd,interval=3,cacheable=un_right)", "fast-dllm", "fast-dllm(mode=prefix)"]
POLICIES += [
    "sparse-dllm",
    "sparse-dllm(inner=elastic)",
    "sparse-dllm(compact=true)",
    "suffix(inner=sparse-dllm,window=2)",
]
POLICIES += ["suffix(window=2)", "suffix(inner=elastic(gamma=0.95),window=1)", "freecache(block_length=4)"]
POLICIES += ["es-dllm(first=0,second=1)", "dllm-cache(prompt_interval=3,gen_interval=4)"]
POLICIES += ["spa(interval=5,gen_interval=3,rank=4)", "spa(border=repaired,ratios=0.5)", "vlcache"]
POLICIES += [
    "d2(current_k=3,inflate_w=2)",
    "d2(current_k=5,rollout_p=0.3,confidence=latest,search=blocks,nucleus=above)",
]
UNMASKERS = ["low-confidence", "random", "entropy", "margin", "threshold(threshold=0.3)", "factor", "eb", "klass"]
UNMASKERS += ["wino(wide_in=0.3)", "certainty-prior(sigma=3)", "origin", "random-order", "ar(threshold=0.3)"]
SAMPLINGS = {
    "plain": Sampling(temperature=0.5),
    "filtered": Sampling(temperature=0.5, confidence="filtered", top_p=0.9, top_k=8),
    "guided": Sampling(guidance=1.0, after_end="decode"),
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5], [8, 9, 7, 9, 3]]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on(device: str, seed: int, shift: int = 0) -> Transformer:
    model = random_model(seed, shift=shift)
    moved = Transformer(model.spec, device)
    moved.load_state_dict(model.state_dict())
    return moved.requires_grad_(False)


def go(
    device: str,
    policy: str,
    seed: int = 0,
    shift: int = 0,
    unmask: str = "low-confidence",
    sampling: Sampling | None = None,
    **engine: object,
) -> tuple[list[Step], Engine]:
    model = on(device, seed, shift)
    sampling = (sampling or Sampling(temperature=0.5)).model_copy(update={"seed": seed})
    state = State(model.spec, PROMPTS, [16, 12, 8], 4, guided=sampling.guidance > 0)
    made = Engine(model, make_policy(policy), make_unmasker(unmask, sampling), **{"debug": True} | engine)  # type: ignore[arg-type]
    return decode(made, state), made


def commits(trace: list[Step]) -> list[list[tuple[int, int, int]]]:
    return [[(b, p, s.tokens[b, p]) for b, p in zip(*np.nonzero(s.commit), strict=True)] for s in trace]


def assert_same(cpu: list[Step], gpu: list[Step]) -> None:
    assert commits(gpu) == commits(cpu)
    for a, b in zip(cpu, gpu, strict=True):
        assert (a.rows == b.rows).all()
        assert (a.region_row_layers == b.region_row_layers).all()
        assert (a.refreshed == b.refreshed).all()
        finite = np.isfinite(a.confidence)
        assert np.abs(a.confidence[finite] - b.confidence[finite]).max(initial=0) < 1e-4


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_a_gpu_commits_what_a_cpu_does(policy: str, shift: int, seed: int) -> None:
    assert_same(go("cpu", policy, seed, shift)[0], go("cuda", policy, seed, shift)[0])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shift", [0, 1])
def test_graphs_change_no_bit_and_none_is_recorded_twice(policy: str, shift: int) -> None:
    plain, engine = go("cuda", policy, 2, shift, graphs=False)
    assert engine.captured == 0
    first, engine = go("cuda", policy, 2, shift)
    captured, graphs = engine.captured, engine.executor
    assert isinstance(graphs, Graphs)
    second = decode(engine, State(engine.model.spec, PROMPTS, [16, 12, 8], 4))
    third = decode(engine, State(engine.model.spec, PROMPTS, [16, 12, 8], 4))
    assert 0 < captured <= engine.captured == len(graphs.keys)
    assert set(graphs.keys.values()) == {1}
    assert graphs.replayed > len(second) + len(third) - engine.captured
    for run in (first, second, third):
        assert_same(plain, run)
        for a, b in zip(plain, run, strict=True):
            assert np.array_equal(a.confidence, b.confidence)
            assert a.reports.keys() == b.reports.keys()
            assert all(np.array_equal(x, b.reports[name], equal_nan=True) for name, x in a.reports.items())


@pytest.mark.parametrize("policy", POLICIES)
def test_two_runs_in_half_precision_give_identical_tokens(policy: str) -> None:
    model = on("cuda", 3).bfloat16()
    runs = []
    for _ in range(2):
        engine = Engine(model, make_policy(policy), make_unmasker("low-confidence"))
        for _ in range(2):
            runs.append(decode(engine, State(model.spec, PROMPTS, [16, 12, 8], 4)))
    for run in runs[1:]:
        assert commits(run) == commits(runs[0])
        assert all(np.array_equal(a.confidence, b.confidence) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("policy", ["elastic", "d2", "dllm-cache", "spa(rank=4)", "es-dllm(first=none,second=none)"])
def test_steps_in_which_nothing_may_be_committed_run_on_a_gpu(policy: str) -> None:
    """They ask for no rows, so that a policy may have an empty set to make statistics of."""
    unmask = "random-order(steps=48,schedule=linear,idle_steps=true)"
    cpu = go("cpu", policy, unmask=unmask)[0]
    assert any(not step.commit.any() for step in cpu)
    assert_same(cpu, go("cuda", policy, unmask=unmask)[0])


def test_a_buffer_of_another_shape_makes_recordings_void() -> None:
    model = on("cuda", 0)
    unmask = "klass(threshold=0.01,history=1)"
    engine = Engine(model, make_policy("none"), make_unmasker(unmask))
    for n_prompt, gen in ((4, 8), (6, 6), (4, 8)):  # canvases of one width
        for _ in range(3):
            state = State(model.spec, [PROMPTS[0][:n_prompt]], gen)
            decode(engine, state)
        alone = State(model.spec, [PROMPTS[0][:n_prompt]], gen)
        decode(Engine(model, make_policy("none"), make_unmasker(unmask), graphs=False), alone)
        assert (state.tokens == alone.tokens).all()


def test_a_mask_on_the_device_may_lie_in_memory_as_it_likes() -> None:
    model, tokens = on("cuda", 0), []
    for turned in (False, True):
        policy = make_policy("none")

        def plan(state: State, turned: bool = turned) -> Plan:
            shown = torch.from_numpy(state.valid).cuda()
            return Plan(state.valid, visible=shown.T.contiguous().T if turned else shown)

        vars(policy)["plan"] = plan
        state = State(model.spec, PROMPTS, [16, 12, 8], 4)
        decode(Engine(model, policy, make_unmasker("low-confidence")), state)
        tokens.append(state.tokens)
    assert (tokens[0] == tokens[1]).all()


def test_freed_keys_are_not_missed_on_a_gpu() -> None:
    """On a canvas much longer than the multiple of slots to which held keys are padded there."""
    model, runs = on("cuda", 0), {}
    for compact in ("false", "true"):
        policy = make_policy(f"sparse-dllm(keep=0.2,compact={compact})")
        engine = Engine(model, policy, make_unmasker("low-confidence", Sampling(after_end="decode")), debug=True)
        state = State(model.spec, [[i % 30 for i in range(n)] for n in (110, 90)], [16, 12], 4)
        runs[compact] = decode(engine, state), engine.store_bytes
    assert_same(runs["false"][0], runs["true"][0])
    assert runs["true"][1]["K"] < runs["false"][1]["K"]


@pytest.mark.parametrize("unmask", UNMASKERS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_unmasker_commits_on_a_gpu_what_it_does_on_a_cpu(unmask: str, sampling: str) -> None:
    more = {"unmask": unmask, "sampling": SAMPLINGS[sampling]}
    assert_same(go("cpu", "none", 1, **more)[0], go("cuda", "none", 1, **more)[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pass_has_no_sync_but_its_wait(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses synchronising calls while a pass runs, but for the one wait that ends it."""
    warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
    inner, wait, calls = Engine._run, Packet.wait, {"passes": 0, "waits": 0}

    def strict(self: Engine, *args: Any, **more: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return inner(self, *args, **more)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            calls["passes"] += 1

    def waiting(self: Packet) -> None:
        torch.cuda.set_sync_debug_mode("default")
        wait(self)
        calls["waits"] += 1

    monkeypatch.setattr(Engine, "_run", strict)
    monkeypatch.setattr(Packet, "wait", waiting)
    go("cuda", policy, unmask="wino(wide_in=0.3)", debug=False, graphs=False)  # shadow rows included
    go("cuda", policy, unmask="klass", shift=1, debug=False, graphs=False)
    assert calls["passes"] == calls["waits"] > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_is_returned_after_a_run(policy: str) -> None:
    go("cuda", policy, unmask="klass")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    go("cuda", policy, unmask="klass")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.parametrize(
    ("name", "n_bytes"), [("llada-8b:random", 16_031_162_368), ("dream-7b:random", 15_231_233_024)]
)
def test_random_weights_of_true_shape_are_built_on_the_device_without_a_copy(name: str, n_bytes: int) -> None:
    if torch.cuda.mem_get_info()[1] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = dcache.load_model(name, device="cuda")
    assert model.dtype == torch.bfloat16
    assert model.spec.n_parameters * 2 == n_bytes
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 1.05 * n_bytes
    prompt = list(range(100, 164))
    for policy in ("none", "elastic", "dkv", "d2", "fast-dllm"):
        output = dcache.generate(model, [prompt], policy=policy, gen_length=8, block_length=None)[0]
        assert len(output.canvas) == 8
