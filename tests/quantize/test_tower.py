"""The vision tower in 8 bits: folding changes nothing, codes and rounded rows are what every later form computes."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mbq_export.backends.torch import fake_quant_model, kernel_engines, vision_engine
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import FormatError, GateError, UsageError
from mbq_export.families.base import LoadedModel
from mbq_export.families.tower import scopes_of
from mbq_export.quantize import quantize, tower
from mbq_export.quantize.feedback import Samples
from mbq_export.quantize.tower import (
    fold_places,
    projector_error,
    quantize_tower,
    smoothing,
    tower_scheme,
)
from mbq_export.schemes import SCHEMES
from tests.quantize.seen import bytes_of, samples
from tests.questions import tiny_model

FOLDED_RELATIVE = 1e-5
"""Folding is exact but for float32 rounding of two multiplications per weight."""
FLOAT32_RELATIVE = 1e-5
"""Sums in another order, behind one layer whose rounded rows are the same to the bit."""
ROUNDED_RELATIVE = 0.05
"""Eight bits leave a random tower's features where they were; four would not."""


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model()


@pytest.fixture(scope="module")
def checkpoint(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> QuantCheckpoint:
    return quantized(model, tmp_path_factory.mktemp("tower") / "c")


def quantized(
    model: LoadedModel, out: Path, *, given: Samples | None = None, scheme: str = "w3a16"
) -> QuantCheckpoint:
    untouched = ChannelScales(
        scales={}, sensitivity={}, calib={"switches": Switches(method="rtn").resolved()}
    )
    return quantize(
        model,
        untouched,
        scheme=SCHEMES[scheme],
        group_size=64 if scheme == "w3a16" else 0,
        out=out,
        samples=given or samples(model),
        tower=SCHEMES["w8a8"],
    )


def pictures(model: LoadedModel) -> list[torch.Tensor]:
    return [torch.from_numpy(each.pixel_values) for each in samples(model).held_out]


def own(model: LoadedModel) -> nn.Module:
    return copy.deepcopy(model.family.vision_module(model))


def test_random_scales_fold_without_changing_the_features(model: LoadedModel) -> None:
    places = model.family.tower_places(model)
    exact, folded = model.family.vision_module(model), own(model)
    scopes = scopes_of(model, exact)
    random = torch.Generator().manual_seed(3)
    scales = {}
    for place in places:
        columns = folded.get_submodule(scopes[place.into[0]]).get_parameter("weight").shape[1]
        if place.source is not None:
            scales[place.into[0]] = 4 ** (2 * torch.rand(columns, generator=random) - 1)
    assert len(scales) == 3, "norm to q, k and v; v to out; norm to fc1; nothing before fc2"
    fold_places(folded, places, scales, scopes)
    assert projector_error(exact, folded, pictures(model)) <= FOLDED_RELATIVE
    for path in scales:
        was, now = (
            each.get_submodule(scopes[path]).get_parameter("weight") for each in (exact, folded)
        )
        assert not torch.equal(was, now)


def test_half_of_a_fold_changes_the_features(model: LoadedModel) -> None:
    """What the test before would miss if it could not fail: the bias of a norm left undivided."""
    places = model.family.tower_places(model)
    exact, folded = model.family.vision_module(model), own(model)
    scopes = scopes_of(model, exact)
    first = places[0]
    fold_places(folded, places[:1], {first.into[0]: torch.linspace(0.5, 2, 32)}, scopes)
    norm = folded.get_submodule(scopes[first.source or ""])
    with torch.no_grad():
        norm.get_parameter("bias").mul_(torch.linspace(0.5, 2, 32))
    assert projector_error(exact, folded, pictures(model)) > 100 * FOLDED_RELATIVE


def test_scales_share_what_activations_and_weights_reach(model: LoadedModel) -> None:
    places = model.family.tower_places(model)
    part = own(model)
    scopes = scopes_of(model, model.family.vision_module(model))
    seen = pictures(model)
    found = smoothing(part, places, scopes, seen)
    query = places[0].into[0]
    reached: list[torch.Tensor] = []
    part.get_submodule(scopes[query]).register_forward_pre_hook(
        lambda _m, args: reached.append(args[0].flatten(0, -2).abs().amax(0))
    )
    with torch.no_grad():
        for tiles in seen:
            part(tiles)
    x = torch.stack(reached).amax(0)
    weights = [part.get_submodule(scopes[path]).get_parameter("weight") for path in places[0].into]
    w = torch.stack([each.abs().amax(0) for each in weights]).amax(0)
    wanted = (x / w).sqrt()
    ratio = found[query] / wanted
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-5)
    assert float(found[query].max() * found[query].min()) == pytest.approx(1, rel=1e-5)


def test_checkpoint_holds_the_tower_and_keeps_everything_else(
    model: LoadedModel, checkpoint: QuantCheckpoint
) -> None:
    paths = [path for place in model.family.tower_places(model) for path in place.into]
    assert list(checkpoint.tower) == paths
    assert len(paths) == 6
    for path in paths:
        record = checkpoint.records[path]
        assert (record.scheme.name, record.group_size, record.bias) == ("w8a8", 0, True)
        assert not checkpoint.has(f"{path}.weight")
    assert checkpoint.info["scheme"]["activation"] is None
    assert checkpoint.info["vision"]["linears"] == paths
    projector = "model.multi_modal_projector.linear_1.weight"
    wanted = model.module.get_parameter(projector).numpy()
    assert np.array_equal(checkpoint.tensor(projector).astype(np.float32), wanted)
    skipped = {row["pattern"]: row["modules"] for row in checkpoint.info["skipped"]}
    assert skipped["model.vision_tower.*"] == 2, "patch and position embedding"


def test_oracle_computes_each_linear_as_the_format_says(
    model: LoadedModel, checkpoint: QuantCheckpoint
) -> None:
    oracle = fake_quant_model(checkpoint)
    rng = np.random.default_rng(0)
    for path in checkpoint.tower:
        packed = checkpoint.packed(path)
        x = rng.standard_normal((5, packed.k)).astype(np.float32)
        with torch.no_grad():
            found = oracle.module.get_submodule(path)(torch.from_numpy(x)).numpy()
        np.testing.assert_array_equal(found, SCHEMES["w8a8"].linear_reference(x, packed))


def test_error_on_record_is_that_of_the_oracle(
    model: LoadedModel, checkpoint: QuantCheckpoint
) -> None:
    oracle = fake_quant_model(checkpoint)
    found = projector_error(
        model.family.vision_module(model), oracle.family.vision_module(oracle), pictures(model)
    )
    told = checkpoint.info["vision"]["projector"]
    assert told["error"] == pytest.approx(found, rel=0.05), "a flipped code here or there"
    assert 0 < found <= ROUNDED_RELATIVE
    assert told["tiles"] == sum(len(each) for each in pictures(model))


def test_engine_of_the_packed_decoder_rounds_the_tower_too(checkpoint: QuantCheckpoint) -> None:
    tiles = np.random.default_rng(1).standard_normal((2, 3, 48, 48)).astype(np.float32)
    packed = kernel_engines(checkpoint, device="cpu", slots=32).vision
    oracle = vision_engine(fake_quant_model(checkpoint))
    found, wanted = (
        each.run({"pixel_values": tiles})["image_features"] for each in (packed, oracle)
    )
    np.testing.assert_array_equal(found, wanted)


def test_same_pictures_give_the_same_bytes_and_leave_the_model(
    model: LoadedModel, checkpoint: QuantCheckpoint, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    again = quantized(model, tmp_path / "c")
    assert bytes_of(again.folder) == bytes_of(checkpoint.folder)
    assert all(torch.equal(before[name], t) for name, t in model.module.state_dict().items())


def test_decoder_that_rounds_activations_too_is_read_back(
    model: LoadedModel, tmp_path: Path
) -> None:
    found = quantized(model, tmp_path / "c", scheme="w4a8")
    assert QuantCheckpoint.open(found.folder).info["scheme"]["activation"]["bits"] == 8


def test_error_beyond_the_limit_is_told(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quiet = quantize_tower(model, SCHEMES["w8a8"], samples(model))
    assert ("MBQ-W1122" in caplog.text) is (quiet.facts["projector"]["error"] > tower.LIMIT)
    monkeypatch.setattr(tower, "LIMIT", quiet.facts["projector"]["error"] / 2)
    quantize_tower(model, SCHEMES["w8a8"], samples(model))
    assert "MBQ-W1122: --vision-bits 8 moves the projector's output by" in caplog.text


@pytest.mark.parametrize("given", [None, Samples(inputs=())])
def test_a_tower_without_pictures_is_refused(model: LoadedModel, given: Samples | None) -> None:
    with pytest.raises(UsageError, match="no pictures") as caught:
        quantize_tower(model, SCHEMES["w8a8"], given)
    assert caught.value.code == "E2018"


@pytest.mark.parametrize(
    ("name", "value", "kind", "code"),
    [("weight", float("nan"), FormatError, "E4110"), ("bias", 3e38, GateError, "E1103")],
)
def test_a_tower_that_overflows_is_refused(
    model: LoadedModel, name: str, value: float, kind: type[Exception], code: str
) -> None:
    broken = replace(model, module=copy.deepcopy(model.module))
    norm = broken.module.get_submodule("model.vision_tower.encoder.layers.0.layer_norm1")
    with torch.no_grad():
        norm.get_parameter(name).fill_(value)
        norm.get_parameter("weight").mul_(1e38 if name == "bias" else 1)
    with pytest.raises(kind) as caught:
        quantize_tower(broken, SCHEMES["w8a8"], samples(model))
    assert caught.value.code == code  # type: ignore[attr-defined]


def test_widths_are_16_and_8() -> None:
    found: Sequence[object] = [tower_scheme(16), tower_scheme(8)]
    assert found == [None, SCHEMES["w8a8"]]
    with pytest.raises(UsageError, match="Unknown --vision-bits 4"):
        tower_scheme(4)
