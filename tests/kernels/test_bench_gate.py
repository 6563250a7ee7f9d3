"""The benchmark's idea of the right answer agrees with the oracle of the formats, and misses no fault."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mbq_export.schemes.base import CHANNEL
from mbq_export.schemes.oracle import dequantized
from mbq_kernels.bench.gate import (
    MOST_ROWS,
    compared_rows,
    dense_rows,
    expected,
    expected_int8,
    random_weight,
    wrong_answer,
)
from mbq_kernels.bench.shapes import Shape
from mbq_kernels.comparison import Family, tolerance_for
from mbq_kernels.testing import Case
from mbq_kernels.weights import DeviceWeight, device_weight

FORMATS = [
    ("w3a16", 128),
    ("w3a16", 32),
    ("w4a16", 128),
    ("w4a16", 64),
    ("w4a8", CHANNEL),
    ("w4a8", 128),
]
TOLERANCE = tolerance_for(Family.SKINNY, torch.float16)
SEED = np.random.SeedSequence().entropy


def case_of(scheme: str, group_size: int, m: int = 5) -> Case:
    return Case(scheme=scheme, dtype=torch.float16, m=m, n=48, k=384, group_size=group_size)


@pytest.mark.parametrize(("scheme", "group_size"), FORMATS)
def test_tiles_come_apart_into_the_weights_that_went_in(scheme: str, group_size: int) -> None:
    problem = case_of(scheme, group_size).make(int(SEED) % 2**31)
    weight = device_weight(problem.tiled, dtype=torch.float16)
    dense = torch.cat(list(dense_rows(weight))).numpy()
    np.testing.assert_array_equal(dense, dequantized(problem.packed))


def test_the_answer_of_integer_activations_is_the_formats_own() -> None:
    problem = case_of("w4a8", CHANNEL).make(int(SEED) % 2**31)
    weight = device_weight(problem.tiled, dtype=torch.float16)
    exact = expected_int8(problem.x, weight).exact
    assert exact is not None
    assert torch.equal(exact, problem.answer.exact)


def test_the_answer_of_grouped_integer_activations_is_the_oracles() -> None:
    problem = case_of("w4a8", 128).make(int(SEED) % 2**31)
    weight = device_weight(problem.tiled, dtype=torch.float16)
    found = expected_int8(problem.x, weight).reference.numpy()
    np.testing.assert_allclose(found, problem.answer.reference, rtol=1e-9, atol=1e-9)


@pytest.fixture
def weight() -> DeviceWeight:
    return random_weight(
        Shape(n=64, k=256), scheme="w3a16", group_size=128, device=torch.device("cpu"), seed=3
    )


def test_a_random_weight_uses_every_code_and_every_zero_point(weight: DeviceWeight) -> None:
    assert weight.zeros is not None
    scales = weight.scales.permute(0, 3, 2, 1).reshape(64, 2).double()
    integers = torch.cat(list(dense_rows(weight))) / scales.repeat_interleave(128, dim=1)
    assert sorted(set(integers.round().int().flatten().tolist())) == list(range(-7, 8))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda y: y * 1.002, "of 576 elements"),
        (lambda y: y.index_fill(1, torch.tensor([40]), 0), "y["),
        (lambda y: y.index_fill(1, torch.tensor([40]), torch.nan), "9 of 576 outputs were not"),
        (lambda y: y[:, :48], "output has 48 columns, expected 64"),
    ],
)
def test_every_kind_of_fault_is_named(weight: DeviceWeight, spoil: object, words: str) -> None:
    x = torch.randn(9, 256).half()
    answer = expected(x, dense_rows(weight))
    y = answer.reference.half()
    assert wrong_answer(y, answer, TOLERANCE) == ""
    assert words in wrong_answer(spoil(y), answer, TOLERANCE)  # type: ignore[operator]


def test_one_bit_of_one_code_is_noticed(weight: DeviceWeight) -> None:
    x = torch.ones(1, 256).half()
    codes = weight.codes.clone()
    codes[2, 1, 17] ^= 1 << 5
    answer = expected(x, dense_rows(replace(weight, codes=codes)))
    y = expected(x, dense_rows(weight)).reference.half()
    assert wrong_answer(y, answer, TOLERANCE)


def test_of_many_rows_the_first_and_the_last_are_compared() -> None:
    assert compared_rows(8) == list(range(8))
    rows = compared_rows(4096)
    assert (len(rows), rows[0], rows[-1]) == (MOST_ROWS, 0, 4095)
