"""Feedback against its textbook, and what must hold for any weight and any inputs."""

import pytest
import torch
from torch import Tensor

from mbq_export.errors import GateError
from mbq_export.quantize import gptq
from mbq_export.quantize.gptq import (
    Factor,
    factorise,
    feed_back,
    retarget,
    round_linear,
    weighted_square,
)
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.affine import Codes, dequantize, quantize
from mbq_export.schemes.base import CHANNEL
from tests.reference import feedback as reference

FORMATS = [
    (name, size)
    for name in ("w3a16", "w4a16", "w4a8", "w8a8", "w6a6", "w2a16")
    for size in SCHEMES[name].group_sizes
]
FACTOR_RELATIVE = 1e-9
"""float64 products over a few hundred columns of a damped matrix."""
FLOAT32_RELATIVE = 1e-6
"""A retargeted weight is float32."""


def rows_of(seed: int, columns: int, *, tokens: int = 400) -> Tensor:
    """Correlated inputs, channels of different sizes: what makes feedback worth its while."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    return mixed * torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]


def weight_of(seed: int, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed))


def kind_of(scheme: str, group_size: int) -> reference.Format:
    found = SCHEMES[scheme]
    return reference.Format(
        bits=found.weight_bits, symmetric=found.symmetric, group_size=group_size
    )


def assert_textbook(weight: Tensor, hessian: Tensor, scheme: str, group_size: int) -> None:
    factor = factorise(hessian, damp=0.01)
    found = feed_back(weight, factor, scheme=SCHEMES[scheme], group_size=group_size)
    wanted = reference.feed_back(weight, hessian, kind_of(scheme, group_size))
    assert torch.equal(dequantize(found), wanted)


@pytest.mark.parametrize(("scheme", "group_size"), FORMATS)
@pytest.mark.parametrize("groups", [1, 3])
def test_codes_are_those_of_the_textbook(scheme: str, group_size: int, groups: int) -> None:
    """Three groups of 32 are no whole slab, of 64 one and a half, of 128 three."""
    columns = (group_size or 48) * groups
    rows = rows_of(groups, columns)
    assert_textbook(weight_of(groups, 5, columns), rows.T @ rows, scheme, group_size)


@pytest.mark.parametrize(("scheme", "group_size"), [("w3a16", 32), ("w4a8", CHANNEL)])
def test_a_row_longer_than_a_slab_that_ends_inside_one_is_the_textbooks(
    scheme: str, group_size: int
) -> None:
    rows = rows_of(9, 160)
    assert_textbook(weight_of(9, 4, 160), rows.T @ rows, scheme, group_size)


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_fewer_tokens_than_columns_are_enough(scheme: str) -> None:
    rows = rows_of(2, 128, tokens=16)
    assert_textbook(weight_of(2, 4, 128), rows.T @ rows, scheme, 128)


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_columns_that_see_nothing_round_to_zero_and_disturb_nobody(scheme: str) -> None:
    rows = rows_of(3, 128)
    rows[:, [0, 5, 64, 127]] = 0.0
    hessian, weight = rows.T @ rows, weight_of(3, 4, 128)
    assert_textbook(weight, hessian, scheme, 128)
    factor = factorise(hessian, damp=0.01)
    found = dequantize(feed_back(weight, factor, scheme=SCHEMES[scheme], group_size=128))
    assert factor.dead.nonzero()[:, 0].tolist() == [0, 5, 64, 127]
    assert not found[:, factor.dead].any()


def test_no_column_that_sees_anything_leaves_zeros() -> None:
    factor = factorise(torch.zeros(32, 32), damp=0.01)
    found = feed_back(weight_of(0, 3, 32), factor, scheme=SCHEMES["w3a16"], group_size=32)
    assert not dequantize(found).any()


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_huge_outliers_are_the_textbooks(scheme: str) -> None:
    rows, weight = rows_of(4, 128), weight_of(4, 4, 128)
    rows[:, 7] *= 1e4
    weight[1, 90] = 500.0
    assert_textbook(weight, rows.T @ rows, scheme, 128)


def example(first: float, second: float) -> tuple[Tensor, Tensor]:
    """Two columns that belong together, and 30 whole numbers that fix the grid of w4a16 at step 1."""
    weight = torch.zeros(1, 32)
    weight[0, :2] = torch.tensor([first, second])
    weight[0, 31] = 15.0
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 0.5
    return weight, hessian


def test_one_columns_error_moves_the_next() -> None:
    """Golden G1: .6 rounds to 1, which moves the other .6 to .4 and that to 0."""
    weight, hessian = example(0.6, 0.6)
    scheme = SCHEMES["w4a16"]
    found = feed_back(weight, factorise(hessian, damp=0.0), scheme=scheme, group_size=32)
    nearest = quantize(weight, scheme=scheme, group_size=32)
    assert found.codes[0, :2].tolist() == [1, 0]
    assert nearest.codes[0, :2].tolist() == [1, 1]
    assert weighted_square(dequantize(found) - weight, hessian) == pytest.approx(0.28)
    assert weighted_square(dequantize(nearest) - weight, hessian) == pytest.approx(0.48)


@pytest.mark.parametrize(("scheme", "group_size"), FORMATS)
def test_columns_that_do_not_know_each_other_round_to_the_nearest(
    scheme: str, group_size: int
) -> None:
    """Golden G2: H = c I."""
    columns = 2 * (group_size or 96)
    weight = weight_of(7, 9, columns)
    factor = factorise(3.0 * torch.eye(columns), damp=0.01)
    found = feed_back(weight, factor, scheme=SCHEMES[scheme], group_size=group_size)
    assert_same(found, quantize(weight, scheme=SCHEMES[scheme], group_size=group_size))


def test_the_size_of_inputs_does_not_matter() -> None:
    """Golden G4: damping is relative; a dead column must not change that."""
    rows, weight = rows_of(8, 64), weight_of(8, 6, 64)
    rows[:, 3] = 0.0
    small, large = (
        feed_back(
            weight,
            factorise(factor * (rows.T @ rows).double(), damp=0.01),
            scheme=SCHEMES["w3a16"],
            group_size=64,
        )
        for factor in (1.0, 1e3)
    )
    assert_same(small, large)


def test_a_single_weight_is_doubled_where_its_input_was_halved() -> None:
    """Golden A1: x~ = [2, 2], x = [1, 1]."""
    weight, factor = torch.tensor([[0.75]]), factorise(torch.tensor([[2.0]]), damp=0.0)
    shift = torch.tensor([[2.0]])
    assert retarget(weight, shift, factor, rho=1.0).item() == 1.5
    assert retarget(weight, shift, factor, rho=0.0).item() == 0.75
    assert retarget(weight, torch.zeros(1, 1), factor, rho=1.0).item() == 0.75


@pytest.mark.parametrize("rho", [0.25, 1.0])
def test_a_moved_weight_is_the_textbooks(rho: float) -> None:
    rows, weight = rows_of(11, 48), weight_of(11, 6, 48)
    wanted = rows + 0.2 * rows_of(12, 48)
    shift = (wanted - rows).T @ rows
    found = retarget(weight, shift, factorise(rows.T @ rows, damp=0.01), rho=rho)
    by_hand = reference.retargeted(weight, rows, wanted, rho, damp=0.01)
    # Gram matrices of the test are float32 sums over 400 tokens, of channels 100 times apart.
    assert float((found - by_hand).norm() / by_hand.norm()) < 1e-3


def test_a_moved_weight_solves_least_squares() -> None:
    """Without damping no other weight makes of the inputs what the old one made of the wanted ones."""
    rows, weight = rows_of(13, 24).double(), weight_of(13, 5, 24).double()
    wanted = rows + rows_of(14, 24).double()
    best = torch.linalg.lstsq(rows, wanted @ weight.T).solution.T
    found = retarget(weight, (wanted - rows).T @ rows, factorise(rows.T @ rows, damp=0.0), rho=1.0)
    assert float((found - best).norm() / best.norm()) < FLOAT32_RELATIVE


@pytest.mark.parametrize("columns", [1, 32, 200])
def test_the_factor_is_that_of_the_inverse(columns: int) -> None:
    rows = rows_of(15, columns).double()
    hessian = rows.T @ rows
    factor = factorise(hessian, damp=0.01)
    assert torch.equal(factor.upper, factor.upper.triu())
    unit = factor.upper.T @ factor.upper @ reference.damped(hessian, 0.01)
    assert float((unit - torch.eye(columns)).abs().max()) < FACTOR_RELATIVE * columns
    assert factor.damp == 0.01


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("scheme", "group_size"), [("w3a16", 32), ("w4a8", CHANNEL)])
def test_what_is_kept_is_never_worse_than_nearest(scheme: str, group_size: int, seed: int) -> None:
    rows, weight = rows_of(20 + seed, 64, tokens=20 + 40 * seed), weight_of(seed, 6, 64)
    hessian = rows.T @ rows
    found = round_linear(
        weight,
        hessian,
        factorise(hessian, damp=0.01),
        scheme=SCHEMES[scheme],
        group_size=group_size,
    )
    assert found.kept <= found.nearest
    assert found.rounding == "gptq"
    change = dequantize(found.codes).double() - weight.double()
    size = weighted_square(weight.double(), hessian.double())
    assert weighted_square(change, hessian.double()) / size == pytest.approx(found.kept)


def test_feedback_that_makes_it_worse_is_not_kept() -> None:
    """A factor of other inputs steers the errors where they hurt."""
    rows, other, weight = rows_of(30, 64), rows_of(31, 64), weight_of(30, 6, 64)
    found = round_linear(
        weight,
        rows.T @ rows,
        factorise(other.T @ other, damp=1e-6),
        scheme=SCHEMES["w3a16"],
        group_size=64,
    )
    assert (found.rounding, found.why) == ("nearest", "gptq-worse")
    assert found.kept == found.nearest
    assert_same(found.codes, quantize(weight, scheme=SCHEMES["w3a16"], group_size=64))


def test_feedback_beyond_the_range_of_a_scale_is_not_kept() -> None:
    weight = torch.full((1, 64), 1000.0)
    weight[0, ::2] = -999.0
    factor = Factor(
        upper=torch.eye(64, dtype=torch.float64) + 1e4 * torch.ones(64, 64).double().triu(1),
        dead=torch.zeros(64, dtype=torch.bool),
        damp=0.01,
    )
    found = round_linear(weight, torch.eye(64), factor, scheme=SCHEMES["w3a16"], group_size=32)
    assert (found.rounding, found.why) == ("nearest", "gptq-overflow")


def test_a_matrix_without_a_factor_is_damped_more() -> None:
    rows = torch.ones(3, 16)
    factor = factorise(rows.T @ rows, damp=0.0)
    assert factor.damp == gptq.LEAST_RETRY
    assert bool(torch.isfinite(factor.upper).all())


def test_a_matrix_that_never_has_a_factor_is_refused_with_what_was_tried() -> None:
    hessian = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    with pytest.raises(GateError, match="2 columns has no Cholesky factor") as caught:
        factorise(hessian, damp=0.001)
    assert caught.value.code == "E1110"
    assert caught.value.why == "tried with up to 1 of its mean diagonal added"
    assert caught.value.fix[0] == "--damp 10"


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    with pytest.raises(GateError, match="4 entries of a Hessian are not finite") as caught:
        factorise(torch.full((2, 2), float("nan")), damp=0.01)
    assert caught.value.code == "E1103"


def test_the_weight_itself_is_not_changed() -> None:
    rows, weight = rows_of(1, 64), weight_of(1, 3, 64)
    before = weight.clone()
    factor = factorise(rows.T @ rows, damp=0.01)
    feed_back(weight.double(), factor, scheme=SCHEMES["w3a16"], group_size=64)
    wide = weight.double()
    kept = wide.clone()
    feed_back(wide, factor, scheme=SCHEMES["w3a16"], group_size=64)
    assert torch.equal(wide, kept)
    assert torch.equal(weight, before)


def assert_same(found: Codes, wanted: Codes) -> None:
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.scales, wanted.scales)
    assert torch.equal(found.zeros, wanted.zeros)
    assert found.clamped == wanted.clamped
    assert found.scales.dtype == wanted.scales.dtype
