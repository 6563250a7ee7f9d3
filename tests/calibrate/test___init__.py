"""The stage: a model and samples become channel scales, again and again the same."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mbq_export.blocks.fold import fold
from mbq_export.blocks.stream import BlockStream
from mbq_export.calibrate import BLOCKS, Recipe, calibrate
from mbq_export.calibrate.methods import METHODS
from mbq_export.channel_scales import ChannelScales
from mbq_export.errors import FormatError, UsageError
from mbq_export.families.base import PROMPT, VISION, LoadedModel
from mbq_export.families.inputs import ModelInputs
from mbq_export.families.llava_onevision import load
from mbq_export.progress import Progress, silent
from mbq_export.schemes import SCHEMES
from mbq_export.state import State
from tests.questions import questions, sample_model, tiny_model
from tests.tiny import Tiny

SAMPLES = 5


def recipe(method: str = "mbq", **options: Any) -> Recipe:
    chosen = options.pop("chosen", {})
    return Recipe(
        **{
            "scheme": SCHEMES["w3a16"],
            "group_size": 64,
            "switches": METHODS[method].resolve(chosen),
            "facts": {"model": {"id": "tiny"}, "data": {"sha256": "d" * 64}},
            **options,
        }
    )


def calibrated(
    model: LoadedModel | None = None,
    made: Recipe | None = None,
    *,
    state: State | None = None,
    progress: Progress = silent,
) -> ChannelScales:
    model = model or tiny_model()
    return calibrate(
        model, questions(model, SAMPLES), made or recipe(), state=state, progress=progress
    )


def bytes_of(found: ChannelScales, folder: Path) -> dict[str, bytes]:
    found.write(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_calibration_has_a_scale_per_unit_and_says_how(tmp_path: Path) -> None:
    found = calibrated()
    assert sorted(found.scales) == [
        f"layers.{layer}.{unit}.e" for layer in range(2) for unit in ("down", "gate_up", "qkv")
    ]
    calib = found.calib
    assert calib["data"]["samples"] == SAMPLES
    assert calib["data"]["sha256"] == "d" * 64
    assert calib["data"]["tokens"]["vision"] == SAMPLES * 78
    assert (calib["scheme"], calib["group_size"], calib["ratios"]) == ("w3a16", 64, "measured")
    assert calib["switches"]["method"] == "mbq"
    assert len(calib["units"]) == 8
    assert len(found.sensitivity["layers"]) == 2
    found.write(tmp_path / "scales")
    again = ChannelScales.read(tmp_path / "scales")
    assert again.switches == recipe().switches
    for name, e in found.scales.items():
        np.testing.assert_array_equal(again.scales[name], e)


def test_scales_fold_without_changing_a_block() -> None:
    model = tiny_model()
    found = calibrated(model, recipe(chosen={"gqa_o_scale": True}))
    stream = BlockStream(model)
    batch = stream.begin(questions(model, 1))[0]
    with stream.block(0) as block:
        plain = stream.run(block, 0, batch, batch.hidden)
        assert len(found.of_block(0)) == 4
        fold(block, found.of_block(0), smooth=model.family.smooth, text=model.text)
        folded = stream.run(block, 0, batch, batch.hidden)
    assert float((plain - folded).norm() / plain.norm()) < 1e-5


@pytest.mark.parametrize("method", ["awq", "mbq", "rtn"])
def test_the_same_inputs_give_the_same_bytes(method: str, tmp_path: Path) -> None:
    once = bytes_of(calibrated(made=recipe(method)), tmp_path / "once")
    again = bytes_of(calibrated(made=recipe(method)), tmp_path / "again")
    assert once == again


def test_blocks_streamed_from_files_give_the_same_bytes(tmp_path: Path) -> None:
    whole = bytes_of(calibrated(tiny_model()), tmp_path / "whole")
    streamed = bytes_of(calibrated(tiny_model(meta_blocks=True)), tmp_path / "streamed")
    assert whole == streamed


def test_a_bfloat16_model_is_calibrated_to_about_the_same() -> None:
    exact = tiny_model()
    half = load(exact.folder, dtype="bfloat16")
    found, wanted = calibrated(half), calibrated(exact)
    assert found.calib["dtype"] == "bfloat16"
    for name, e in wanted.scales.items():
        assert np.isfinite(found.scales[name]).all()
        assert found.scales[name].shape == e.shape
    for unit, other in zip(found.calib["units"], wanted.calib["units"], strict=True):
        if unit["alpha"] is not None:
            assert unit["r"] == pytest.approx(other["r"], rel=0.05)
            assert unit["J"]["rtn"] == pytest.approx(other["J"]["rtn"], rel=0.05)


def test_plain_rounding_needs_no_data() -> None:
    found = calibrate(tiny_model(), [], recipe("rtn"))
    assert found.scales == {}
    assert found.sensitivity == {}
    assert found.calib["switches"]["method"] == "rtn"
    assert found.calib["units"] == []


def test_a_method_without_ratios_measures_no_gradients() -> None:
    notes: list[tuple[int, int]] = []
    found = calibrated(
        made=recipe("awq"), progress=lambda done, total, _note: notes.append((done, total))
    )
    assert found.sensitivity == {}
    assert found.calib["ratios"] == "none"
    assert notes == [(1, 2), (2, 2)]
    assert found.calib["units"][0]["r"] is None


def test_progress_counts_all_passes() -> None:
    notes: list[str] = []
    calibrated(progress=lambda done, total, note: notes.append(f"{done}/{total} {note}"))
    assert [note.split(" error")[0] for note in notes] == [
        "1/6 forward 1/2",
        "2/6 forward 2/2",
        "3/6 backward 1/2",
        "4/6 backward 2/2",
        "5/6 block 1/2",
        "6/6 block 2/2",
    ]


def test_an_edited_report_replaces_the_measurement() -> None:
    report = json.loads(json.dumps(calibrated().sensitivity))
    report["layers"][0]["r"]["mlp"] = 7.0
    notes: list[int] = []
    found = calibrated(
        made=recipe(sensitivity=report), progress=lambda _done, total, _note: notes.append(total)
    )
    assert notes == [2, 2]
    assert found.calib["ratios"] == "user"
    by_unit = {(u["layer"], u["unit"]): u for u in found.calib["units"]}
    assert by_unit[0, "down"]["r"] == 7.0
    assert by_unit[0, "qkv"]["r"] == report["layers"][0]["r"]["attn"]


class KilledError(Exception):
    """Stands for the process being killed."""


@pytest.mark.parametrize("after", [4, 5])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(after: int, tmp_path: Path) -> None:
    expected = bytes_of(calibrated(), tmp_path / "expected")

    def kill(done: int, _total: int, _note: str = "") -> None:
        if done == after:
            raise KilledError

    state = State.open(tmp_path / "work", {})
    with pytest.raises(KilledError):
        calibrated(state=state, progress=kill)
    state.close()
    heard: list[int] = []
    state = State.open(tmp_path / "work", {})
    found = calibrated(state=state, progress=lambda done, _total, _note: heard.append(done))
    state.close()
    assert bytes_of(found, tmp_path / "found") == expected
    assert heard == ([1, 2, 3, 4, 5, 6] if after == 4 else [6])


def test_a_damaged_block_is_done_again(tmp_path: Path) -> None:
    with State.open(tmp_path / "work", {}) as state:
        expected = bytes_of(calibrated(state=state), tmp_path / "expected")
    path = next((tmp_path / "work" / "blocks" / BLOCKS).glob("0000.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    heard: list[int] = []
    with State.open(tmp_path / "work", {}) as state:
        found = calibrated(state=state, progress=lambda done, _total, _note: heard.append(done))
    assert bytes_of(found, tmp_path / "found") == expected
    assert heard == [5]


def test_a_group_size_that_does_not_divide_names_the_linear() -> None:
    model = tiny_model(Tiny(hidden=96, heads=3, kv_heads=1))
    with pytest.raises(UsageError, match="Group size 128 does not divide in_features 96") as caught:
        calibrate(model, questions(model, 1), recipe(group_size=128))
    assert caught.value.where == ["model.language_model.layers.0.self_attn.q_proj"]


def relabelled(inputs: list[ModelInputs], *, least: int) -> list[ModelInputs]:
    """Samples whose classes from `least` on are prompt."""
    return [
        replace(
            sample,
            token_classes=np.where(
                sample.token_classes >= least, PROMPT, sample.token_classes
            ).astype(np.int8),
        )
        for sample in inputs
    ]


def text_only(model: LoadedModel) -> list[ModelInputs]:
    return [
        model.processor.inputs(f"{word} ?", (), "one red") for word in ("how many", "what color")
    ]


def test_text_alone_is_refused_unless_allowed() -> None:
    model = tiny_model()
    with pytest.raises(FormatError, match="None of 2 samples has image tokens") as caught:
        calibrate(model, text_only(model), recipe())
    assert caught.value.code == "E4308"
    assert caught.value.exit_status == 4
    found = calibrate(model, text_only(model), recipe(text_only_ok=True))
    assert {unit.get("r") for unit in found.calib["units"]} <= {0.0, None}


def test_data_without_answers_is_refused() -> None:
    model = tiny_model()
    inputs = relabelled(questions(model, 2), least=VISION + 1)
    with pytest.raises(FormatError, match="None of 2 samples has answer tokens") as caught:
        calibrate(model, inputs, recipe())
    assert caught.value.code == "E4309"
    assert caught.value.exit_status == 4


def test_one_scored_token_is_too_few() -> None:
    with pytest.raises(UsageError, match="1 tokens per class are too few") as caught:
        calibrated(made=recipe(chosen={"tokens": 1}))
    assert caught.value.code == "E2001"


def test_an_unknown_method_is_answered_with_the_known_ones() -> None:
    made = recipe()
    with pytest.raises(UsageError, match="Unknown method 'mqb'") as caught:
        calibrated(made=replace(made, switches=replace(made.switches, method="mqb")))
    assert "use mbq" in caught.value.fix


@pytest.mark.slow
def test_a_search_lowers_the_error_of_every_block_of_the_sample_model() -> None:
    model = sample_model()
    found = calibrate(model, questions(model, 16), recipe(group_size=128))
    searched = [unit for unit in found.calib["units"] if unit["alpha"] is not None]
    assert len(searched) == 15
    assert all(unit["J"]["best"] <= unit["J"]["rtn"] for unit in searched)
    assert sum(unit["J"]["best"] < unit["J"]["rtn"] for unit in searched) >= 12
    assert all(unit["dropped"] == 0 for unit in searched)
