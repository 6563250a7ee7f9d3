"""Plain rounding has no scales."""

from mbq_export.calibrate.methods.rtn import METHOD


def test_nothing_is_scaled() -> None:
    assert METHOD.scales is None
    assert not METHOD.needs_ratios(METHOD.switches)
