"""Widths as users type them."""

from pathlib import Path

import pytest
import typer

from mbq_export.commands.width_options import mixed_bits
from mbq_export.quantize.widths import MixedBits


def read(**typed: object) -> MixedBits:
    nothing = {"avg_bits": None, "bits": None, "bytes_budget": None, "latency_table": None}
    return mixed_bits(**{**nothing, **typed})


def test_nothing_typed_asks_for_nothing() -> None:
    assert read() == MixedBits()


def test_a_pattern_ends_at_the_last_equals_sign() -> None:
    found = read(bits=["layers.0.*=4", "a=b=3"]).patterns
    assert found == (("layers.0.*", 4), ("a=b", 3))


@pytest.mark.parametrize("text", ["layers.0.*", "=4", "down_proj=four", "down_proj="])
def test_a_pattern_without_a_number_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not PATTERN=N"):
        read(bits=[text])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("12MiB", 12 << 20),
        ("1.5 kB", 1500),
        ("2GB", 2_000_000_000),
        ("3Gi", 3 << 30),
    ],
)
def test_sizes_are_decimal_or_binary_as_their_unit_says(text: str, size: int) -> None:
    assert read(bytes_budget=text).bytes_budget == size


@pytest.mark.parametrize("text", ["many", "-1", "1.2.3", "5 apples", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no size"):
        read(bytes_budget=text)


def test_a_table_and_an_average_are_taken_as_they_are() -> None:
    found = read(avg_bits=3.3, latency_table=Path("t.json"))
    assert (found.avg_bits, found.latency_table) == (3.3, Path("t.json"))
