"""Which op level a graph gets, and which are refused."""

import onnx
import pytest

from mbq_export.errors import UsageError
from mbq_export.export.ops import LARGEST_OPSET
from mbq_export.export.profile import PROFILES, profile_for
from mbq_export.export.record import GraphForm


def test_a_growing_cache_takes_the_lower_level() -> None:
    assert profile_for(GraphForm()).opset == 23


def test_a_static_cache_takes_the_level_with_tensor_scatter() -> None:
    profile = profile_for(GraphForm(kv="static"))
    assert (profile.opset, "TensorScatter" in profile.ops) == (24, True)


def test_a_level_that_is_asked_for_is_taken() -> None:
    assert profile_for(GraphForm(op_level="opset24")).opset == 24


def test_a_level_without_the_cache_says_which_operator_is_missing() -> None:
    with pytest.raises(UsageError) as caught:
        profile_for(GraphForm(kv="static", op_level="opset23"))
    assert str(caught.value) == (
        "MBQ-E2002: Op level opset23 has no static cache.\n"
        "  why     a static cache needs TensorScatter, which is new in opset 24\n"
        "  fix     --op-level auto\n"
        "  fix     use the concat cache"
    )


@pytest.mark.parametrize("level", ["opset20", "opset21"])
def test_levels_of_primitives_are_refused_with_the_reason(level: str) -> None:
    with pytest.raises(UsageError, match=f"Graphs of op level {level} are not written yet"):
        profile_for(GraphForm(op_level=level))


def test_an_unknown_level_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        profile_for(GraphForm(op_level="opset99"))
    assert (caught.value.code, caught.value.why) == ("E2001", "known: auto, opset23, opset24")


def test_every_operator_of_a_level_exists_in_its_opset() -> None:
    for profile in PROFILES.values():
        assert profile.opset <= LARGEST_OPSET
        for op in profile.ops:
            assert onnx.defs.has(op, profile.opset, ""), f"{op} in opset {profile.opset}"
