"""The floor: which products it is made of, and what it says of a step."""

import numpy as np
import pytest
import torch

import dcache
from dcache.bench.floor import Floor, bracket, floor_ms, point, products, rows_of_passes


class Straight(Floor):
    """A floor of 1 ms and 1 us per row in 4 layers, 100 us and 10 us per row in the head; counts measurements."""

    def __init__(self, exact=()):
        spec = type("Spec", (), {"n_layers": 4})
        super().__init__(type("Model", (), {"spec": spec}), exact)
        self.asked = []

    def measure(self, rows, head_rows):
        self.asked.append((rows, head_rows))
        return (1 + rows / 1000) * (rows > 0) + (0.1 + head_rows / 100) * (head_rows > 0)


def test_rows_lie_between_powers_of_two_and_their_halves():
    assert bracket(1) == (1, 1)
    assert bracket(64) == (64, 64)
    assert bracket(65) == (64, 96)
    assert bracket(100) == (96, 128)
    assert bracket(1100) == (1024, 1536)
    assert bracket(1100, exact=[1280]) == (1024, 1280)
    assert bracket(1280, exact=[1280]) == (1280, 1280)


def test_a_pass_costs_the_sum_of_its_layers_and_its_head():
    floor = Straight()
    assert floor.pass_ms([100, 100, 100, 100], 0) == pytest.approx(1.1)
    assert floor.pass_ms([100, 100, 0, 0], 0) == pytest.approx(0.55)
    assert floor.pass_ms([0, 0, 0, 0], 5) == pytest.approx(0.15)
    assert floor.pass_ms([70, 70, 70, 1280], 0) == pytest.approx((3 * 1.07 + 2.28) / 4)


def test_rows_that_come_up_often_are_measured():
    floor = Straight(exact=[1088])
    floor.layer_ms(1088)
    assert floor.asked == [(1088, 0)]


def test_one_pass_ran_all_rows():
    rows = np.array([[3, 5], [1, 0]])
    (found,) = rows_of_passes(rows, None, None)
    assert found.tolist() == [8, 1]


def test_a_second_pass_counts_from_its_first_layer_on():
    again = np.zeros((2, 6), dtype=bool)
    again[0, :6] = True
    again[1, :2] = True
    row_layers = np.array([[2, 2], [2 + 6, 2], [2 + 6, 2 + 2]])
    first, second = rows_of_passes(row_layers, again, np.array([1, 2]))
    assert first.tolist() == [4, 4, 4]
    assert second.tolist() == [0, 6, 8]


def test_a_second_pass_without_a_start_runs_through_all_layers():
    again = np.ones((1, 3), dtype=bool)
    first, second = rows_of_passes(np.array([[4], [4]]), again, None)
    assert first.tolist() == [1, 1]
    assert second.tolist() == [3, 3]


def test_the_work_is_every_product_of_every_layer_and_the_head(monkeypatch):
    model = dcache.load_model("tiny-llada", device="cpu").transformer
    seen = []
    for product in ("product", "linear"):
        monkeypatch.setattr(f"dcache.bench.floor.{product}", lambda x, weight: seen.append((x.shape[0], *weight.shape)))
    products(model, 3, 2)()
    spec = model.spec
    layer = [(3, 768, 256), (3, 256, 256), (3, 2 * spec.mlp_size, 256), (3, 256, spec.mlp_size)]
    assert seen == layer * spec.n_layers + [(2, spec.vocab_size, 256)]


def test_rates_count_each_weight_input_and_output_once():
    model = dcache.load_model("llada-8b:random", device="meta", dtype="bfloat16").transformer
    found = point(model, 16, 0, 4.0)
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 12288)
    moved = 2 * (weights + 32 * 16 * (4096 + 3 * 4096 + 2 * 4096 + 4096 + 2 * 12288 + 12288 + 4096))
    assert found.tflop_s == pytest.approx(2 * 16 * weights / 4e-3 / 1e12, abs=1e-3)
    assert found.tb_s == pytest.approx(moved / 4e-3 / 1e12, abs=1e-4)


def test_a_small_model_has_a_floor_on_a_cpu():
    model = dcache.load_model("tiny-llada", device="cpu").transformer
    with torch.inference_mode(False):
        assert floor_ms(model, 4, 2) > 0
