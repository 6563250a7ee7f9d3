"""What a user types of formats and methods, read."""

import pytest
import typer

from mbq_export.commands.number_options import group_size, switches


def test_compat_is_a_switch_only_when_asked_for() -> None:
    assert switches("none") == {}
    assert switches("mbq") == {"compat": "mbq"}


def test_switches_left_out_are_not_chosen() -> None:
    assert switches(rounding=None, hessian="plain", damp=None) == {"hessian": "plain"}


def test_asym_is_auto_or_a_number() -> None:
    assert switches(asym="auto") == {"asym": "auto"}
    assert switches(asym="0.5") == {"asym": 0.5}
    with pytest.raises(typer.BadParameter, match="'half' is neither a number nor auto"):
        switches(asym="half")


def test_a_group_is_a_number_of_columns_or_a_channel() -> None:
    assert [group_size(text) for text in (None, "channel", "64")] == [None, 0, 64]
    for text in ("0", "-1", "x", "6.4"):
        with pytest.raises(typer.BadParameter, match="neither a number of columns nor channel"):
            group_size(text)
