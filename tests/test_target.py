"""Targets: names, flavours, and who serves whom."""

import pytest

from mbq_export.errors import UsageError
from mbq_export.target import DEVICES, GRAPHS, OP_LEVELS, SERVED, Target


@pytest.mark.parametrize(
    ("text", "sm", "flavour", "op_level"),
    [
        ("rtx4090:rtx", 89, "rtx", 2),
        ("sm86:rtx", 86, "rtx", 2),
        ("sm120:rtx", 120, "rtx", 2),
        ("sm121:rtx", 121, "rtx", 2),
        ("orin", 87, "trt", 0),
        ("orin:trt", 87, "trt", 0),
        ("h100", 90, "trt", 0),
        ("thor", 110, "trt", 0),
        ("cpu", None, "cpu", -1),
    ],
)
def test_name_gives_device_flavour_and_op_level(
    text: str, sm: int | None, flavour: str, op_level: int
) -> None:
    target = Target.parse(text)
    assert (target.sm, target.flavour, target.op_level) == (sm, flavour, op_level)


@pytest.mark.parametrize("text", ["rtx4090:rtx", "orin:trt", "cpu"])
def test_target_reads_what_it_writes(text: str) -> None:
    assert str(Target.parse(text)) == text
    assert Target.parse(str(Target.parse(text))) == Target.parse(text)


def test_folder_is_the_device_not_the_nickname() -> None:
    assert Target.parse("rtx4090:rtx").folder == Target.parse("sm89:rtx").folder == "sm89"


def test_auto_is_the_local_gpu() -> None:
    assert Target.parse("auto:rtx", local_sm=89).sm == 89
    assert str(Target.parse("auto", local_sm=90)) == "sm90:trt"


def test_auto_without_a_gpu_is_cpu() -> None:
    assert Target.parse("auto").flavour == "cpu"
    assert Target.parse("auto:rtx").flavour == "cpu"


@pytest.mark.parametrize("device", ["orin", "sm87", "h100", "sm90", "thor", "sm110"])
def test_device_that_rtx_has_no_code_for_names_the_flavour_that_has(device: str) -> None:
    with pytest.raises(UsageError, match=rf"rtx cannot build engines for {device}") as error:
        Target.parse(f"{device}:rtx")
    assert error.value.code == "E2012"
    assert error.value.fix == (f"--target {device}:trt",)
    assert "sm75, sm80, sm86, sm89, sm120, sm121" in error.value.why


def test_no_nearest_device_is_guessed() -> None:
    with pytest.raises(UsageError, match="Unknown target 'sm88:rtx'") as error:
        Target.parse("sm88:rtx")
    assert error.value.code == "E2001"
    assert "rtx4090" in error.value.why


def test_misspelt_name_gets_a_suggestion() -> None:
    with pytest.raises(UsageError) as error:
        Target.parse("rtx4080")
    assert error.value.fix == ("--target rtx4090",)


@pytest.mark.parametrize("text", ["rtx4090:cuda", "rtx4090:", "cpu:rtx", ":rtx", ""])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as error:
        Target.parse(text)
    assert error.value.code == "E2001"


def test_every_op_level_is_told_in_words() -> None:
    assert {level for each in OP_LEVELS.values() for _, level in each} == set(GRAPHS)


def test_every_served_device_has_a_name() -> None:
    assert SERVED["rtx"] < SERVED["trt"] == frozenset(DEVICES.values())
