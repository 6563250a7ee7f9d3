"""MBQ's search from balanced statistics, then error feedback with what held-out samples choose."""

from mbq_export.calibrate.methods.mbq import METHOD as MBQ
from mbq_export.calibrate.methods.mbq_plus import METHOD


def test_the_search_is_that_of_mbq_but_for_its_statistic_and_reach() -> None:
    found, known = METHOD.switches.resolved(), MBQ.switches.resolved()
    changed = {name for name, value in known.items() if found[name] != value}
    assert changed == {"method", "stat", "gqa_o_scale", "rounding"}
    assert (METHOD.switches.stat, METHOD.switches.gqa_o_scale) == ("balanced", True)
    assert METHOD.scales is MBQ.scales
    assert METHOD.balanced


def test_held_out_samples_choose_hessian_and_target() -> None:
    found = METHOD.switches
    assert (found.rounding, found.hessian, found.asym) == ("gptq", "auto", "auto")
    assert (found.gptq_prefix, found.damp) == ("quantized", 0.01)
