"""Whole validations: what they report, and what a failed one says."""

import json
from pathlib import Path

import pytest

from mbq_export.errors import MbqError, UsageError
from mbq_export.evaluate import validate as validation_module
from mbq_export.evaluate.tolerances import PARITY, PARITY_FP32, PARITY_ROUNDED
from mbq_export.evaluate.validate import (
    Validation,
    by_tier,
    failure,
    lowerings_of,
    validate,
    validate_build,
)
from mbq_export.export import GraphForm
from mbq_export.progress import silent
from mbq_export.report import Check, Report
from tests.evaluate.bundles import sample_bundle, tiny_bundle
from tests.evaluate.planted import GRAPHS, planted, wrong_scale
from tests.questions import tiny_model
from tests.runtime.bundles import rounded_bundle

FEW = {"samples": 3, "prompts": 4, "threads": 1}


@pytest.fixture(scope="module")
def good() -> Report:
    return validate(sample_bundle(), Validation(**FEW))


def test_the_sample_bundle_passes_all_default_tiers(good: Report) -> None:
    assert [check for check in good.checks if not check.ok] == []
    assert good.passed
    assert failure(good) is None
    assert list(good.details["tiers"]) == ["structure", "numeric", "tokens"]
    assert good.details["first_bad"] is None


def test_the_result_has_the_shape_of_the_command_line_reference(good: Report) -> None:
    result = json.loads(json.dumps(good.as_json(), allow_nan=False))
    assert result["schema"] == "mbq-export/validate@1"
    numeric = result["tiers"]["numeric"]
    assert numeric["pass"] is True
    gate = next(
        g for g in numeric["gates"] if (g["name"], g["modality"]) == ("parity.cosine", "vision")
    )
    assert {"name", "modality", "threshold", "value", "worst", "pass", "run"} <= set(gate)
    assert (gate["threshold"], gate["pass"], gate["run"]) == (0.99999, True, True)
    assert len(result["layers"]["linears"]) == 35
    assert {entry["value"] for entry in result["layers"]["stream"]} >= {"layers.4.hidden", "logits"}
    assert result["context"]["sha256"] == sample_bundle().sha256


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Report:
    change = wrong_scale("layers.2.gate_up_proj", 768 + 5, 1)["qdq"]
    root = tmp_path_factory.mktemp("planted") / "bundle"
    bundle = planted(sample_bundle(), root, file=GRAPHS["qdq"], change=change)
    return validate(bundle, Validation(tiers=("numeric",), **FEW))


def test_one_wrong_scale_of_the_sample_model_fails_and_names_the_place(bad: Report) -> None:
    error = failure(bad)
    assert isinstance(error, MbqError)
    assert error.code == "E1101"
    assert error.exit_status == 1
    assert error.message.startswith("numeric parity.linear is ")
    assert "limit 0.0001 at layer 2 mlp.up_proj column 5, all positions" in error.message
    assert "packing, scales and zero points" in error.why
    assert error.context["first_bad"]["layer"] == 2


def test_a_failed_result_is_json_too(bad: Report) -> None:
    result = json.loads(json.dumps(bad.as_json(), allow_nan=False))
    assert result["pass"] is False
    assert result["tiers"]["numeric"]["pass"] is False
    assert (result["first_bad"]["layer"], result["first_bad"]["op"]) == (2, "mlp.up_proj")
    assert result["first_bad"]["statistics"]["tested"]["non_finite"] == 0


def test_the_gates_of_a_build_run_both_lowerings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation_module, "BUILD_PROMPTS", 2)
    monkeypatch.setattr(validation_module, "REFERENCE_PROMPTS", 1)
    assert sorted(lowerings_of(sample_bundle())) == ["qdq", "reference"]
    report = validate_build(sample_bundle())
    assert list(report.details["tiers"]) == [
        "structure",
        "numeric",
        "tokens",
        "numeric@reference",
        "tokens@reference",
    ]
    assert failure(report) is None
    assert report["tokens/prompts"].value == 2
    assert report["reference/tokens/prompts"].value == 1


def test_a_fault_in_the_reference_lowering_alone_fails_a_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation_module, "BUILD_PROMPTS", 1)
    monkeypatch.setattr(validation_module, "REFERENCE_PROMPTS", 1)
    monkeypatch.setattr("mbq_export.evaluate.tokens.COLLAPSED_SHARE", 1.0)
    change = wrong_scale("layers.0.o_proj", 9, 2)["reference"]
    report = validate_build(
        planted(tiny_bundle(), tmp_path / "bad", file=GRAPHS["reference"], change=change)
    )
    error = failure(report)
    assert error is not None
    assert error.message.startswith("numeric@reference parity.linear")
    assert "layer 0 self_attn.o_proj column 9" in error.message
    assert report.details["tiers"]["numeric"]["pass"] is True


def test_text_only_data_leave_vision_unmeasured_which_is_no_pass(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text('{"id": "1", "images": [], "prompt": "how many ?", "answer": "two"}\n')
    report = validate(
        tiny_bundle(), Validation(tiers=("numeric",), samples=1, data=data, threads=1)
    )
    unmeasured = {check.modality for check in report.checks if check.ok is None}
    assert unmeasured == {"vision"}
    assert report.details["tiers"]["numeric"]["pass"] is False
    assert [warning["code"] for warning in report.details["warnings"]] == ["MBQ-W1104"]
    assert "MBQ-W1104: vision was not measured" in caplog.text


def test_full_precision_adds_quality_beside_parity() -> None:
    folder = Path(__file__).parents[2] / "samples" / "tiny_vlm" / "weights"
    report = validate(sample_bundle(), Validation(tiers=("numeric",), full_precision=folder, **FEW))
    names = {check.name.partition(".")[0] for check in report.checks}
    assert names == {"parity", "quality"}
    assert report.passed


def test_questions_are_asked_and_counted_by_kind() -> None:
    report = validate(
        sample_bundle(), Validation(tiers=("task",), questions=12, lowering="qdq", threads=1)
    )
    assert report["task/questions"].value == 12
    assert 0.5 < report["task/accuracy"].value <= 1
    assert report["task/accuracy_low"].value <= report["task/accuracy"].value
    assert any(m.name.startswith("task/accuracy/") for m in report.measurements)
    assert len(report.details["task"]) == 12


def test_unquantized_baseline_is_checked_like_any_bundle(tmp_path: Path) -> None:
    bundle = rounded_bundle(tmp_path / "fp", tiny_model(), scheme=None)
    report = validate(bundle, Validation(tiers=("structure", "numeric"), samples=1, threads=1))
    assert report.passed


def test_half_precision_is_within_its_own_gates_and_not_those_of_float32(tmp_path: Path) -> None:
    half = GraphForm(lowering="qdq", target="ort", dtype="fp16")
    bundle = rounded_bundle(tmp_path / "half", tiny_model(), forms=(half,))
    few = {"tiers": ("numeric",), "samples": 2, "threads": 1}
    report = validate(bundle, Validation(dtype="fp16", **few))
    assert failure(report) is None
    error = max(check.value for check in report.checks if check.name == "parity.relative_error")
    assert error > PARITY_FP32.relative_error


@pytest.mark.parametrize(
    ("validation", "message", "known"),
    [
        (
            Validation(tiers=("numbers",)),
            "Unknown tier 'numbers'.",
            "known: structure, numeric, tokens, task",
        ),
        (Validation(dtype="int8"), "Unknown dtype 'int8'.", "known: fp32, fp16"),
    ],
)
def test_unknown_names_list_the_known(validation: Validation, message: str, known: str) -> None:
    with pytest.raises(UsageError) as caught:
        validate(tiny_bundle(), validation)
    assert (caught.value.message, caught.value.why) == (message, known)


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (Check(name="parity.norm_ratio", ok=False, value=0.3, threshold=1e-3), "E1102"),
        (Check(name="parity.logits", ok=False, value=float("nan"), threshold=1e-4), "E1103"),
        (Check(name="collapse", ok=False, value=0.5, threshold=0.1), "E1105"),
        (Check(name="quality.kl", ok=False, value=0.5, threshold=0.2), "E1201"),
        (Check(name="parity.greedy", ok=False, value=0.5, threshold=1.0), "E1101"),
    ],
)
def test_kinds_of_failure_have_codes_of_their_own(check: Check, code: str) -> None:
    error = failure(Report(kind="validate", checks=(check,), details={"first_bad": None}))
    assert error is not None
    assert error.code == code


def test_a_tier_with_a_check_that_was_not_run_has_not_passed() -> None:
    checks = [Check(name="a", tier="x", ok=True), Check(name="b", tier="x", ok=None, why="why")]
    assert by_tier(checks)["x"]["pass"] is False


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_greedy_tokens_are_identical_on_two_hundred_prompts_and_both_lowerings() -> None:
    """The bars of the project on the sample model: 200 prompts on qdq, 20 on reference."""
    report = validate_build(sample_bundle())
    assert failure(report) is None
    found = {(check.tier, check.name, check.modality): check.value for check in report.checks}
    for suffix, prompts in (("", 200), ("@reference", 20)):
        prefix = f"{suffix[1:]}/" if suffix else ""
        assert report[f"{prefix}tokens/prompts"].value == prompts
        assert found[f"tokens{suffix}", "parity.greedy", ""] == 1.0
        assert report[f"{prefix}tokens/ties"].value == 0
        assert report[f"{prefix}tokens/logits_error"].value <= 1e-4


@pytest.mark.parametrize(("dtype", "name"), [("float16", "fp16"), ("bfloat16", "bf16")])
def test_engines_are_held_to_the_gates_of_their_own_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, name: str
) -> None:
    ports = {"inputs": [{"name": "inputs_embeds", "dtype": dtype}]}
    record = {"flavour": "rtx", "sm": ["sm89"], "engines": {"decoder": ports}}
    (tmp_path / "engine.json").write_text(json.dumps(record))
    monkeypatch.setattr(validation_module, "engine_folder", lambda *_: tmp_path)
    for backend, wanted in (("rtx", name), ("ort", "fp32")):
        run = validation_module._Run(
            bundle=sample_bundle(), validation=Validation(backend=backend), progress=silent
        )
        assert run.gates == PARITY[wanted]


def test_coarser_types_are_never_held_to_tighter_gates() -> None:
    for gates in (PARITY, PARITY_ROUNDED):
        for finer, coarser in (("fp32", "fp16"), ("fp16", "bf16")):
            assert gates[finer].cosine_mean >= gates[coarser].cosine_mean
            assert gates[finer].agreement >= gates[coarser].agreement
            assert gates[finer].norm_ratio <= gates[coarser].norm_ratio
            assert gates[finer].linear_error <= gates[coarser].linear_error
            assert gates[finer].relative_error <= gates[coarser].relative_error
