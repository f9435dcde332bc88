"""Helpers on masks, against what they say, one row at a time."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcache.arrays import Bools, first, heaviest, highest, leftmost, places, positions

masks = st.tuples(st.integers(1, 3), st.integers(1, 12)).flatmap(lambda shape: arrays(np.bool_, shape))


@given(mask=masks, n=st.integers(0, 13))
def test_leftmost_keeps_the_first_entries_of_each_row(mask: Bools, n: int) -> None:
    assert (leftmost(mask, n) == (mask & (mask.cumsum(1) <= n))).all()


@given(mask=masks)
def test_first_falls_back_to_the_number_of_its_row(mask: Bools) -> None:
    otherwise = 100 + np.arange(len(mask))
    found = first(mask, otherwise)
    assert found.tolist() == [row.argmax() if row.any() else fall for row, fall in zip(mask, otherwise, strict=True)]


@given(mask=masks, spare=st.integers(0, 3), least=st.integers(0, 2))
def test_positions_are_ascending_and_padded_with_the_fill(mask: Bools, spare: int, least: int) -> None:
    width = max(int(mask.sum(1).max()), least) + spare
    found = positions(mask, mask.shape[1], lambda longest: longest + spare, least)
    expected = [[*row.nonzero()[0], *[mask.shape[1]] * (width - row.sum())] for row in mask]
    assert found.tolist() == expected


@given(mask=masks)
def test_places_are_those_of_the_flattened_mask(mask: Bools) -> None:
    assert places(mask).tolist() == np.flatnonzero(mask).tolist()
    assert places(mask.T).tolist() == np.flatnonzero(mask.T).tolist()


@given(among=masks, share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), beyond=st.booleans(), data=st.data())
def test_the_heaviest_are_counted_by_the_running_sum(
    among: Bools, share: float, beyond: bool, data: st.DataObject
) -> None:
    weight = data.draw(arrays(np.float64, among.shape, elements=st.sampled_from([0.0, 0.25, 1.0, 3.0])))
    mass = np.sort(np.where(among, weight, 0))[:, ::-1].cumsum(1)
    within = (mass <= share * (mass[:, -1:] + 1e-9)).sum(1)
    expected = highest(weight, among, within + 1 if beyond else np.maximum(within, 1))
    assert (heaviest(weight, (-weight).argsort(1, kind="stable"), among, share, beyond) == expected).all()


def test_weights_of_float32_are_summed_in_float64() -> None:
    weight = np.ones((1, 3001), dtype=np.float32)
    weight[0, 0] = 2**24  # plus 1 in float32 is the same
    order = np.arange(3001)[None]
    kept = heaviest(weight, order, np.ones(weight.shape, dtype=bool), (2**24 + 1500.5) / (2**24 + 3000))
    assert kept.sum() == 1501
