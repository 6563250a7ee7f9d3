"""A checkpoint is read with numpy alone, and every check of the reader has a file that fails it."""

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import FormatError, IncompatibleError, MbqError
from mbq_export.schemes.oracle import dequantized
from mbq_export.tensor_file import BFLOAT16, TensorFile, write_tensors
from tests.tiny import Tiny, load_tiny, tiny_checkpoint

QUERY = "model.language_model.layers.0.self_attn.q_proj"
OUT = "model.language_model.layers.1.self_attn.o_proj"
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    model = load_tiny(folder / "model")
    tiny_checkpoint(folder / "w3", model)
    tiny_checkpoint(folder / "none", model, scheme=None)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(written / "w3", tmp_path / "w3")
    return tmp_path / "w3"


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


def edit(**changes: Any) -> Callable[[Path], object]:
    """Change top-level keys of mbq.json; a function gets the old value."""

    def act(folder: Path) -> None:
        info = json.loads((folder / "mbq.json").read_text())
        for key, value in changes.items():
            info[key] = value(info[key]) if callable(value) else value
        (folder / "mbq.json").write_text(json.dumps(info))

    return act


def edit_linear(**changes: Any) -> Callable[[Path], object]:
    return edit(linears=lambda rows: [rows[0] | changes, *rows[1:]])


def edit_file(**changes: Any) -> Callable[[Path], object]:
    return edit(files=lambda rows: [*rows[:-1], rows[-1] | changes])


def edit_tensor(
    name: str, change: Callable[[NDArray[Any]], Any] | None
) -> Callable[[Path], object]:
    """Change or remove a tensor, and make hash and size fit, so that later checks are reached."""

    def act(folder: Path) -> None:
        file = TensorFile(folder / SHARD)
        tensors = {key: np.array(file.array(key)) for key in file.entries}
        old = tensors.pop(name)
        if change is not None:
            tensors[name] = np.asarray(change(old))
        write_tensors(folder / SHARD, tensors)
        rehash(folder)

    return act


def rehash(folder: Path) -> None:
    info = json.loads((folder / "mbq.json").read_text())
    for row in info["files"]:
        data = (folder / row["path"]).read_bytes()
        row |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "mbq.json").write_text(json.dumps(info))


def put(array: NDArray[Any], value: float) -> NDArray[Any]:
    array.flat[0] = value
    return array


def second_shard(folder: Path) -> None:
    """The same tensor once more, in a listed file."""
    write_tensors(folder / "model-00002.safetensors", {f"{QUERY}.scales": np.ones(1, np.float16)})
    row = {"path": "model-00002.safetensors", "bytes": 0, "sha256": ""}
    edit(files=lambda rows: [*rows, row])(folder)
    rehash(folder)


def linked(folder: Path) -> None:
    shutil.copyfile(folder / "config.json", folder.parent / "outside.json")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../outside.json")


BAD = {
    "no mbq.json": ("E4001", "There is no mbq.json", lambda f: (f / "mbq.json").unlink()),
    "not JSON": ("E4604", "not a strict JSON object", lambda f: (f / "mbq.json").write_text("{")),
    "huge": ("E4604", "has 67108865 bytes", lambda f: sparse(f / "mbq.json", (64 << 20) + 1)),
    "another schema": ("E4604", "schema is 'mbq-export/bundle@1'", edit(schema="mbq-export/bundle@1")),
    "no version": ("E4604", "its schema is 'mbq-export/checkpoint'", edit(schema="mbq-export/checkpoint")),
    "linears no list": ("E4604", "linears is not of type list", edit(linears={})),
    "linear no object": ("E4604", "an entry of linears is not an object", edit(linears=[1])),
    "n is text": ("E4604", "n in linears is not of type int", edit_linear(n="128")),
    "n is a flag": ("E4604", "n in linears is not of type int", edit_linear(n=True)),
    "no files": ("E4604", "files is not of type list", edit(files=None)),
    "tied to a number": ("E4604", "tied does not map", edit(tied={"lm_head.weight": 1})),
    "no scheme": ("E4604", "scheme is not of type dict", edit(scheme="w3a16")),
    "unknown scheme": ("E4604", "unknown scheme 'w5a16'", edit_linear(scheme="w5a16")),
    "listed twice": ("E4604", "is listed twice", edit(linears=lambda rows: [rows[0], *rows])),
    "group of 48": ("E4604", "128 x 128 weights in groups of 48", edit_linear(group_size=48)),
    "group of 0": ("E4604", "in groups of 0", edit_linear(group_size=0)),
    "negative n": ("E4604", "-1 x 128 weights", edit_linear(n=-1)),
    "unknown layout": ("E4604", "its layout is 'w3t'", edit(layout={"name": "w3t", "version": 1})),
    "path upwards": ("E4605", "leads upwards", edit_file(path="../w3/config.json")),
    "absolute path": ("E4605", "is absolute", edit_file(path="/etc/passwd")),
    "link outside": ("E4605", "is a link that leaves the folder", linked),
    "file missing": ("E4601", "There is no file", lambda f: (f / "tokenizer.json").unlink()),
    "file shorter": ("E4602", "bytes instead of", lambda f: cut(f / SHARD)),
    "file flipped": ("E4602", "other content", lambda f: flip(f / SHARD)),
    "config unlisted": (
        "E4604", "config.json is not among", edit(files=lambda rows: [r for r in rows if r["path"] != "config.json"])
    ),
    "tensor missing": ("E4103", f"There is no tensor '{QUERY}.zeros'", edit_tensor(f"{QUERY}.zeros", None)),
    "tensor in two files": ("E4105", "is in model-00001", second_shard),
    "wrong n": ("E4102", r"is I32 \(128, 12\)", edit_linear(n=64)),
    "wrong bits": ("E4102", r"is I32 \(128, 12\)", edit_linear(scheme="w4a16")),
    "wrong group": ("E4102", r"is F16 \(128, 2\)", edit_linear(group_size=128)),
    "words transposed": ("E4102", r"is I32 \(12, 128\)", edit_tensor(f"{QUERY}.qweight", np.transpose)),
    "scales in fp32": ("E4102", "is F32", edit_tensor(f"{QUERY}.scales", lambda a: a.astype(np.float32))),
    "zeros in I32": ("E4102", "is I32", edit_tensor(f"{QUERY}.zeros", lambda a: a.astype(np.int32))),
    "bias in I32": ("E4102", "expected F16 or BF16 or F32", edit_tensor(f"{QUERY}.bias", lambda a: a.astype(np.int32))),
    "zero of 8": ("E4411", "reach 8", edit_tensor(f"{QUERY}.zeros", lambda a: put(a, 8))),
    "scale of 0": ("E4411", "1 scales are not finite and positive", edit_tensor(f"{QUERY}.scales", lambda a: put(a, 0))),
    "scale NaN": ("E4411", "scales are not finite", edit_tensor(f"{QUERY}.scales", lambda a: put(a, np.nan))),
    "scale infinite": ("E4411", "scales are not finite", edit_tensor(f"{QUERY}.scales", lambda a: put(a, np.inf))),
}  # fmt: skip


@pytest.mark.parametrize(("code", "message", "damage"), BAD.values(), ids=BAD)
def test_damaged_checkpoint_is_refused(
    folder: Path, code: str, message: str, damage: Callable[[Path], object]
) -> None:
    damage(folder)
    with pytest.raises(FormatError, match=message) as caught:
        QuantCheckpoint.open(folder)
    assert caught.value.code == code
    assert caught.value.fix


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


def sparse(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_stored_bfloat16_bias_is_widened(folder: Path) -> None:
    edit_tensor(f"{QUERY}.bias", lambda a: a.astype(BFLOAT16))(folder)
    bias = QuantCheckpoint.open(folder).packed(QUERY).bias
    assert bias is not None
    assert bias.dtype == np.float32
