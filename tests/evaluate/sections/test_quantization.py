"""Bits, token shares, gradient ratios, exponents and errors, from records with round numbers."""

import json
from pathlib import Path

import pytest

from mbq_export.evaluate.document import Figure, Heading, Missing, Note, Section, Table
from mbq_export.evaluate.gathering import gather
from mbq_export.evaluate.sections.quantization import (
    _bits,
    bits_per_weight,
    layer_and_linear,
    section,
)
from tests.evaluate.reported import bundle_folder


@pytest.fixture
def found(tmp_path: Path) -> Section:
    return section(gather([bundle_folder(tmp_path / "w3")]))


def figure(found: Section, title: str) -> Figure:
    return next(b for b in found.blocks if isinstance(b, Figure) and b.title.startswith(title))


def numbers(found: Section, title: str) -> tuple[tuple[object, ...], ...]:
    table = figure(found, title).numbers
    assert table is not None
    return table.rows


def test_bits_count_scales_and_zero_points(found: Section) -> None:
    bits, kept = (block for block in found.blocks if isinstance(block, Table))
    # 3 bits, and 16 + 4 bits of scale and packed zero point, or 16 + 8, per 128 weights.
    per_weight = bits_per_weight("w3a16", "128")
    assert per_weight is not None
    assert 3.125 < per_weight < 3.2
    first = bits.rows[0]
    assert first[:4] == ("self_attn.o_proj", "3", "49,152", "w3a16 g128")
    assert float(str(first[4])) == pytest.approx(per_weight, abs=1e-3)
    assert kept.rows == (("model.vision_tower.*", "40", "policy"),)


def test_token_shares_sum_to_all(found: Section) -> None:
    assert numbers(found, "Tokens") == (
        ("vision", "750", "75.0 %"),
        ("prompt", "150", "15.0 %"),
        ("answer", "100", "10.0 %"),
    )


@pytest.mark.parametrize(("modality", "ratio"), [("vision", "0.1"), ("prompt", "0.5")])
def test_gradient_ratios_have_a_point_per_layer_and_half(
    found: Section, modality: str, ratio: str
) -> None:
    rows = numbers(found, f"Gradient of {modality}")
    assert [row[:2] for row in rows] == [
        (str(layer), half) for half in ("attention", "MLP") for layer in range(3)
    ]
    assert {row[2] for row in rows} == {ratio}


def test_exponents_are_shown_per_unit_and_layer(found: Section) -> None:
    assert numbers(found, "Exponent")[0] == ("qkv", "0", "0.05", "0.1")


def test_errors_are_shown_per_linear_and_layer(found: Section) -> None:
    assert numbers(found, "Relative error") == (
        ("o_proj", "0.1", "0.1", "0.1"),
        ("down_proj", "0.2", "0.2", "0.2"),
    )


def test_the_baseline_is_not_quantized_and_not_a_gap(tmp_path: Path) -> None:
    folder = bundle_folder(tmp_path / "fp", layers=0, facts={"quant": {"scheme": {"name": "none"}}})
    other = bundle_folder(tmp_path / "w3")
    blocks = section(gather([folder, other])).blocks
    assert blocks[:2] == (
        Heading(text="fp"),
        Note(text="Not quantized: the full-precision baseline."),
    )


def test_parts_that_a_method_does_not_need_are_said_to_be_missing(tmp_path: Path) -> None:
    folder = bundle_folder(tmp_path / "rtn", engines=False)
    for name in ("calib", "sensitivity"):
        path = folder / "calibration" / f"{name}.json"
        path.write_text("{}".ljust(path.stat().st_size))
    found = section(gather([folder]))
    missing = [block.what for block in found.blocks if isinstance(block, Missing)]
    assert missing == ["Token shares", "Gradient ratios", "Exponents"]


def test_what_lies_outside_the_decoder_is_counted_and_is_no_row_of_its_layers(
    tmp_path: Path,
) -> None:
    folder = bundle_folder(tmp_path / "w3")
    path = folder / "weights" / "mbq.json"
    record = json.loads(path.read_text())
    record["linears"] += [
        {
            "name": "model.vision_tower.encoder.layers.0.self_attn.o_proj",
            "n": 8, "k": 8, "scheme": "w8a8", "group_size": 0, "error": {"weight": 0.9},
        },
        {
            "name": "lm_head", "n": 64, "k": 128, "scheme": "w4a16", "group_size": 128,
            "error": {"weight": 0.8}, "kl": {"answers": 0.0015, "limit": 0.002, "positions": 9},
        },
    ]  # fmt: skip
    path.write_text(json.dumps(record))
    manifest = json.loads((folder / "manifest.json").read_text())
    for each in manifest["files"]:
        if each["path"] == "weights/mbq.json":
            each["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = section(gather([folder]))
    bits = next(block for block in found.blocks if isinstance(block, Table))
    assert [row[0] for row in bits.rows[2:]] == [
        "model.vision_tower.encoder.layers.*.self_attn.o_proj",
        "lm_head",
    ]
    assert [row[0] for row in numbers(found, "Relative error")] == ["o_proj", "down_proj"]
    assert (
        max(float(str(cell)) for row in numbers(found, "Relative error") for cell in row[1:]) < 0.3
    )
    told = [block.text for block in found.blocks if isinstance(block, Note)]
    assert any(text.startswith("lm_head alone adds 0.0015 nats at answers") for text in told)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("model.language_model.layers.12.mlp.up_proj", (12, "mlp.up_proj")),
        ("lm_head", (-1, "lm_head")),
    ],
)
def test_module_paths_are_split_at_the_layer(name: str, split: tuple[int, str]) -> None:
    assert layer_and_linear(name) == split


def test_a_scale_per_channel_counts_as_nothing_and_is_named() -> None:
    assert bits_per_weight("w4a8", "0") == 4.0
    assert bits_per_weight("w4a8", "128") == 4.125
    row = {"name": "model.layers.0.o_proj", "n": 8, "k": 8, "scheme": "w4a8", "group_size": 0}
    assert _bits([row]).rows[0][3] == "w4a8 channel"


@pytest.mark.parametrize(("scheme", "group"), [("w9", "128"), ("w3a16", "0"), ("w3a16", "x")])
def test_unknown_formats_have_no_bits(scheme: str, group: str) -> None:
    assert bits_per_weight(scheme, group) is None
