"""A build that only evaluates: what it refuses, and what it leaves behind."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mbq_export.bundle import Bundle
from mbq_export.checkpoint import CHECKPOINT_FILE, QuantCheckpoint
from mbq_export.errors import UsageError
from mbq_export.evaluate.integrity import check_structure
from mbq_export.export import GraphForm, check_forms
from mbq_export.pipeline import fake_quant
from mbq_export.pipeline.continuing import continued_plan
from mbq_export.pipeline.engine_options import EngineOptions
from mbq_export.pipeline.fake_quant import check_fake_quant
from mbq_export.pipeline.plan import make_plan
from mbq_export.pipeline.request import BuildRequest, scheme_of
from mbq_export.pipeline.stages import build
from mbq_export.runtime import lowerings_of, open_session
from mbq_export.schemes import SCHEMES
from tests.pipeline.test_stages import Ear
from tests.tiny import Tiny, write_tiny

EVALUATION_ONLY = ("w2a16", "w4a4", "w6a6")
W4A4 = BuildRequest(model="tiny-llava-ov", out=Path("out"), scheme="w4a4", method="rtn")


def test_formats_for_evaluation_only_are_those_without_an_operator() -> None:
    assert tuple(name for name, each in SCHEMES.members().items() if each.evaluation_only) == (
        EVALUATION_ONLY
    )


@pytest.mark.parametrize("name", EVALUATION_ONLY)
def test_a_build_of_such_a_format_names_the_option(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} exists for evaluation only") as caught:
        make_plan(replace(W4A4, scheme=name))
    assert caught.value.code == "E2006"
    assert caught.value.fix == (
        "--fake-quant makes a checkpoint and a study of it",
        "--scheme w3a16, w4a16, w4a8 or w8a8",
    )


def test_a_calibration_or_a_checkpoint_may_be_of_any_format() -> None:
    for name in EVALUATION_ONLY:
        check_fake_quant(replace(W4A4, record=CHECKPOINT_FILE), SCHEMES[name])


def test_two_bits_are_that_format() -> None:
    assert scheme_of(BuildRequest(model="m", out=Path("o"), weight_bits=2)) is SCHEMES["w2a16"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"targets": ("rtx4090:rtx",)}, "--target rtx4090:rtx"),
        ({"lowering": "qdq"}, "--lowering qdq"),
        ({"require_engine": True}, "--require-engine"),
        ({"kv": "concat"}, "--kv"),
        ({"op_level": "opset20"}, "--op-level"),
        ({"max_context": 512}, "--max-context"),
        ({"engines": EngineOptions(max_batch=2)}, "options of engines"),
    ],
)
def test_an_evaluation_builds_no_engines(change: dict[str, object], what: str) -> None:
    request = replace(W4A4, fake_quant=True, **change)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"--fake-quant does not go with {what}") as caught:
        check_fake_quant(request, SCHEMES["w4a4"])
    assert caught.value.code == "E2002"


def test_there_is_nothing_to_evaluate_in_the_baseline() -> None:
    with pytest.raises(UsageError, match="does not go with --wbits 16"):
        check_fake_quant(replace(W4A4, fake_quant=True), None)


def test_a_plan_knows_the_evaluation_apart_from_the_build() -> None:
    request = replace(W4A4, scheme="w4a8")
    deployed, evaluated = make_plan(request), make_plan(replace(request, fake_quant=True))
    assert deployed.fingerprint != evaluated.fingerprint
    assert (evaluated.targets, evaluated.lowering) == ((), None)


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A bundle of w4a4, and what was said on the way."""
    folder, ear = tmp_path_factory.mktemp("fake"), Ear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_quant, "STUDY_QUESTIONS", 4)
        build(
            replace(
                W4A4,
                model=str(write_tiny(folder / "model", Tiny())),
                out=folder / "out",
                data="builtin:shapes",
                samples=2,
                fake_quant=True,
            ),
            ear,
        )
    return folder / "out", ear.notes


def test_it_leaves_a_checkpoint_and_a_study_and_says_that_there_are_no_graphs(
    studied: tuple[Path, list[str]],
) -> None:
    out, notes = studied
    assert "[4/7] onnx        none: --fake-quant evaluates the checkpoint" in notes
    assert not (out / "onnx").exists()
    bundle = Bundle.open(out, verify=True)
    assert (bundle.has_graphs, bundle.manifest["fake_quant"]) == (False, True)
    checkpoint = QuantCheckpoint.open(out / "weights")
    assert checkpoint.scheme_name == "w4a4"
    assert checkpoint.info["scheme"]["activation"]["bits"] == 4
    study = json.loads((out / "reports" / "study.json").read_text())
    assert set(study["models"]) == {"full precision", "w4a4"}
    assert {each["name"] for each in study["measurements"]} >= {
        "quantized/exact_match",
        "kl/answer",
    }
    assert any("exact match" in note for note in notes)


def test_its_checkpoint_is_refused_where_graphs_are_written(
    studied: tuple[Path, list[str]],
) -> None:
    checkpoint = QuantCheckpoint.open(studied[0] / "weights")
    with pytest.raises(UsageError, match="w4a4 exists for evaluation only") as caught:
        check_forms(checkpoint, (GraphForm(lowering="qdq"),), longest=512)
    assert caught.value.code == "E2006"


def test_its_bundle_is_checked_and_run_as_a_checkpoint_and_nothing_else(
    studied: tuple[Path, list[str]], tmp_path: Path
) -> None:
    bundle = Bundle.open(studied[0])
    checks, _ = check_structure(bundle)
    assert {check.name: check.value for check in checks}["graphs"] == 0
    assert lowerings_of(bundle) == []
    open_session(bundle, backend="oracle").close()
    with pytest.raises(UsageError, match="has no graphs") as caught:
        open_session(bundle)
    assert (caught.value.code, caught.value.fix[0]) == (
        "E2006",
        "--backend oracle runs the checkpoint itself",
    )
    request = BuildRequest(
        model="", bundle=studied[0], out=tmp_path / "again", targets=("rtx4090:rtx",)
    )
    with pytest.raises(UsageError, match="no graphs"):
        continued_plan(request)
