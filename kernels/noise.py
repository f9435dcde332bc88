"""Uniform numbers as a function of integers: no generator state, so replays and batches draw the same.

A number is a hash of (seed, sequence, step, position, draw): `mix` is the finaliser of SplitMix64 (Steele, Lea,
Flood 2014), ``uniform = (top 53 bits + 1/2) / 2**53``, at most
``1 - 2**-53``, so that 0 and 1 never occur and ``log(-log(u))`` is finite.
"""

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
SECOND = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch shifts signed integers arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """Scramble int64 numbers, one to one."""
    x = x + GOLDEN
    x = (x ^ _shift(x, 30)) * FIRST
    x = (x ^ _shift(x, 27)) * SECOND
    return x ^ _shift(x, 31)


def uniform_ref(keys: tuple[Tensor, ...]) -> Tensor:
    """The torch twin of `uniform`."""
    state = torch.zeros((), dtype=torch.int64, device=keys[0].device)
    for key in keys:
        state = mix(state ^ mix(key))
    return ((_shift(state, 11).to(torch.float64) + 0.5) * 2.0**-53).clamp_max(1 - 2.0**-53)  # the last rounds to 1


def uniform(*keys: Tensor) -> Tensor:
    """Uniform numbers in (0, 1).

    Args:
        keys: int64 tensors that broadcast together; equal keys give equal numbers.

    Returns:
        float64, of the broadcast shape.
    """
    return uniform_ref(keys)
