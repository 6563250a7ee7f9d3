"""Error feedback alone: nothing is scaled, no class weighs more."""

from mbq_export.calibrate.methods.gptq import METHOD


def test_nothing_is_scaled_and_all_tokens_weigh_alike() -> None:
    found = METHOD.switches
    assert METHOD.scales is None
    assert (found.rounding, found.hessian, found.asym) == ("gptq", "plain", 0.0)
    assert (found.gptq_prefix, found.damp) == ("quantized", 0.01)
    assert not METHOD.needs_ratios(found)
