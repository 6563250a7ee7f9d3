"""A checkpoint is read with numpy alone, and every check of the reader has a file that fails it."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import FormatError, IncompatibleError, MbqError
from mbq_export.schemes.base import CHANNEL
from mbq_export.schemes.oracle import dequantized
from mbq_export.tensor_file import BFLOAT16
from tests.damaged_checkpoint import (
    ACTIVATION,
    BAD,
    BAD_CHANNELS,
    OUT,
    QUERY,
    SHARD,
    edit,
    edit_linear,
    edit_scheme,
    edit_tensor,
    put,
)
from tests.tiny import Tiny, load_tiny, tiny_checkpoint


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    model = load_tiny(folder / "model")
    tiny_checkpoint(folder / "w3", model)
    tiny_checkpoint(folder / "none", model, scheme=None)
    tiny_checkpoint(folder / "w4a8", model, scheme="w4a8", group_size=CHANNEL)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(written / "w3", tmp_path / "w3")
    return tmp_path / "w3"


@pytest.fixture
def channels(written: Path, tmp_path: Path) -> Path:
    """A checkpoint that rounds activations, one scale per channel, for a test to damage."""
    shutil.copytree(written / "w4a8", tmp_path / "w4a8")
    return tmp_path / "w4a8"


def test_linears_come_in_model_order(written: Path) -> None:
    checkpoint = QuantCheckpoint.open(written / "w3")
    kinds = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
    kinds += " mlp.gate_proj mlp.up_proj mlp.down_proj"
    assert checkpoint.linears == tuple(
        f"model.language_model.layers.{layer}.{kind}" for layer in (0, 1) for kind in kinds.split()
    )
    assert checkpoint.scheme_name == "w3a16"
    assert checkpoint.group_size == 64


def test_packed_linear_has_the_shapes_of_the_format(written: Path) -> None:
    weight = QuantCheckpoint.open(written / "w3").packed(QUERY)
    assert (weight.n, weight.k, weight.bits, weight.group_size) == (128, 128, 3, 64)
    assert weight.words.dtype == np.uint32
    assert weight.words.shape == (128, 12)
    assert weight.scales.shape == (128, 2)
    assert weight.zeros is not None
    assert weight.bias is not None
    assert weight.zeros.shape == (128, 2)
    assert weight.bias.shape == (128,)


def test_rows_are_those_of_the_whole(written: Path) -> None:
    checkpoint = QuantCheckpoint.open(written / "w3")
    whole, part = checkpoint.packed(QUERY), checkpoint.rows(QUERY, 32, 48)
    assert part.n == 16
    np.testing.assert_array_equal(dequantized(part), dequantized(whole)[32:48])
    assert part.bias is not None
    assert whole.bias is not None
    np.testing.assert_array_equal(part.bias, whole.bias[32:48])
    assert checkpoint.rows(OUT, 0, 4).bias is None


def test_untouched_tensors_are_there_and_parts_of_linears_are_not_among_them(written: Path) -> None:
    checkpoint = QuantCheckpoint.open(written / "w3")
    assert "model.language_model.norm.weight" in checkpoint.tensors
    assert "model.image_newline" in checkpoint.tensors
    assert not [name for name in checkpoint.tensors if ".qweight" in name or name.startswith(QUERY)]
    assert checkpoint.tensor(f"{QUERY}.bias").shape == (128,)
    assert not checkpoint.has(f"{QUERY}.weight")
    assert not checkpoint.has(f"{QUERY}.qweight")


def test_tied_head_is_the_embedding(written: Path) -> None:
    checkpoint = QuantCheckpoint.open(written / "w3")
    embedding = checkpoint.tensor("model.language_model.embed_tokens.weight")
    assert checkpoint.has("lm_head.weight")
    assert "lm_head.weight" not in checkpoint.tensors
    np.testing.assert_array_equal(checkpoint.tensor("lm_head.weight"), embedding)


def test_bfloat16_is_widened_to_float32(tmp_path: Path) -> None:
    model = load_tiny(tmp_path / "model", Tiny(tied=False, dtype="bfloat16"))
    checkpoint = tiny_checkpoint(tmp_path / "w4", model, scheme="w4a16")
    name = "lm_head.weight"
    assert checkpoint.files[name].entries[name].dtype == "BF16"
    assert checkpoint.tensor(name).dtype == np.float32
    np.testing.assert_array_equal(checkpoint.tensor(name), model.module.get_parameter(name).numpy())


def test_baseline_has_no_quantized_linear_and_all_weights(written: Path) -> None:
    checkpoint = QuantCheckpoint.open(written / "none")
    assert checkpoint.scheme_name == "none"
    assert checkpoint.group_size == 0
    assert checkpoint.linears == ()
    assert checkpoint.tensor(f"{QUERY}.weight").shape == (128, 128)
    assert "quantization_config" not in checkpoint.config


def test_other_tools_are_told_the_method(written: Path) -> None:
    found = QuantCheckpoint.open(written / "w3").config["quantization_config"]
    skipped = found.pop("modules_to_not_convert")
    assert found == {
        "quant_method": "mbq", "bits": 3, "group_size": 64, "sym": False,
        "format": "mbq-dense", "version": 1,
    }  # fmt: skip
    assert skipped == [
        "lm_head", "model.language_model.embed_tokens", "model.multi_modal_projector.*",
        "model.vision_tower.*",
    ]  # fmt: skip


def test_reading_needs_no_torch(written: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mbq_export.checkpoint import QuantCheckpoint;"
        "c = QuantCheckpoint.open(Path(sys.argv[1])); c.packed(c.linears[0]); c.tensor(c.tensors[0]);"
        "sys.exit(bool({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code, str(written / "w3")], check=True, timeout=60)


def test_nothing_in_the_file_depends_on_place_or_time(written: Path, tmp_path: Path) -> None:
    text = (written / "w3/mbq.json").read_text()
    assert str(written) not in text
    model = load_tiny(tmp_path / "elsewhere")
    tiny_checkpoint(tmp_path / "again", model)
    for path in (written / "w3").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(("code", "message", "damage"), BAD.values(), ids=BAD)
def test_damaged_checkpoint_is_refused(
    folder: Path, code: str, message: str, damage: Callable[[Path], object]
) -> None:
    damage(folder)
    with pytest.raises(FormatError, match=message) as caught:
        QuantCheckpoint.open(folder)
    assert caught.value.code == code
    assert caught.value.fix


@pytest.mark.parametrize(("code", "message", "damage"), BAD_CHANNELS.values(), ids=BAD_CHANNELS)
def test_damaged_checkpoint_of_rounded_activations_is_refused(
    channels: Path, code: str, message: str, damage: Callable[[Path], object]
) -> None:
    damage(channels)
    with pytest.raises(FormatError, match=message) as caught:
        QuantCheckpoint.open(channels)
    assert caught.value.code == code
    assert caught.value.fix


def test_rounded_activations_are_not_claimed_by_weight_only_linears(folder: Path) -> None:
    edit_scheme(activation=ACTIVATION)(folder)
    with pytest.raises(FormatError, match="its linears are of None"):
        QuantCheckpoint.open(folder)


def test_a_channel_has_one_float32_scale_and_no_zero_point(channels: Path) -> None:
    checkpoint = QuantCheckpoint.open(channels)
    weight = checkpoint.packed(QUERY)
    assert (weight.n, weight.k, weight.bits, weight.group_size) == (128, 128, 4, CHANNEL)
    assert (weight.scales.dtype, weight.scales.shape) == (np.float32, (128, 1))
    assert weight.zeros is None
    assert f"{QUERY}.zeros" not in checkpoint.files
    assert checkpoint.rows(QUERY, 8, 12).scales.tolist() == weight.scales[8:12].tolist()
    assert checkpoint.info["scheme"] == {
        "name": "w4a8", "bits": 4, "group_size": 0, "symmetric": True,
        "rounding": "half_even", "scale_dtype": "float32", "activation": ACTIVATION,
    }  # fmt: skip


def test_bad_linear_is_named(folder: Path) -> None:
    edit_tensor(f"{OUT}.scales", lambda a: put(a, -1))(folder)
    with pytest.raises(FormatError) as caught:
        QuantCheckpoint.open(folder)
    assert caught.value.where == [OUT]


@pytest.mark.parametrize("name", ["file flipped", "zero of 8"])
def test_content_is_looked_at_only_when_asked(folder: Path, name: str) -> None:
    BAD[name][2](folder)
    QuantCheckpoint.open(folder, verify=False)


def test_bad_values_are_found_on_use_without_verification(folder: Path) -> None:
    BAD["zero of 8"][2](folder)
    with pytest.raises(FormatError, match="reach 8"):
        QuantCheckpoint.open(folder, verify=False).packed(QUERY)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (edit(schema="mbq-export/checkpoint@2"), "E7004"),
        (edit(layout={"name": "dense", "version": 2}), "E7005"),
    ],
)
def test_newer_files_need_a_newer_release(
    folder: Path, damage: Callable[[Path], object], code: str
) -> None:
    damage(folder)
    with pytest.raises(IncompatibleError) as caught:
        QuantCheckpoint.open(folder)
    assert caught.value.code == code


def test_unknown_keys_are_kept(folder: Path) -> None:
    edit_linear(hessian="plain")(folder)
    edit(later={"a": 1})(folder)
    info = QuantCheckpoint.open(folder).info
    assert info["later"] == {"a": 1}
    assert info["linears"][0]["hessian"] == "plain"


@pytest.mark.parametrize("ask", ["tensor", "packed"])
def test_unknown_names_are_refused(written: Path, ask: str) -> None:
    checkpoint = QuantCheckpoint.open(written / "w3", verify=False)
    with pytest.raises(FormatError, match=r"'no\.such'") as caught:
        getattr(checkpoint, ask)("no.such")
    assert caught.value.code == "E4103"


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("schema", "scheme", "layout", "model", "linears", "files", "tied", "method", "lm_head")


@given(key=st.sampled_from(KEYS), field=st.none() | st.integers(0, 9), value=JUNK)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_any_junk_in_mbq_json_is_read_or_refused(
    folder: Path, key: str, field: int | None, value: object
) -> None:
    path = folder / "mbq.json"
    original = path.read_bytes()
    info = json.loads(original)
    inner = info[key][0] if isinstance(info[key], list) else info[key]
    if field is not None and isinstance(inner, dict) and inner:
        inner[sorted(inner)[field % len(inner)]] = value
    else:
        info[key] = value
    path.write_text(json.dumps(info))
    with contextlib.suppress(MbqError):
        QuantCheckpoint.open(folder)
    path.write_bytes(original)


def test_cut_anywhere_it_is_refused(folder: Path) -> None:
    for name in (SHARD, "mbq.json", "config.json"):
        whole = (folder / name).read_bytes()
        for part in range(0, len(whole), max(1, len(whole) // 32)):
            (folder / name).write_bytes(whole[:part])
            with pytest.raises(MbqError):
                QuantCheckpoint.open(folder)
        (folder / name).write_bytes(whole)
    QuantCheckpoint.open(folder)


def test_bit_flipped_anywhere_it_is_noticed(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        if path.name == "mbq.json":
            continue
        whole = path.read_bytes()
        for position in rng.integers(0, len(whole), 8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(FormatError, match="other content"):
                QuantCheckpoint.open(folder)
        path.write_bytes(whole)


def test_stored_bfloat16_bias_is_widened(folder: Path) -> None:
    edit_tensor(f"{QUERY}.bias", lambda a: a.astype(BFLOAT16))(folder)
    bias = QuantCheckpoint.open(folder).packed(QUERY).bias
    assert bias is not None
    assert bias.dtype == np.float32
