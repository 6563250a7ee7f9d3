"""Choosing tokens, with numbers a pencil can check."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbq_export.errors import GateError, UsageError
from mbq_export.runtime.sampling import Options, Sampler, check_finite, collapse, nucleus


def test_greedy_takes_the_largest_and_of_equals_the_first() -> None:
    assert Sampler(Options()).choose(np.array([1.0, 3.0, 3.0, 2.0])) == 1


def test_nucleus_keeps_the_fewest_tokens_that_reach_the_mass() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.3, 0.1]))
    np.testing.assert_allclose(nucleus(logits, 1.0, 0.6), [0, 0.625, 0.375, 0])
    np.testing.assert_allclose(nucleus(logits, 1.0, 0.5), [0, 1, 0, 0])
    np.testing.assert_allclose(nucleus(logits, 1.0, 1.0), [0.1, 0.5, 0.3, 0.1])


def test_temperature_is_the_exponent_of_the_odds() -> None:
    logits = np.log(np.array([0.2, 0.8]))
    odds = nucleus(logits, 0.5, 1.0)
    assert odds[1] / odds[0] == pytest.approx((0.8 / 0.2) ** 2)


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others() -> None:
    logits = np.zeros(1000, np.float32)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(Options(temperature=1.0, seed=seed))
        return [sampler.choose(logits) for _ in range(8)]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(Options(temperature=1.0))
    logits = np.log(np.array([0.25, 0.75]))
    ones = sum(sampler.choose(logits) for _ in range(2000))
    assert 1400 < ones < 1600  # 1500 +- 5 standard deviations


@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=40), st.floats(0.01, 1), st.floats(0.05, 5)
)
def test_nucleus_is_a_distribution_that_holds_the_mass(
    logits: list[float], top_p: float, temperature: float
) -> None:
    full = nucleus(np.array(logits), temperature, 1.0)
    kept = nucleus(np.array(logits), temperature, top_p)
    assert kept.sum() == pytest.approx(1)
    assert full[kept > 0].sum() >= top_p - 1e-9
    assert kept.argmax() == full.argmax()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_stop_everything(bad: float) -> None:
    with pytest.raises(GateError, match=r"1 of 3 logits are NaN or infinite") as caught:
        Sampler(Options()).choose(np.array([0.0, bad, 1.0], np.float32))
    assert caught.value.code == "E1103"
    check_finite(np.zeros(3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.5}, "--top-p 1.5"),
        ({"stop": ("a", "")}, "--stop ''"),
    ],
)
def test_an_option_out_of_range_is_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        Options(**options)  # type: ignore[arg-type]
    assert caught.value.code == "E2017"


def test_one_token_collapses_after_24_in_a_row() -> None:
    assert collapse([9] + [5] * 23) == ""
    assert collapse([9] + [5] * 24) == "one token 24 times in a row"


@pytest.mark.parametrize("width", range(2, 9))
def test_an_ngram_collapses_after_six_in_a_row(width: int) -> None:
    unit = list(range(width))
    assert collapse([99, *unit * 5]) == ""
    assert collapse([99, *unit * 6]) == f"the same {width} tokens 6 times in a row"


def test_nine_tokens_may_repeat_and_so_may_a_list() -> None:
    assert collapse(list(range(9)) * 6) == ""
    assert collapse([1, 2, 3, 9, 1, 2, 4, 9, 1, 2, 5, 9]) == ""
