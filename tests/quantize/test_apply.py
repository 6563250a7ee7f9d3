"""One block: folded exactly, rounded by the scheme, packed; nothing else changes."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbq_export.blocks.fold import fold
from mbq_export.blocks.stream import BlockStream
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.errors import FormatError
from mbq_export.families.base import LoadedModel
from mbq_export.quantize.apply import (
    Rounding,
    check_finite,
    content_hash,
    exact,
    note_zeros,
    quantize_block,
    relative_error,
)
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.affine import dequantize
from mbq_export.schemes.affine import quantize as round_to_codes
from mbq_export.schemes.layouts.dense import unpack
from mbq_export.tensor_file import BFLOAT16
from tests.tiny import Tiny, load_tiny, random_scales

W3 = Rounding(scheme=SCHEMES["w3a16"], group_size=64)
KEEP = Rounding(scheme=None, group_size=0)
PATH = "model.language_model.layers.1"
UNTOUCHED = ChannelScales(
    scales={}, sensitivity={}, calib={"switches": Switches(method="rtn").resolved()}
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(tmp_path_factory.mktemp("tiny") / "model")


def test_codes_are_those_of_the_folded_weight(model: LoadedModel) -> None:
    scales = random_scales(model)
    stream = BlockStream(model)
    found = quantize_block(model, stream, 1, scales, W3)
    with stream.block(1) as block:
        fold(block, scales.of_block(1), smooth=model.family.smooth, text=model.text)
        for linear in model.family.linears:
            weight = block.get_parameter(f"{linear}.weight")
            codes = round_to_codes(weight, scheme=SCHEMES["w3a16"], group_size=64)
            words = found.tensors[f"{PATH}.{linear}.qweight"].view(np.uint32)
            unpacked = unpack(words, bits=3, columns=weight.shape[1])
            np.testing.assert_array_equal(unpacked, codes.codes.numpy())
            np.testing.assert_array_equal(
                found.tensors[f"{PATH}.{linear}.scales"], codes.scales.numpy()
            )
            np.testing.assert_array_equal(
                found.tensors[f"{PATH}.{linear}.zeros"], codes.zeros.numpy()
            )


def test_rows_describe_the_linears_in_model_order(model: LoadedModel) -> None:
    units = [{"layer": 1, "unit": "down", "alpha": 0.35}, {"layer": 0, "unit": "qkv", "alpha": 1.0}]
    scales = ChannelScales(
        scales=random_scales(model).scales,
        sensitivity={},
        calib={"switches": Switches(method="mbq").resolved(), "units": units},
    )
    rows = quantize_block(model, BlockStream(model), 1, scales, W3).linears
    assert [row["name"] for row in rows] == [f"{PATH}.{name}" for name in model.family.linears]
    down = rows[-1]
    assert (down["n"], down["k"], down["bias"], down["alpha"]) == (128, 256, False, 0.35)
    assert (down["scheme"], down["group_size"], down["clamped_scales"]) == ("w3a16", 64, 0)
    assert rows[0]["alpha"] is None
    assert rows[0]["bias"]
    assert all(0.1 < row["error"]["weight"] < 0.3 for row in rows)


def test_source_block_does_not_change(model: LoadedModel) -> None:
    before = content_hash(model.module.state_dict())
    quantize_block(model, BlockStream(model), 0, random_scales(model), W3)
    assert content_hash(model.module.state_dict()) == before


def test_untouched_tensors_keep_the_dtype_of_the_file(model: LoadedModel) -> None:
    found = quantize_block(model, BlockStream(model), 1, UNTOUCHED, W3).tensors
    norm = found[f"{PATH}.input_layernorm.weight"]
    assert norm.dtype == np.float16
    loaded = model.module.get_parameter(f"{PATH}.input_layernorm.weight").numpy()
    np.testing.assert_array_equal(norm.astype(np.float32), loaded)


def test_folded_tensors_are_float32_because_rounding_them_would_change_the_function(
    model: LoadedModel,
) -> None:
    scales = random_scales(model)
    found = quantize_block(model, BlockStream(model), 1, scales, W3).tensors
    norm = found[f"{PATH}.input_layernorm.weight"]
    loaded = model.module.get_parameter(f"{PATH}.input_layernorm.weight").numpy()
    assert norm.dtype == np.float32
    np.testing.assert_array_equal(norm, loaded / scales.scales["layers.1.qkv.e"])
    assert found[f"{PATH}.self_attn.v_proj.bias"].dtype == np.float32
    assert found[f"{PATH}.self_attn.q_proj.bias"].dtype == np.float16


def test_kept_block_is_the_file_s_own(model: LoadedModel) -> None:
    block = quantize_block(model, BlockStream(model), 1, UNTOUCHED, KEEP)
    assert block.linears == ()
    assert block.error == 0
    assert set(block.tensors) == set(model.weights.under(PATH))
    for name, array in block.tensors.items():
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, model.weights.read(name).numpy())


def test_streamed_and_loaded_blocks_give_the_same(model: LoadedModel) -> None:
    streamed = model.family.load(model.folder, meta_blocks=True)
    one = quantize_block(model, BlockStream(model), 1, random_scales(model), W3)
    two = quantize_block(streamed, BlockStream(streamed), 1, random_scales(model), W3)
    assert one.linears == two.linears
    assert one.sha256 == two.sha256
    assert {n: a.tobytes() for n, a in one.tensors.items()} == {
        n: a.tobytes() for n, a in two.tensors.items()
    }


def test_compatible_rounding_works_in_the_dtype_of_the_file(model: LoadedModel) -> None:
    compat = Rounding(scheme=SCHEMES["w3a16"], group_size=64, compat=True)
    found = quantize_block(model, BlockStream(model), 1, UNTOUCHED, compat).tensors
    name = f"{PATH}.mlp.gate_proj"
    stored = model.weights.read(f"{name}.weight").reshape(256, 2, 64)
    assert stored.dtype == torch.float16
    span = stored.amax(-1) - stored.amin(-1)
    np.testing.assert_array_equal(found[f"{name}.scales"], (span / 7).numpy())


@pytest.mark.parametrize("where", ["self_attn.k_proj.weight", "input_layernorm.weight"])
def test_weight_that_is_not_finite_is_named_with_its_place(tmp_path: Path, where: str) -> None:
    broken = load_tiny(tmp_path / "model")
    tensor = broken.module.get_parameter(f"{PATH}.{where}")
    with torch.no_grad():
        tensor.view(-1)[[70, 71]] = torch.tensor([float("nan"), float("inf")])
    with pytest.raises(
        FormatError, match=f"2 of {tensor.numel()} values of {PATH}.{where}"
    ) as caught:
        quantize_block(broken, BlockStream(broken), 1, random_scales(broken), W3)
    assert caught.value.code == "E4110"
    assert (
        "the first is at [0, 70]" in caught.value.why or "the first is at [70]" in caught.value.why
    )


def test_range_beyond_fp16_names_the_linear(tmp_path: Path) -> None:
    huge = load_tiny(tmp_path / "model", Tiny(dtype="bfloat16"))
    with torch.no_grad():
        huge.module.get_parameter(f"{PATH}.mlp.up_proj.weight")[3, 5] = 1e30
    with pytest.raises(FormatError) as caught:
        quantize_block(huge, BlockStream(huge), 1, UNTOUCHED, W3)
    assert caught.value.code == "E4112"
    assert caught.value.where == [f"{PATH}.mlp.up_proj"]


def test_scale_that_fits_no_unit_is_refused_with_its_place(model: LoadedModel) -> None:
    wrong = ChannelScales(
        scales={"layers.1.qkv.e": np.ones(7, np.float32)}, sensitivity={}, calib=UNTOUCHED.calib
    )
    with pytest.raises(FormatError) as caught:
        quantize_block(model, BlockStream(model), 1, wrong, W3)
    assert caught.value.code == "E4314"
    assert caught.value.where == [PATH, "qkv"]


def test_zero_tensor_is_warned_about_and_packs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zero = load_tiny(tmp_path / "model")
    with torch.no_grad():
        zero.module.get_parameter(f"{PATH}.mlp.up_proj.weight").zero_()
    with caplog.at_level(logging.WARNING):
        found = quantize_block(zero, BlockStream(zero), 1, UNTOUCHED, W3)
    assert f"MBQ-W4111: all weights of {PATH}.mlp.up_proj are zero" in caplog.text
    assert not found.tensors[f"{PATH}.mlp.up_proj.qweight"].any()
    assert (found.tensors[f"{PATH}.mlp.up_proj.scales"] == 2**-14).all()
    assert found.linears[-2]["clamped_scales"] == 512
    assert found.linears[-2]["error"]["weight"] == 0


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (np.s_[:, 11], "MBQ-W4111: l: 1 input channels are dead"),
        (np.s_[5], "MBQ-W4111: l: 1 rows are constant, 2 groups are smaller than a scale can be"),
    ],
)
def test_zeros_inside_a_weight_are_counted(
    place: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    weight = torch.randn(8, 64)
    weight[place] = 0
    with caplog.at_level(logging.WARNING):
        note_zeros("l", weight, round_to_codes(weight, scheme=SCHEMES["w3a16"], group_size=32))
    assert message in caplog.text


def test_healthy_weights_are_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.randn(8, 64)
    with caplog.at_level(logging.WARNING):
        note_zeros("l", weight, round_to_codes(weight, scheme=SCHEMES["w3a16"], group_size=32))
    assert not caplog.text


@pytest.mark.parametrize(
    ("tiny", "values", "dtype"),
    [
        (Tiny(), [1.0, 0.5, 65504.0], np.dtype(np.float16)),
        (Tiny(), [1.0, 1 / 3, 2.0], np.dtype(np.float32)),
        (Tiny(), [1.0, 2.0, 65520.0], np.dtype(np.float32)),
        (Tiny(), [1.0, 2.0, 2.0**-25], np.dtype(np.float32)),
        (Tiny(dtype="bfloat16"), [1.0, 2.0, 1e30], np.dtype(np.float32)),
        (Tiny(dtype="bfloat16"), [1.0, 2.0, 2.0**100], BFLOAT16),
        (Tiny(dtype="float32"), [1.0, 2.0, 4.0], np.dtype(np.float32)),
    ],
)
def test_stored_dtype_is_the_file_s_if_it_holds_the_value(
    tmp_path: Path, tiny: Tiny, values: list[float], dtype: np.dtype[np.generic]
) -> None:
    model = load_tiny(tmp_path / "model", tiny)
    tensor = torch.tensor(values, dtype=torch.float32)
    stored = exact(tensor, model, "model.image_newline")
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored.astype(np.float32), tensor.numpy())


def test_relative_error_counts_the_change_against_the_weight() -> None:
    weight = torch.linspace(-1, 1, 64).reshape(2, 32)
    codes = round_to_codes(weight, scheme=SCHEMES["w3a16"], group_size=32)
    change = (dequantize(codes) - weight).double()
    expected = float(change.norm() / weight.double().norm())
    assert relative_error(codes, weight) == pytest.approx(expected, rel=1e-5)


def test_hash_is_of_values_and_names_and_not_of_dtype() -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(2)}
    same = content_hash({"b": torch.zeros(2), "a": torch.ones(2, 3, dtype=torch.float16)})
    assert content_hash(tensors) == same
    assert content_hash(tensors) != content_hash({"a": torch.ones(3, 2), "b": torch.zeros(2)})
    assert content_hash(tensors) != content_hash({"a": torch.ones(2, 3), "c": torch.zeros(2)})


def test_finite_weights_pass() -> None:
    check_finite({"a": torch.tensor([0.0, -1e38])})
