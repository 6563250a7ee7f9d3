"""The form of the decoder that fits a number format and a target best."""

import pytest

from mbq_export.errors import UsageError
from mbq_export.export import GraphForm, check_forms
from mbq_export.export.fitting import PREFERRED, fitting_lowering
from mbq_export.export.lowerings import LOWERINGS
from mbq_export.export.record import TARGETS
from tests.export import decoders


def test_every_target_prefers_some_that_exist() -> None:
    assert set(PREFERRED) == set(TARGETS)
    for names in PREFERRED.values():
        assert set(names) <= set(LOWERINGS.members())


@pytest.mark.parametrize(
    ("scheme", "group_size", "target", "name"),
    [
        ("w3a16", 128, "trt", "plugin"),
        ("w4a16", 128, "ort", "qdq"),
        ("none", 0, "trt", "qdq"),
        ("none", 0, "ort", "qdq"),
        ("w4a8", 0, "trt", "plugin"),
        ("w4a8", 128, "trt", "plugin"),
        ("w4a8", 128, "ort", "reference"),
        ("w8a8", 0, "trt", "qdq"),
        ("w8a8", 0, "ort", "qdq"),
        ("w8a16", 0, "trt", "qdq"),
    ],
)
def test_the_best_form_is_the_first_that_holds_the_format(
    scheme: str, group_size: int, target: str, name: str
) -> None:
    found = fitting_lowering(PREFERRED[target], scheme=scheme, group_size=group_size, target=target)
    assert found == name


def test_where_no_form_fits_the_last_one_says_why() -> None:
    names = ("plugin",)
    assert fitting_lowering(names, scheme="w3a16", group_size=128, target="ort") == "plugin"
    with pytest.raises(UsageError, match="ONNX Runtime has no plugins"):
        check_forms(decoders.checkpoint(), (GraphForm(lowering="plugin"),), longest=512)
