"""Which op level a graph gets, and which are refused."""

from dataclasses import replace

import onnx
import pytest

from mbq_export.errors import UsageError
from mbq_export.export.ops import LARGEST_OPSET
from mbq_export.export.parser_ops import read_by
from mbq_export.export.profile import (
    OPSET20,
    OPSET21,
    OPSET23,
    OPSET23_ATTENTION,
    OPSET24,
    PROFILES,
    OpProfile,
    has_static_cache,
    profile_for,
    traced_profile,
)
from mbq_export.export.record import GraphForm
from mbq_export.target import Target


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
        "  fix     --kv concat"
    )


def test_primitives_have_no_static_cache() -> None:
    with pytest.raises(UsageError, match="Op level opset20 has no static cache") as caught:
        profile_for(GraphForm(kv="static", op_level="opset20"))
    assert caught.value.code == "E2002"
    assert [name for name in PROFILES if has_static_cache(name)] == ["opset24"]
    assert has_static_cache("auto")


def test_each_level_is_the_one_that_its_first_version_reads() -> None:
    """The table of targets and that of profiles tell the same."""
    for profile in PROFILES.values():
        target = replace(Target.parse("sm89:trt"), version=profile.first)
        assert target.op_level == profile.level
        major, minor = profile.first
        older = replace(target, version=(major, minor - 1))
        assert older.op_level == profile.level - 1


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_every_operator_of_a_level_is_documented_by_its_first_parser(profile: OpProfile) -> None:
    assert profile.ops <= read_by(profile.first)


def test_shared_graphs_take_the_lowest_level() -> None:
    assert traced_profile([]) is OPSET23
    assert traced_profile([OPSET24]) is OPSET23
    assert traced_profile([OPSET24, OPSET23_ATTENTION]) is OPSET23
    assert traced_profile([OPSET24, OPSET21]) is OPSET20


def test_an_unknown_level_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        profile_for(GraphForm(op_level="opset99"))
    assert caught.value.code == "E2001"
    assert caught.value.why == (
        "known: auto, opset20, opset21, opset23-attention, opset23, opset24"
    )


def test_every_operator_of_a_level_exists_in_its_opset() -> None:
    for profile in PROFILES.values():
        assert profile.opset <= LARGEST_OPSET
        for op in profile.ops:
            assert onnx.defs.has(op, profile.opset, ""), f"{op} in opset {profile.opset}"
