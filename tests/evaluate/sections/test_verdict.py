"""The box on top never says more than was found."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mbq_export.evaluate.document import BAD, GOOD, UNSURE, Verdict
from mbq_export.evaluate.gathering import gather
from mbq_export.evaluate.sections.verdict import place, scheme_of, verdicts
from tests.evaluate.reported import benchmark, bundle_folder, engine, found_of, validation, write


def judged(tmp_path: Path, **options: Any) -> Verdict:
    return verdicts(gather([bundle_folder(tmp_path / "w3", **options)]))[0]


def said(verdict: Verdict) -> list[str]:
    return [line.text for line in verdict.lines]


def test_a_bundle_that_passed_its_gates_passes(tmp_path: Path) -> None:
    found = judged(tmp_path, report=validation())
    assert (found.name, found.headline, found.tone) == (
        "w3",
        "All 3 checks passed, 1 not run",
        GOOD,
    )
    assert said(found) == [
        "tiny-llava-ov, w3a16 g128 mbq",
        "Checked with backend ort, lowering qdq",
        "Engine rtx-1.7.1.116/sm89 not verified: built without a GPU",
    ]
    assert found.lines[-1].tone == UNSURE


@pytest.mark.parametrize(("group", "words"), [(0, "w4a8 channel rtn"), (128, "w4a8 g128 rtn")])
def test_one_scale_per_channel_has_a_name(group: int, words: str) -> None:
    quant = {"scheme": {"name": "w4a8", "group_size": group}, "method": {"name": "rtn"}}
    assert scheme_of(SimpleNamespace(manifest={"quant": quant})) == words  # type: ignore[arg-type]


def test_a_head_of_codes_is_part_of_the_name() -> None:
    quant = {
        "scheme": {"name": "w3a16", "group_size": 128},
        "method": {"name": "mbq"},
        "lm_head": {"scheme": "w4a16", "group_size": 128},
    }
    found = scheme_of(SimpleNamespace(manifest={"quant": quant}))  # type: ignore[arg-type]
    assert found == "w3a16 g128 mbq with a head of w4a16"


def test_a_failed_gate_and_its_place_are_named(tmp_path: Path) -> None:
    found = judged(tmp_path, report=validation(worst=0.5))
    assert (found.headline, found.tone) == ("1 of 3 checks failed, 1 not run", BAD)
    assert "First bad place: layer 2 mlp.down_proj column 7, vision positions" in said(found)
    assert "Failed: parity.relative_error" in said(found)


def test_a_bundle_without_gates_was_not_checked(tmp_path: Path) -> None:
    found = judged(tmp_path, facts={"gates": []})
    assert (found.headline, found.tone) == ("Not checked", UNSURE)


def test_overridden_gates_are_never_green(tmp_path: Path) -> None:
    override = {"gate": "warn", "reason": "demo"}
    found = judged(tmp_path, facts={"gate_override": override})
    assert found.tone == UNSURE
    assert "Published with --gate warn: demo" in said(found)
    failed = judged(tmp_path / "b", facts={"gate_override": override}, report=validation(worst=0.5))
    assert failed.tone == BAD


def test_a_later_validation_can_only_make_a_verdict_worse(tmp_path: Path) -> None:
    folder = bundle_folder(tmp_path / "w3", report=validation())
    sha256 = gather([folder]).subjects[0].bundle.sha256
    validation(worst=0.5, sha256=sha256).write(tmp_path / "validate.json")
    (found,) = verdicts(gather([folder, tmp_path / "validate.json"]))
    assert (found.headline, found.tone) == ("1 of 6 checks failed, 2 not run", BAD)


def test_an_engine_that_ran_is_told_from_one_that_did_not(tmp_path: Path) -> None:
    folder = bundle_folder(tmp_path / "w3", facts={"skipped_engines": {"sm120:rtx": "no library"}})
    record = folder / "engines/rtx-1.7.1.116/sm89/engine.json"
    size = record.stat().st_size
    text = write(record, engine(verified=True)).read_text()
    record.write_text(text.ljust(size))
    found = verdicts(gather([folder]))[0]
    assert "Engine rtx-1.7.1.116/sm89 verified on a device" in said(found)
    assert "Engine sm120:rtx was not built: no library" in said(found)


@pytest.mark.parametrize(
    ("reasons", "headline", "tone"),
    [((), "Timings are valid", GOOD), (("others used 60 %",), "Timings are noisy", UNSURE)],
)
def test_a_benchmark_is_valid_or_noisy(reasons: tuple[str, ...], headline: str, tone: str) -> None:
    (found,) = verdicts(found_of(benchmark(reasons=reasons)))
    assert (found.headline, found.tone) == (headline, tone)
    assert said(found) == ["Timed fp, w3 on Test CPU, 2 CPUs", *reasons]


def test_the_first_reasons_for_noise_are_told_and_the_others_counted() -> None:
    (found,) = verdicts(found_of(benchmark(reasons=("a", "b", "c", "d"))))
    assert said(found)[1:] == ["a", "b", "2 more reasons below"]


def test_a_validation_of_an_absent_bundle_has_a_verdict_of_its_own() -> None:
    (found,) = verdicts(found_of(replace(validation(worst=0.5), measurements=())))
    assert (found.name, found.tone) == ("validate.json", BAD)
    assert said(found)[0] == "Validation of w3"


def test_a_place_outside_the_blocks_has_no_layer() -> None:
    assert place({"layer": None, "op": "lm_head", "modality": "all"}) == "lm_head, all positions"
