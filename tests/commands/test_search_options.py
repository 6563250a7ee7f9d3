"""What a user types of the search, read."""

from dataclasses import fields
from inspect import signature
from typing import Any

import pytest
import typer

from mbq_export.channel_scales import Switches
from mbq_export.commands import build, calibrate
from mbq_export.commands.search_options import switches

LEFT_OUT: dict[str, Any] = {"r_floor": None, "tokens": None, "modality_weight": None, "stat": None}


def test_options_left_out_are_no_choices() -> None:
    assert switches(**LEFT_OUT) == {}
    assert switches(**{**LEFT_OUT, "modality_weight": "auto"}) == {}


def test_words_stay_words_and_numbers_become_numbers() -> None:
    found = switches(r_floor="0.1", tokens="64", modality_weight="0.2", stat="answer", loss="mse")
    assert found == {
        "r_floor": 0.1,
        "tokens": 64,
        "modality_weight": 0.2,
        "stat": "answer",
        "loss": "mse",
    }
    found = switches(r_floor="none", tokens="all", modality_weight=None, gqa_o_scale=False)
    assert found == {"r_floor": "none", "tokens": "all", "gqa_o_scale": False}
    assert switches(**{**LEFT_OUT, "r_floor": "median"}) == {"r_floor": "median"}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokens", "6.5", "'6.5' is neither a whole number nor all"),
        ("r_floor", "mean", "'mean' is neither a number nor median, none"),
        ("modality_weight", "measured", "'measured' is neither a number nor auto"),
    ],
)
def test_a_number_that_is_none_is_refused(name: str, text: str, words: str) -> None:
    with pytest.raises(typer.BadParameter, match=words):
        switches(**{**LEFT_OUT, name: text})


@pytest.mark.parametrize("command", [build.command, calibrate.command])
def test_every_switch_has_an_option(command: Any) -> None:
    typed = set(signature(command).parameters)
    assert {field.name for field in fields(Switches)} <= typed
