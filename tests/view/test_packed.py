"""Arrays in JSON come back as they were, and damaged ones are refused."""

import base64
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pydantic import ValidationError

from dcache.view.packed import Packed

shapes = array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=9)


@given(arrays(bool, shapes))
def test_a_mask_comes_back(mask):
    packed = Packed.model_validate_json(Packed.bits(mask).model_dump_json())
    assert np.array_equal(packed.mask(), mask)


@given(arrays(np.float32, shapes, elements=st.floats(width=32)))
def test_numbers_come_back_nan_and_infinity_too(values):
    packed = Packed.model_validate_json(Packed.floats(values).model_dump_json())
    assert np.array_equal(packed.values(), values, equal_nan=True)


def test_a_map_takes_less_than_a_tenth_of_its_bytes():
    mask = np.zeros((96, 8, 200), dtype=bool)
    mask[:, :, 100:132] = True
    assert len(Packed.bits(mask).data) < mask.size / 80


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("%%%", "cannot be unpacked"),
        (base64.b64encode(b"nothing").decode(), "cannot be unpacked"),
        (base64.b64encode(zlib.compress(b"\0")).decode(), "does not have its 2 bytes"),
        (base64.b64encode(zlib.compress(b"\0" * 10**7)).decode(), "does not have its 2 bytes"),  # a bomb
    ],
)
def test_bytes_that_are_not_those_of_the_shape_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        Packed(kind="bits", shape=[3, 4], data=data).mask()


def test_a_shape_that_would_fill_the_memory_is_refused():
    with pytest.raises(ValueError, match="at most"):
        Packed(kind="bits", shape=[2**20, 2**20], data="").mask()
    with pytest.raises(ValidationError):
        Packed(kind="bits", shape=[-1], data="")
