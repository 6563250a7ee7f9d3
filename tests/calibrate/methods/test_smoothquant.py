"""A baseline without a search: extremes of all tokens, inputs of norms only."""

from mbq_export.calibrate.extremes import even_out
from mbq_export.calibrate.methods.smoothquant import METHOD


def test_it_looks_at_extremes_and_weighs_no_class() -> None:
    assert METHOD.scales is even_out
    assert METHOD.switches.stat == "max"
    assert not METHOD.balanced
    assert not METHOD.needs_ratios(METHOD.switches)
