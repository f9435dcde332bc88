"""The cases of ``bench kernels``, on a CPU, where an op and its twin are the same."""

from dataclasses import replace
from importlib import import_module
from math import inf, isnan, nan
from pathlib import Path

import pytest
import torch

import dcache
import dcache.kernels
from dcache.bench import kernels as bench
from dcache.bench.cases import MODELS, OPS, Draw, Size, op_of
from dcache.kernels import backend
from dcache.models.transformer import ModelSpec

SPEC = ModelSpec(
    family="test", n_layers=2, d_model=24, n_heads=4, n_kv_heads=2, head_dim=8, mlp_size=20, vocab_size=40,
    norm_eps=1e-5, rope_theta=1e4, max_positions=64, mask_id=39, eos_id=38, end_ids=(38,), qkv_bias=True,
)  # fmt: skip
CASES = [
    pytest.param(name, size, id=f"{name}, {size}")
    for name, op in OPS.items()
    for size in dict.fromkeys(replace(size, rows=5, slots=11) for size in op.of(MODELS[0]))
]


def draw(size, seed=0):
    return Draw(SPEC, size, torch.device("cpu"), torch.float32, seed)


def call(name, size, seed=0):
    return OPS[name].draw(draw(size, seed))


def test_every_op_with_a_kernel_has_a_case():
    missing = []
    for file in sorted(Path(dcache.kernels.__path__[0]).glob("*.py")):
        module = import_module(f"dcache.kernels.{file.stem}")
        names = {name.removesuffix("_triton") for name in vars(module) if name.endswith("_triton")} - {"use"}
        missing += [f"{file.stem}.{name}" for name in names if getattr(OPS.get(name), "module", None) != file.stem]
    assert missing == []


@pytest.mark.parametrize(("name", "size"), CASES)
def test_a_case_runs_and_agrees_with_itself(name, size):
    made = call(name, size)
    assert bench.difference(name, made) <= 1e-6
    assert made.n_bytes > 0


@pytest.mark.parametrize(("name", "size"), CASES)
def test_seeds_give_other_inputs(name, size):
    a, b = (call(name, size, seed) for seed in (0, 1))
    tensors = [(x, y) for x, y in zip(a.args, b.args, strict=True) if isinstance(x, torch.Tensor)]
    assert any(not torch.equal(x, y) for x, y in tensors)


def test_bytes_are_those_of_inputs_and_outputs():
    size = Size(5, slots=11)
    q, k, v = call("attend", size).args
    assert call("attend", size).n_bytes == 2 * q.nbytes + k.numel() * 4 + v.numel() * 4
    x, weight, _ = call("rms_norm", size).args
    assert call("rms_norm", size).n_bytes == 2 * x.nbytes
    assert weight.shape == (SPEC.d_model,)
    (gate_up,) = call("swiglu", size).args
    assert call("swiglu", size).n_bytes == gate_up.nbytes + gate_up.nbytes // 2


def test_a_wrong_kernel_is_noticed(monkeypatch):
    right = op_of("swiglu")
    monkeypatch.setattr(bench, "op_of", lambda name: lambda x: right(x) * (1.0 if not backend.ENABLED else 1.1))
    monkeypatch.setattr(backend, "ENABLED", True)
    assert bench.difference("swiglu", call("swiglu", Size(5))) == pytest.approx(0.1, abs=1e-3)
    monkeypatch.setattr(bench, "op_of", lambda name: lambda x: (right(x), right(x) * (nan if backend.ENABLED else 1)))
    assert isnan(bench.difference("swiglu", call("swiglu", Size(5))))
    monkeypatch.setattr(bench, "op_of", lambda name: lambda x: x if backend.ENABLED else right(x))
    assert bench.difference("swiglu", call("swiglu", Size(5))) == inf


def test_what_must_be_equal_may_not_differ_at_all(monkeypatch):
    right = op_of("find")
    monkeypatch.setattr(bench, "op_of", lambda name: lambda *a: right(*a) + int(backend.ENABLED))
    monkeypatch.setattr(backend, "ENABLED", True)
    assert bench.difference("find", call("find", Size(5, slots=11))) == inf


def test_buffers_written_in_place_are_results_and_inputs_are_left_alone(monkeypatch):
    made = call("put", Size(5, slots=11))
    before = made.args[0].clone()
    assert bench.difference("put", made) == 0
    assert torch.equal(made.args[0], before)
    monkeypatch.setattr(backend, "ENABLED", True)
    right = op_of("put")
    monkeypatch.setattr(bench, "op_of", lambda name: lambda *a: None if backend.ENABLED else right(*a))
    assert bench.difference("put", made) > 0.1


def test_unknown_ops_are_refused():
    assert bench.checked(None) == [*OPS]
    assert bench.checked(["attend"]) == ["attend"]
    with pytest.raises(dcache.UsageError, match="unknown op 'atend'"):
        bench.checked(["atend"])
