"""The table of configs changes only for a gain that is no noise, and C++ sees what JSON says."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mbq_export.errors import FormatError, MachineError
from mbq_kernels.bench.shapes import Shape
from mbq_kernels.bench.tune import merged, tune
from mbq_kernels.bench.tuning_table import (
    BUCKETS,
    FOLDER,
    SCHEMA,
    Candidate,
    check_table,
    choose,
    inc_text,
    read_tables,
)
from tests.kernels.emulated import ROOT
from tests.kernels.emulated_linear import Emulator
from tests.kernels.fake_clock import FakeClock, fake_rig


def candidates(*timed: tuple[int, float, float]) -> list[Candidate]:
    return [Candidate(config=c, median_us=us, spread_percent=spread) for c, us, spread in timed]


@pytest.mark.parametrize(
    ("held", "other", "chosen"),
    [
        ((1, 10.0, 0.5), (2, 9.0, 0.5), 2),  # 11 % faster
        ((1, 10.0, 0.5), (2, 9.85, 0.5), 1),  # 1.5 %: too little
        ((1, 10.0, 0.5), (2, 9.5, 6.0), 1),  # 5.3 %, less than its own spread
        ((1, 10.0, 6.0), (2, 9.5, 0.5), 1),  # less than the spread of the one in use
        ((1, 10.0, 0.5), (2, 11.0, 0.5), 1),
    ],
)
def test_a_config_gives_way_only_to_a_gain_beyond_2_percent_and_every_spread(
    held: tuple[int, float, float], other: tuple[int, float, float], chosen: int
) -> None:
    found, gain = choose(candidates(held, other), current=1)
    assert found.config == chosen
    assert (gain > 0) is (chosen != 1)


def test_buckets_follow_each_other_without_gap() -> None:
    assert BUCKETS[0][0] == 1
    assert all(high + 1 == low for (_, high), (low, _) in pairwise(BUCKETS))


def entry(**changes: object) -> dict[str, Any]:
    base = {
        "scheme": "w3a16",
        "dtype": "float16",
        "group_size": 128,
        "n": 18944,
        "k": 3584,
        "m_lo": 1,
        "m_hi": 1,
        "config": 17,
        "median_us": 9.9,
        "rule_config": 3,
        "gain_percent": 4.0,
        "spread_percent": 0.4,
    }
    return {**base, **changes}


def table(*entries: dict[str, Any], **changes: object) -> dict[str, Any]:
    base = {"schema": SCHEMA, "sm": 90, "device": "invented", "clocks": {}, "versions": {}}
    return {**base, "entries": list(entries), **changes}


def test_an_entry_becomes_a_row_of_the_header() -> None:
    assert inc_text([table(entry())]).splitlines()[-1] == (
        "{MBQ_W3A16, MBQ_F16, 90, 18944, 3584, 1, 1, 17},"
    )


def test_of_several_group_sizes_the_largest_makes_the_row() -> None:
    text = inc_text([table(entry(group_size=64, config=5), entry())])
    assert text.count("{MBQ_W3A16") == 1
    assert "1, 1, 17}" in text


def test_the_header_in_the_tree_is_made_of_the_tables_in_the_tree() -> None:
    header = (ROOT / "kernels/include/mbq/tuning.inc").read_text()
    rows = [line for line in header.splitlines() if line.startswith("{")]
    made = [line for line in inc_text(read_tables()).splitlines() if line.startswith("{")]
    assert rows == made


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([], "another schema"),
        (table(schema="x"), "another schema"),
        ({k: v for k, v in table().items() if k != "clocks"}, "no clocks"),
        (table(sm=89), "its SM is 89"),
        (table(entry(scheme="w2a16")), "w2a16 in float16 is not known"),
        (table(entry(config=-1)), "no whole number"),
        (table(entry(m_hi=3)), "M 1 to 3 is no bucket"),
        (table({"n": 1}), "an entry has the keys n"),
        (table(entry(), entry()), "not sorted, or one comes twice"),
    ],
)
def test_a_file_that_is_no_table_is_refused_by_what_is_wrong(wrong: object, words: str) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        check_table(wrong, name="sm_90.json")
    assert caught.value.code == "E4102"


def test_tables_are_read_from_a_folder_by_sm(tmp_path: Path) -> None:
    for sm in (120, 89):
        (tmp_path / f"sm_{sm}.json").write_text(json.dumps(table(entry(), sm=sm)))
    assert [found["sm"] for found in read_tables(tmp_path)] == [89, 120]


def test_no_figure_in_the_tree_was_invented() -> None:
    """A table in the tree names the card that it was measured on."""
    assert all(found["device"].startswith("NVIDIA") for found in read_tables(FOLDER))


def test_tuning_needs_a_library() -> None:
    with pytest.raises(MachineError, match="no kernel library to tune") as caught:
        tune(fake_rig(FakeClock([])), [Shape(n=32, k=128)])
    assert caught.value.code == "E3005"


def test_every_legal_config_is_timed_on_the_emulated_kernels_and_the_fastest_kept(
    tmp_path: Path,
) -> None:
    """The times are written down: each config seems a microsecond faster than the one before."""
    library = Emulator.unbroken().library
    clock = FakeClock([1000.0 - i for i in range(500)])
    rig = fake_rig(clock, library=library)
    entries = tune(
        rig,
        [Shape(n=32, k=256)],
        formats=[("w3a16", 128)],
        dtypes=["float16"],
        buckets=[(1, 1), (9, 16)],
    )
    assert [(e["m_lo"], e["m_hi"]) for e in entries] == [(1, 1), (9, 16)]
    legal = len(clock.recorded)
    assert legal > 4
    for found in entries:
        assert found["config"] == found["rule_config"] or found["gain_percent"] > 2
    made = merged(rig, entries, tmp_path)
    assert check_table(made, name="sm_90.json")["entries"] == entries
