"""The rotary kernels, bit by bit against their torch twins: they take the same roundings in the same order."""

import pytest
import torch
from torch import Tensor

from dcache.kernels.rotary import rotary_ref, rotary_scatter_ref, rotary_scatter_triton, rotary_table, rotary_triton

KINDS = [  # the interpreter truncates to bfloat16 instead of rounding
    *(("cpu", kind) for kind in (torch.float32, torch.float16)),
    *(("cuda", kind) for kind in (torch.float32, torch.float16, torch.bfloat16)),
]


def normal(*shape: int, device: str, kind: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, kind)


def table(n: int, head_dim: int, device: str) -> tuple[Tensor, Tensor]:
    cos, sin = rotary_table(n, head_dim, 1e4, torch.device("cpu"))
    return cos.to(device), sin.to(device)


@pytest.mark.parametrize(("device", "kind"), KINDS)
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("heads", "n", "head_dim"), [(1, 1, 2), (3, 7, 8), (33, 2, 80), (5, 3, 96)])
def test_rotated_heads_are_those_of_the_twin(
    device: str, kind: torch.dtype, full: bool, heads: int, n: int, head_dim: int
) -> None:
    x = normal(2, n, heads + 1, head_dim, device=device, kind=kind)[:, :, 1:].transpose(1, 2)
    cos, sin = table(40, head_dim, device)
    for batch in (1, 2):
        at = torch.randint(0, 40, (batch, n), generator=torch.Generator().manual_seed(1)).to(device)
        angles = cos[at][:, None], sin[at][:, None]
        y = rotary_triton(x, *angles, full)
        assert torch.equal(y, rotary_ref(x, *angles, full))


@pytest.mark.parametrize(("device", "kind"), KINDS[1:2] + KINDS[3:])
def test_the_two_precisions_differ_below_float32(device: str, kind: torch.dtype) -> None:
    x, (cos, sin) = normal(1, 4, 9, 16, device=device, kind=kind), table(9, 16, device)
    assert not torch.equal(*(rotary_triton(x, cos[None, None], sin[None, None], full) for full in (True, False)))


@pytest.mark.parametrize(("device", "kind"), KINDS)
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "n", "lanes", "bias", "keep_q"),
    [
        (2, 2, 8, 1, None, False, False),
        (6, 2, 8, 7, [3, 0], True, True),
        (7, 1, 80, 2, None, True, False),
        (33, 11, 96, 2, [1, 2], False, True),
    ],
)
def test_queries_and_stores_are_those_of_the_twin(
    device: str,
    kind: torch.dtype,
    full: bool,
    heads: int,
    kv_heads: int,
    head_dim: int,
    n: int,
    lanes: list[int] | None,
    bias: bool,
    keep_q: bool,
) -> None:
    dump, width = 13, (heads + 2 * kv_heads) * head_dim
    qkv = normal(2, n + 1, width + head_dim, device=device, kind=kind)[:, 1:, head_dim:]
    added = normal(width, device=device, kind=kind, seed=1) if bias else None
    rows = torch.stack([torch.arange(n) * 2, torch.arange(n) + dump - n // 2 - 1]).clamp(max=dump).to(device)
    cos, sin = table(dump, head_dim, device)  # none for the dump slot
    lane = None if lanes is None else torch.tensor(lanes, device=device)
    found = []
    for op in (rotary_scatter_triton, rotary_scatter_ref):
        whole = [
            torch.full((4 if lanes else 2, of + 2, dump + 6, head_dim), 5.0, device=device, dtype=kind)
            for of in (kv_heads, kv_heads, heads)
        ]
        k, v, q_kept = (store[:, 1:-1, 2 : dump + 3] for store in whole)
        place = torch.full((2, n, heads, head_dim), torch.nan, device=device, dtype=kind) if keep_q else None
        q = op(qkv, added, rows, cos, sin, full, k, v, lane, q_kept if keep_q else None, None, place)
        assert q.transpose(1, 2).is_contiguous()
        assert place is None or q.data_ptr() == place.data_ptr()
        assert all(store.isfinite().all() for store in whole)
        for store in (k, v, q_kept):
            store[:, :, dump] = 0  # whichever padded row won there
        found.append((q, *whole))
    for ours, twin in zip(*found, strict=True):
        assert torch.equal(ours, twin)


@pytest.mark.parametrize(("device", "kind"), KINDS[:1])
def test_the_stores_hold_rotated_keys_and_values_as_they_are(device: str, kind: torch.dtype) -> None:
    qkv, (cos, sin) = normal(1, 2, 4 * 8, device=device, kind=kind), table(6, 8, device)
    k, v = (torch.full((1, 1, 7, 8), float("nan"), device=device, dtype=kind) for _ in range(2))
    rows = torch.tensor([[4, 1]], device=device)
    q = rotary_scatter_triton(qkv, None, rows, cos, sin, True, k, v)
    angles = cos[rows][:, None], sin[rows][:, None]
    split = [x.unflatten(-1, (-1, 8)).transpose(1, 2) for x in qkv.split([16, 8, 8], dim=-1)]
    assert torch.equal(q, rotary_ref(split[0], *angles, True))
    assert torch.equal(k[:, :, [4, 1]], rotary_ref(split[1], *angles, True))
    assert torch.equal(v[:, :, [4, 1]], split[2])
    assert k[:, :, [0, 2, 3, 5, 6]].isnan().all()
    assert v[:, :, [0, 2, 3, 5, 6]].isnan().all()


@pytest.mark.parametrize(("device", "kind"), KINDS[2:])
@pytest.mark.parametrize(("heads", "kv_heads", "full"), [(32, 32, True), (28, 4, False)])
@pytest.mark.parametrize("n", [16, 1280])
def test_the_kernel_agrees_with_the_twin_at_model_sizes(
    device: str, kind: torch.dtype, heads: int, kv_heads: int, full: bool, n: int
) -> None:
    qkv = normal(2, n, (heads + 2 * kv_heads) * 128, device=device, kind=kind)
    added = None if full else normal(qkv.shape[-1], device=device, kind=kind, seed=1)
    rows = torch.stack([torch.randperm(1280, generator=torch.Generator().manual_seed(b))[:n] for b in (0, 1)])
    rows, (cos, sin) = rows.to(device), table(1281, 128, device)
    found = []
    for op in (rotary_scatter_triton, rotary_scatter_ref):
        k, v = (torch.zeros(2, kv_heads, 1344, 128, device=device, dtype=kind) for _ in range(2))
        found.append((op(qkv, added, rows, cos, sin, full, k[:, :, :1281], v[:, :, :1281]), k, v))
    for ours, twin in zip(*found, strict=True):
        assert torch.equal(ours, twin)
