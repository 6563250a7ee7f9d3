"""Every method keeps the promises of a method; presets give way to the user, not to contradictions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbq_export.calibrate.methods import METHODS
from mbq_export.calibrate.methods.base import PUBLISHED, replaced
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.errors import UsageError
from tests.calibrate.views import first_block, job
from tests.questions import questions, tiny_model

NAMES = METHODS.names()


def test_the_methods_are_found_by_their_files() -> None:
    assert NAMES == ("awq", "gptq", "mbq", "mbq+", "qvlm", "rtn", "smoothquant")


@pytest.mark.parametrize("name", NAMES)
def test_a_method_lowers_no_unit_and_repeats_itself(name: str) -> None:
    model, method = tiny_model(), METHODS[name]
    runs = [
        first_block(job(model, method.switches, method), questions(model, 6))[2] for _ in range(2)
    ]
    assert runs[0].units == runs[1].units
    for unit, e in runs[0].scales.items():
        assert torch.equal(e, runs[1].scales[unit])
    for entry in runs[0].units:
        if entry["alpha"] is not None and name != "smoothquant":  # which looks at no objective
            assert entry["J"]["best"] <= entry["J"]["rtn"]


@pytest.mark.parametrize("name", NAMES)
def test_switches_survive_the_artifact(name: str, tmp_path: Path) -> None:
    switches = METHODS[name].resolve({} if name == "qvlm" else {"clip": "group"})
    scales = {"layers.0.qkv.e": np.ones(4, np.float32)}
    ChannelScales(scales=scales, sensitivity={}, calib={"switches": switches.resolved()}).write(
        tmp_path
    )
    assert ChannelScales.read(tmp_path).switches == switches


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_bears_its_name(name: str) -> None:
    assert METHODS[name].switches.method == name
    assert METHODS[name].resolve({}) == METHODS[name].switches


def test_the_users_choices_replace_the_preset() -> None:
    found = METHODS["mbq"].resolve({"stat": "balanced", "gqa_o_scale": True})
    assert (found.stat, found.gqa_o_scale, found.loss) == ("balanced", True, "mae")


def test_compatibility_fixes_what_the_published_code_has() -> None:
    found = METHODS["mbq"].resolve({"compat": "mbq", "loss": "mse"})
    assert found == Switches(method="mbq", compat="mbq", loss="mse", **PUBLISHED)


def test_a_choice_against_compatibility_is_refused() -> None:
    with pytest.raises(UsageError, match="--compat mbq contradicts stat = balanced") as caught:
        METHODS["mbq"].resolve({"compat": "mbq", "stat": "balanced"})
    assert caught.value.code == "E2002"
    assert caught.value.why == "the published code uses stat = mixed"


def test_ratios_are_needed_where_something_is_weighed_by_them() -> None:
    for name, stat, needed in (
        ("mbq", "mixed", True),
        ("awq", "mixed", False),
        ("awq", "balanced", True),
        ("mbq+", "mixed", True),
    ):
        method = METHODS[name]
        assert method.needs_ratios(method.resolve({"stat": stat})) is needed
    for name in ("rtn", "gptq", "smoothquant"):
        assert not METHODS[name].needs_ratios(METHODS[name].switches)


@pytest.mark.parametrize(("hessian", "needed"), [("plain", False), ("auto", True)])
def test_feedback_that_weighs_token_classes_needs_ratios(hessian: str, needed: bool) -> None:
    for name in ("rtn", "gptq", "awq"):
        method = METHODS[name]
        switches = method.resolve({"rounding": "gptq", "hessian": hessian})
        assert method.needs_ratios(switches) is needed


@pytest.mark.parametrize(
    "chosen", [{"hessian": "plain"}, {"gptq_prefix": "fp"}, {"asym": 0.5}, {"damp": 0.1}]
)
def test_a_choice_that_decides_nothing_is_refused(chosen: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="decides nothing here") as caught:
        METHODS["mbq"].resolve(chosen)
    assert caught.value.code == "E2002"
    with pytest.raises(UsageError, match="decides nothing here"):
        METHODS["mbq+"].resolve({"rounding": "nearest", **chosen})
    found = METHODS["mbq"].resolve({"rounding": "gptq", **chosen}).resolved()
    assert {name: found[name] for name in chosen} == chosen


@pytest.mark.parametrize("name", ["rtn", "gptq", "smoothquant"])
@pytest.mark.parametrize(
    ("switch", "value"),
    [
        *(("stat", "answer"), ("loss", "mse"), ("grid", "20"), ("tokens", 64)),
        *(("gqa_o_scale", True), ("prefix", "fp"), ("search_prompt_weight", "measured")),
        *(("r_floor", "none"), ("modality_weight", 0.1)),
    ],
)
def test_a_choice_about_a_search_that_is_not_made_is_refused(
    name: str, switch: str, value: Any
) -> None:
    with pytest.raises(UsageError, match="decides nothing here") as caught:
        METHODS[name].resolve({switch: value})
    assert caught.value.code == "E2002"
    assert str(caught.value.why).startswith(f"--method {name} ")
    assert METHODS["mbq"].resolve({switch: value})


def test_a_weight_that_nothing_is_weighed_by_is_refused() -> None:
    for switch in ({"modality_weight": 0.1}, {"r_floor": 0.1}, {"search_prompt_weight": "0"}):
        with pytest.raises(UsageError, match="decides nothing here"):
            METHODS["awq"].resolve(switch)
    assert METHODS["awq"].resolve({"stat": "balanced", "r_floor": 0.1}).r_floor == 0.1
    assert METHODS["gptq"].resolve({"hessian": "balanced", "r_floor": 0.1}).r_floor == 0.1
    with pytest.raises(UsageError, match="--r-floor decides nothing here") as caught:
        METHODS["mbq"].resolve({"modality_weight": 0.1, "r_floor": 0.1})
    assert "has one ratio for all layers" in str(caught.value.why)


def test_compatibility_has_no_scale_without_a_search() -> None:
    with pytest.raises(UsageError, match="--compat mbq contradicts --method smoothquant"):
        METHODS["smoothquant"].resolve({"compat": "mbq"})


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"clip": "group"}, "contradicts --clip group"),
        ({"rounding": "gptq"}, "contradicts --rounding gptq"),
    ],
)
def test_a_joint_search_is_the_only_one_that_chooses_ranges(
    chosen: dict[str, Any], message: str
) -> None:
    for name, scope in (("qvlm", {}), ("mbq", {"search_scope": "block"})):
        with pytest.raises(UsageError, match=f"--search-scope block {message}") as caught:
            METHODS[name].resolve({**scope, **chosen})
        assert caught.value.code == "E2002"
        METHODS[name].resolve({"search_scope": "linear", **chosen})


def test_what_a_joint_search_decides_goes_with_it_only() -> None:
    chosen: dict[str, Any]
    for chosen in ({"qvlm_measure": "mutual-info"}, {"search_alpha": True}):
        with pytest.raises(UsageError, match=r"--(qvlm|search)-\w+ decides nothing here") as caught:
            METHODS["mbq"].resolve(chosen)
        assert caught.value.code == "E2002"
        found = METHODS["mbq"].resolve({"search_scope": "block", **chosen}).resolved()
        assert {name: found[name] for name in chosen} == chosen
    assert METHODS["mbq"].resolve({"search_scope": "block"}).looks_at_data
    with pytest.raises(UsageError, match="--search-alpha decides nothing here"):
        METHODS["smoothquant"].resolve({"search_scope": "block", "search_alpha": True})
    blind = METHODS["rtn"].resolve({"search_scope": "block", "loss": "mse", "tokens": 64})
    assert (blind.loss, blind.tokens) == ("mse", 64)


def test_compatibility_has_no_joint_search() -> None:
    with pytest.raises(UsageError, match="--compat mbq contradicts --method qvlm"):
        METHODS["qvlm"].resolve({"compat": "mbq"})
    with pytest.raises(UsageError, match="--compat mbq contradicts search_scope = block"):
        METHODS["mbq"].resolve({"compat": "mbq", "search_scope": "block"})
    published = METHODS["mbq"].resolve({"compat": "mbq"})
    with pytest.raises(UsageError, match="--search-scope block contradicts --compat mbq"):
        replaced(published, {"search_scope": "block"})


@pytest.mark.parametrize("name", ["gptq", "mbq+"])
def test_compatibility_has_no_error_feedback(name: str) -> None:
    with pytest.raises(UsageError, match="--compat mbq contradicts --method") as caught:
        METHODS[name].resolve({"compat": "mbq"})
    assert caught.value.code == "E2002"
    with pytest.raises(UsageError, match="--compat mbq contradicts rounding = gptq"):
        METHODS["mbq"].resolve({"compat": "mbq", "rounding": "gptq"})


def test_the_published_arithmetic_does_not_clip() -> None:
    with pytest.raises(UsageError, match="--compat mbq contradicts --clip group") as caught:
        METHODS["mbq"].resolve({"compat": "mbq", "clip": "group"})
    assert caught.value.code == "E2002"
    assert METHODS["mbq"].resolve({"compat": "mbq", "clip": "none"}).clip == "none"
    assert METHODS["awq"].resolve({"compat": "mbq"}).clip == "none"


@pytest.mark.parametrize("name", NAMES)
def test_no_method_but_awq_clips_unless_asked_to(name: str) -> None:
    assert METHODS[name].resolve({}).clip == ("group" if name == "awq" else "none")
    assert METHODS[name].resolve({"search_scope": "linear", "clip": "group"}).clip == "group"
