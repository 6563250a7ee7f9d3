"""The baseline: squared error, every real token alike, 20 points, then clipping for what tokens weigh alike."""

from dataclasses import replace

import pytest
import torch

from mbq_export.calibrate.methods.awq import METHOD
from mbq_export.families.base import ANSWER, PROMPT, VISION
from tests.calibrate.views import moved_on, views
from tests.questions import questions, tiny_model

EVERY = replace(METHOD.switches, tokens="all")


def test_the_preset_is_the_published_search_and_clipping() -> None:
    found = METHOD.switches
    assert (found.loss, found.grid, found.stat, found.clip) == ("mse", "20", "mixed", "group")
    assert METHOD.resolve({"clip": "none"}).clip == "none"
    assert not METHOD.balanced
    assert not found.gqa_o_scale


@pytest.mark.parametrize("kind", [PROMPT, VISION, ANSWER])
def test_an_error_counts_the_same_on_every_class(kind: int) -> None:
    model = tiny_model()
    view = views(model, questions(model, 4), EVERY, balanced=False)["down"]
    assert METHOD.scales is not None
    moved, tokens = moved_on(view, kind, by=1.0), view.statistics.tokens
    before, after = (METHOD.scales(v, EVERY).record["J"]["rtn"] for v in (view, moved))
    assert after - before == pytest.approx(float(tokens[kind] / tokens.sum()), rel=0.1)


def test_no_ratio_changes_the_result() -> None:
    model = tiny_model()
    view = views(model, questions(model, 4), EVERY, balanced=False)["down"]
    assert METHOD.scales is not None
    found = [METHOD.scales(replace(view, r=r), EVERY).scales for r in (0.0, 50.0)]
    assert torch.equal(*found)
