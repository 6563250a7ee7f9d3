"""Checkpoints of mixed widths: what is predicted, what is chosen, and that nothing else changes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbq_export.backends.torch import fake_quant_model
from mbq_export.blocks.stream import BlockStream
from mbq_export.channel_scales import FOR_WIDTHS, ChannelScales, Switches
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import UsageError
from mbq_export.families.base import ANSWER, PROMPT, TOKEN_CLASSES, VISION, LoadedModel
from mbq_export.quantize import quantize
from mbq_export.quantize.apply import Rounding
from mbq_export.quantize.feedback import Samples
from mbq_export.quantize.unit_errors import UnitErrors
from mbq_export.quantize.widths import MixedBits
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.oracle import dequantized
from tests.quantize import seen
from tests.questions import tiny_model
from tests.tiny import random_scales

TOKEN_BY_TOKEN = 1e-4
"""A Gram matrix in float32 against sums over tokens in float64, after folding in float32."""
WAYS: tuple[Mapping[str, Any], ...] = (
    {"method": "rtn"},
    {"method": "mbq", "clip": "group"},
    {"method": "mbq+", "rounding": "gptq"},
    {"method": "mbq", "compat": "mbq"},
)


def scales(model: LoadedModel, **switches: Any) -> ChannelScales:
    chosen = Switches(**{"method": "mbq", **switches})
    found = random_scales(model).scales if chosen.method != "rtn" else {}
    report = seen.report(model)
    return ChannelScales(
        scales=found,
        sensitivity=report if chosen.method != "rtn" else {FOR_WIDTHS: report},
        calib={"switches": chosen.resolved()},
    )


def tensors_of(folder: Path) -> dict[str, bytes]:
    files = seen.bytes_of(folder)
    return {
        name: data for name, data in files.items() if name.endswith((".safetensors", "ig.json"))
    }


def info_of(checkpoint: QuantCheckpoint) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint.folder / "mbq.json").read_text())
    return found


@pytest.mark.parametrize("clip", ["none", "group"])
def test_predicted_errors_are_sums_over_tokens(tmp_path: Path, clip: str) -> None:
    model, group_size = tiny_model(), 64
    inputs = list(seen.samples(model).inputs)
    found = scales(model, method="rtn", clip=clip)
    rounding = Rounding(scheme=SCHEMES["w3a16"], group_size=group_size)
    schemes = [SCHEMES["w3a16"], SCHEMES["w4a16"]]
    errors = UnitErrors(model, BlockStream(model), found, rounding, schemes).of_all(inputs)
    read = seen.rows_of(model, inputs)
    report = found.sensitivity[FOR_WIDTHS]
    classes = np.concatenate([sample.token_classes for sample in inputs])
    for bits, name in ((3, "w3a16"), (4, "w4a16")):
        checkpoint = seen.rounded(model, tmp_path / name, found, scheme=name, group_size=group_size)
        for layer in range(model.text.layers):
            for place in model.family.smooth:
                wanted = 0.0
                for linear in place.into:
                    path = model.family.linear_path(layer, linear)
                    exact = model.module.get_parameter(f"{path}.weight").double()
                    change = torch.from_numpy(dequantized(checkpoint.packed(path))) - exact
                    squares = (read[path].double() @ change.T).square().sum(1).numpy()
                    gradients = report["layers"][layer]["linears"][linear]["mean_sq"]
                    for kind in (ANSWER, VISION, PROMPT):
                        total = squares[classes == kind].sum()
                        wanted += gradients[TOKEN_CLASSES[kind]] * total / len(classes)
                predicted = errors[layer, place.unit][bits]
                assert predicted == pytest.approx(wanted, rel=TOKEN_BY_TOKEN)


@pytest.mark.parametrize("switches", WAYS, ids=lambda way: "-".join(way.values()))
def test_an_average_of_three_and_of_four_are_the_plain_formats(
    tmp_path: Path, switches: Mapping[str, Any]
) -> None:
    model = tiny_model()
    found = scales(model, **switches)
    for bits, scheme in ((3, "w3a16"), (4, "w4a16")):
        plain = seen.rounded(model, tmp_path / f"{bits}", found, scheme=scheme)
        mixed = seen.rounded(model, tmp_path / f"{bits}m", found, mixed=MixedBits(avg_bits=bits))
        assert tensors_of(mixed.folder) == tensors_of(plain.folder)
        told = info_of(mixed)
        assert told.pop("mixed")["average_bits"] == bits
        assert told == info_of(plain)


@pytest.mark.parametrize("switches", WAYS, ids=lambda way: "-".join(way.values()))
def test_every_unit_of_a_mixture_is_read_back_at_its_own_width(
    tmp_path: Path, switches: Mapping[str, Any]
) -> None:
    model = tiny_model()
    found = seen.rounded(
        model, tmp_path / "c", scales(model, **switches), mixed=MixedBits(avg_bits=3.5)
    )
    info = info_of(found)
    assert info["scheme"]["name"] == "w3a16+w4a16"
    assert 3 < info["scheme"]["bits"] <= 3.5
    settings = json.loads((found.folder / "config.json").read_text())["quantization_config"]
    assert settings["bits"] == info["scheme"]["bits"]
    widths = {(row["layer"], row["unit"]): row["bits"] for row in info["mixed"]["units"]}
    assert set(widths.values()) == {3, 4}
    exact = fake_quant_model(found).module
    for (layer, unit), bits in widths.items():
        for linear in next(p.into for p in model.family.smooth if p.unit == unit):
            path = model.family.linear_path(layer, linear)
            packed = found.packed(path)
            assert packed.bits == bits
            assert found.records[path].scheme.weight_bits == bits
            wanted = torch.from_numpy(dequantized(packed)).float()
            assert torch.equal(exact.get_parameter(f"{path}.weight"), wanted)
    again = QuantCheckpoint.open(found.folder, verify=True)
    assert again.scheme_name == "w3a16+w4a16"


@pytest.mark.parametrize("after", [1, 3], ids=["while-predicting", "while-rounding"])
@pytest.mark.parametrize("switches", WAYS[:3], ids=lambda way: "-".join(way.values()))
def test_a_killed_mixture_goes_on_and_ends_in_the_same_bytes(
    tmp_path: Path, switches: Mapping[str, Any], after: int
) -> None:
    model = tiny_model()
    found = scales(model, **switches)
    seen.check_resumed(model, tmp_path, found, after=after, mixed=MixedBits(avg_bits=3.5))


def test_a_mixture_by_name_looks_at_no_data(tmp_path: Path) -> None:
    model = tiny_model()
    found = quantize(
        model,
        random_scales(model),
        scheme=SCHEMES["w3a16"],
        group_size=64,
        out=tmp_path / "c",
        mixed=MixedBits(patterns=(("mlp.down_proj", 4),)),
    )
    bits = {
        name.rpartition(".")[2]: record.scheme.weight_bits for name, record in found.records.items()
    }
    assert {name for name, width in bits.items() if width == 4} == {"down_proj"}
    assert found.info["mixed"]["predicted"] is None


def test_scales_without_gradients_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    found = ChannelScales(
        scales={}, sensitivity={}, calib={"switches": Switches(method="rtn").resolved()}
    )
    with pytest.raises(UsageError, match="Widths are chosen by gradients") as caught:
        seen.rounded(model, tmp_path / "c", found, mixed=MixedBits(avg_bits=3.5))
    assert caught.value.code == "E2002"


@pytest.mark.parametrize("given", [None, Samples(inputs=[])])
def test_a_choice_without_samples_is_refused(tmp_path: Path, given: Samples | None) -> None:
    model = tiny_model()
    with pytest.raises(UsageError, match="no calibration data to look at") as caught:
        quantize(
            model,
            scales(model),
            scheme=SCHEMES["w3a16"],
            group_size=64,
            out=tmp_path / "c",
            samples=given,
            mixed=MixedBits(avg_bits=3.5),
        )
    assert caught.value.code == "E2018"
