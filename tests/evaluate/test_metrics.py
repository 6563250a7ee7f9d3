"""Every number here can be checked with a pencil."""

import numpy as np
import pytest

from mbq_export.evaluate.metrics import (
    agreement,
    column_errors,
    cosines,
    divergences,
    log_probabilities,
    margins,
    norm_ratios,
    relative_errors,
    top_overlap,
    wilson,
    worst_high,
    worst_low,
)

A = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], np.float32)
B = np.array([[6.0, 8.0], [0.0, 2.0], [0.0, 0.0], [1.0, 0.0]], np.float32)


def test_cosine_is_blind_to_length() -> None:
    assert cosines(A, B).tolist() == pytest.approx([1.0, 0.0, 1.0, 0.0])


def test_norm_ratio_is_blind_to_direction() -> None:
    assert norm_ratios(A, B).tolist() == [2.0, 2.0, 1.0, np.inf]


def test_relative_error_sees_both() -> None:
    assert relative_errors(A, B).tolist() == pytest.approx([1.0, 5**0.5, 0.0, np.inf])


def test_cosine_of_not_a_number_is_not_a_number() -> None:
    assert np.isnan(cosines(A, np.full_like(B, np.nan))[0])


def test_column_error_is_counted_in_units_of_the_sum() -> None:
    # y = 3 * 1 + 4 * 1 = 7 and the size of the sum is max(5, 7): an error of 0.7 is a tenth of it.
    errors, positions = column_errors(
        np.array([[0.0, 0.0], [3.0, 4.0]]), np.ones((1, 2)), np.array([[0.0], [7.7]])
    )
    assert errors.tolist() == pytest.approx([0.1])
    assert positions.tolist() == [1]


def test_column_error_survives_cancellation() -> None:
    # y = 3 - 3 = 0: an absolute error of 1e-7 is small beside the products, not beside y.
    errors, _ = column_errors(np.array([[3.0, 3.0]]), np.array([[1.0, -1.0]]), np.array([[1e-7]]))
    assert errors[0] == pytest.approx(1e-7 / 18**0.5)


def test_column_error_adds_the_bias() -> None:
    errors, _ = column_errors(
        np.array([[1.0]]), np.array([[2.0]]), np.array([[5.0]]), bias=np.array([3.0])
    )
    assert errors.tolist() == [0.0]


def test_column_error_of_a_column_that_is_not_finite_is_infinite() -> None:
    errors, _ = column_errors(np.ones((1, 1)), np.ones((2, 1)), np.array([[np.nan, 1.0]]))
    assert errors.tolist() == [np.inf, 0.0]


@pytest.mark.parametrize("groups", [2, 6, 148])
def test_column_error_shows_one_scale_that_is_ten_percent_off(groups: int) -> None:
    random = np.random.default_rng(groups)
    x = random.normal(size=(64, groups * 128)).astype(np.float32)
    w = random.normal(size=(8, groups * 128))
    wrong = w.copy()
    wrong[5, 128:256] *= 1.1
    errors, _ = column_errors(x, w, (x @ wrong.T.astype(np.float32)))
    assert errors.argmax() == 5
    assert errors[5] > 1e-2
    assert np.delete(errors, 5).max() < 1e-5


def test_log_probabilities_do_not_overflow() -> None:
    assert log_probabilities(np.array([[1e4, 1e4]]))[0] == pytest.approx(-np.log(2))


def test_divergence_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 ln 2 + 1/2 ln (2/3).
    found = divergences(np.zeros((1, 2)), np.log(np.array([[0.25, 0.75]])))
    assert found[0] == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))


def test_divergence_from_itself_is_zero_and_never_negative() -> None:
    logits = np.random.default_rng(0).normal(size=(100, 50)) * 10
    assert (divergences(logits, logits) == 0).all()
    assert (divergences(logits, logits + 1e-9) >= 0).all()


def test_top_overlap_ignores_order() -> None:
    a, b = np.array([[4.0, 3.0, 2.0, 1.0]]), np.array([[3.0, 4.0, 1.0, 2.0]])
    assert top_overlap(a, b, k=2).tolist() == [1.0]
    assert top_overlap(a, b, k=3).tolist() == pytest.approx([2 / 3])


def test_agreement_sets_apart_what_the_reference_cannot_tell() -> None:
    reference = np.array([[1.0, 0.0], [1.0, 0.99], [1.0, 0.0]])
    tested = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = agreement(reference, tested, noise=0.05)
    assert (found.same, found.ties, found.different) == (1, 1, 1)
    assert found.rate == 0.5


def test_agreement_of_ties_alone_is_complete() -> None:
    assert agreement(np.zeros((1, 2)), np.array([[0.0, 1.0]])).rate == 1.0


def test_margin_is_the_lead_of_the_first() -> None:
    assert margins(np.array([[1.0, 5.0, 3.0]])).tolist() == [2.0]


def test_worst_share_of_few_positions_is_the_worst_position() -> None:
    values = np.arange(50.0)
    assert (worst_low(values), worst_high(values)) == (0.0, 49.0)


def test_worst_share_of_many_positions_leaves_one_percent_out() -> None:
    values = np.arange(1001.0)
    assert (worst_low(values), worst_high(values)) == (10.0, 990.0)


def test_wilson_interval_of_the_protocol() -> None:
    # n = 2000, p = 0.7 gives about 2.0 points to each side.
    low, high = wilson(1400, 2000)
    assert (low, high) == pytest.approx((0.6795, 0.7197), abs=1e-4)


def test_wilson_interval_stays_inside_and_is_not_empty_at_the_ends() -> None:
    assert wilson(0, 10)[0] == 0.0
    assert wilson(0, 10)[1] == pytest.approx(0.2775, abs=1e-4)
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    assert wilson(0, 0) == (0.0, 1.0)
