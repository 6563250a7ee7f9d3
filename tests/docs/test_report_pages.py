"""Pages of single reports are made from the data beside them, and say the ratios that the data hold."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from docs.benchmarks import footprint_page, language_page

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
PAGES = {"footprint": footprint_page.page, "language": language_page.page}


@pytest.mark.parametrize("name", [name for name in PAGES if (FOLDER / f"{name}.json").exists()])
def test_page_is_made_from_the_data_beside_it(name: str) -> None:
    page: Callable[[Mapping[str, Any]], str] = PAGES[name]
    document = json.loads((FOLDER / f"{name}.json").read_text())
    assert (FOLDER / f"{name}.md").read_text() == page(document)


def test_ratios_above_one_are_ours_being_smaller_or_faster() -> None:
    document = json.loads((FOLDER / "footprint.json").read_text())
    for _, full, ours, ratio, _ in footprint_page.rows(document):
        larger = float(full.split()[0]) / float(ours.split()[0])
        # Ratios of times are medians of pairs, not of medians; they agree on the side of 1 where it is clear.
        if abs(larger - 1) > 0.2:
            assert (float(ratio.split()[0]) > 1) == (larger > 1)


def test_linears_of_three_bits_take_the_bytes_that_the_format_says() -> None:
    document = json.loads((FOLDER / "footprint.json").read_text())
    full, ours = (document["bundles"][name]["linears_bytes"] for name in ("full", "ours"))
    # 3 bits, and fp16 scale and one-byte zero point per 128.
    assert ours / full == pytest.approx((3 + (16 + 8) / 128) / 16, rel=1e-3)
