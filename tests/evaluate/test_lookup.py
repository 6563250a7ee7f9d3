"""Nothing that a file may hold makes a look into it fail."""

import math
from typing import Any

import pytest

from mbq_export.evaluate.lookup import dig, entries, finding, items, number, texts, words


def test_keys_and_indices_are_followed() -> None:
    assert dig({"a": [{"b": 7}]}, "a", 0, "b") == 7


@pytest.mark.parametrize(
    "keys", [("x",), ("a", 1), ("a", "b"), ("a", 0, "b", "c"), ("a", 0, 0)], ids=str
)
def test_a_way_that_leads_nowhere_finds_nothing(keys: tuple[Any, ...]) -> None:
    assert dig({"a": [{"b": 7}]}, *keys) is None


@pytest.mark.parametrize(
    "value", [None, "1", True, [1], {}, math.nan, math.inf, 1e308, 10**400], ids=str
)
def test_only_finite_numbers_are_numbers(value: Any) -> None:
    assert number(value) is None


def test_findings_may_be_spelt() -> None:
    assert math.isnan(finding("nan") or 0.0)
    assert finding("-inf") == -math.inf
    assert finding(2) == 2.0
    assert finding("2") is None
    assert finding(["nan"]) is None


@pytest.mark.parametrize("value", [None, 1, "text", {"a": 1}], ids=str)
def test_what_is_no_list_has_no_members(value: Any) -> None:
    assert items(value) == []
    assert texts(value) == []


def test_members_of_other_kinds_are_passed_over() -> None:
    assert items([1, {"a": 2}, None]) == [{"a": 2}]
    assert texts([1, {"a": 2}]) == ["1", "a 2"]
    assert entries([1]) == {}


def test_values_are_spelt_for_people() -> None:
    assert words({"torch": "2.13", "exact": True}) == "torch 2.13, exact yes"
    assert words([1, None, "a"]) == "1, , a"
    assert not words(None)
