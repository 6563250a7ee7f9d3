"""Widths by name: which linears a pattern means, and what cannot be asked for."""

from pathlib import Path

import pytest

from mbq_export.errors import UsageError
from mbq_export.families import FAMILIES
from mbq_export.quantize.widths import MixedBits, fixed_bits
from mbq_export.schemes import SCHEMES

FAMILY = FAMILIES["llava_onevision"]


def fixed(*patterns: tuple[str, int]) -> dict[tuple[int, str], int]:
    return fixed_bits(MixedBits(patterns=patterns), family=FAMILY, layers=2)


def test_a_pattern_may_begin_at_any_dot() -> None:
    assert fixed(("mlp.down_proj", 4)) == {(0, "down"): 4, (1, "down"): 4}
    assert fixed(("model.language_model.layers.1.self_attn.o_proj", 4)) == {(1, "o"): 4}
    assert fixed(("layers.0.*", 4)) == {(0, unit): 4 for unit in ("qkv", "o", "gate_up", "down")}


def test_the_last_of_several_patterns_counts() -> None:
    assert fixed(("*", 4), ("layers.1.*", 3)) == {
        (layer, unit): 4 - layer for layer in (0, 1) for unit in ("qkv", "o", "gate_up", "down")
    }


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--bits layers\.7\.\*=4 matches no linear") as caught:
        fixed(("layers.7.*", 4))
    assert caught.value.code == "E2001"
    with pytest.raises(UsageError, match="matches no linear"):
        fixed(("down_pro", 4))


def test_a_part_of_a_unit_is_refused_by_the_name_of_the_unit() -> None:
    with pytest.raises(UsageError, match="Unit qkv of layer 0 would have several widths") as caught:
        fixed(("v_proj", 4))
    assert caught.value.code == "E2006"
    assert "self_attn.v_proj 4" in caught.value.message
    with pytest.raises(UsageError, match="Unit gate_up of layer 0"):
        fixed(("gate_proj", 4), ("up_proj", 3))


@pytest.mark.parametrize(
    ("mixed", "scheme", "code", "told"),
    [
        (MixedBits(avg_bits=3.3, bytes_budget=9), "w3a16", "E2002", "contradicts --bytes-budget"),
        (MixedBits(latency_table=Path("t")), "w3a16", "E2002", "does not go without --avg-bits"),
        (MixedBits(avg_bits=3.3), "w4a16", "E2002", "contradicts 4 bits"),
        (MixedBits(avg_bits=3.3), "w4a8", "E2002", "does not go with --scheme w4a8"),
        (MixedBits(bytes_budget=9), None, "E2002", "does not go with --wbits 16"),
        (MixedBits(avg_bits=2.9), "w3a16", "E2003", "--avg-bits 2.9 is out of range"),
        (MixedBits(avg_bits=4.01), "w3a16", "E2003", "--avg-bits 4.01 is out of range"),
        (MixedBits(patterns=(("*", 8),)), "w3a16", "E2005", "no width that can be mixed"),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    mixed: MixedBits, scheme: str | None, code: str, told: str
) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        mixed.check(None if scheme is None else SCHEMES[scheme], 128)
    assert caught.value.code == code


def test_nothing_asked_for_is_never_refused() -> None:
    MixedBits().check(None, 0)
    assert not MixedBits().asked
