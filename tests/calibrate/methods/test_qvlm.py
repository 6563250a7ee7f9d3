"""MBQ's search, then ranges that halves of blocks choose together."""

from mbq_export.calibrate.methods.mbq import METHOD as MBQ
from mbq_export.calibrate.methods.qvlm import METHOD


def test_it_is_mbq_with_another_scope() -> None:
    found, known = METHOD.switches.resolved(), MBQ.switches.resolved()
    assert {name for name, value in known.items() if found[name] != value} == {"method"}
    assert set(found) - set(known) == {"search_scope", "qvlm_measure", "search_alpha"}
    assert (METHOD.switches.search_scope, METHOD.switches.rounding) == ("block", "nearest")
    assert METHOD.scales is MBQ.scales
    assert METHOD.balanced


def test_its_ratios_weigh_the_joint_error_too() -> None:
    assert METHOD.needs_ratios(METHOD.switches)
    assert METHOD.switches.looks_at_data
