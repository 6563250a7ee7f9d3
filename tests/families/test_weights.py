"""Weight files of a model folder: shards, names, and what is refused."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mbq_export.errors import FormatError
from mbq_export.families.weights import SourceWeights, compare, shortened

TENSORS = {
    "a.0.w": torch.arange(6.0).reshape(2, 3),
    "a.1.w": torch.ones(4, dtype=torch.float16),
    "b": torch.zeros(0, dtype=torch.bfloat16),
}


def sharded(folder: Path) -> Path:
    folder.mkdir()
    for number, name in enumerate(TENSORS, 1):
        save_file({name: TENSORS[name]}, folder / f"model-{number}.safetensors")
    index = {name: f"model-{number}.safetensors" for number, name in enumerate(TENSORS, 1)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def edit_index(folder: Path, **changes: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_read_as_they_were_written(tmp_path: Path, shards: int) -> None:
    folder = tmp_path / "m"
    if shards == 1:
        folder.mkdir()
        save_file(TENSORS, folder / "model.safetensors")
    else:
        sharded(folder)
    weights = SourceWeights.open(folder)
    assert weights.names == ("a.0.w", "a.1.w", "b")
    assert weights.under("a") == ("a.0.w", "a.1.w")
    for name, tensor in TENSORS.items():
        assert torch.equal(weights.read(name), tensor)
        assert weights.read(name, dtype=torch.float32).dtype == torch.float32


def test_tensor_read_is_free_to_change(tmp_path: Path) -> None:
    weights = SourceWeights.open(sharded(tmp_path / "m"))
    weights.read("a.0.w").zero_()
    assert torch.equal(weights.read("a.0.w"), TENSORS["a.0.w"])


def test_names_are_translated(tmp_path: Path) -> None:
    weights = SourceWeights.open(sharded(tmp_path / "m"), renames=[(r"^a\.", "model.")])
    assert weights.names == ("b", "model.0.w", "model.1.w")


def test_hash_follows_the_contents(tmp_path: Path) -> None:
    first, second = sharded(tmp_path / "m"), sharded(tmp_path / "n")
    assert SourceWeights.open(first).sha256() == SourceWeights.open(second).sha256()
    save_file({"a.0.w": TENSORS["a.0.w"] + 1}, second / "model-1.safetensors")
    assert SourceWeights.open(first).sha256() != SourceWeights.open(second).sha256()


@pytest.mark.parametrize(
    ("shard", "code", "said"),
    [
        ("model-9.safetensors", "E4105", "There is no file 'model-9.safetensors'"),
        ("../m/model-1.safetensors", "E4105", "leads upwards"),
        ("/model-1.safetensors", "E4105", "is absolute"),
        ("https://example.org/x.safetensors", "E4105", "is a URL"),
        ("folder", "E4105", "is a folder"),
        ("model-2.safetensors", "E4103", "not in the shard that .* names: a.0.w"),
    ],
)
def test_index_that_names_something_else_is_refused(
    tmp_path: Path, shard: str, code: str, said: str
) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "folder").mkdir()
    edit_index(folder, **{"a.0.w": shard})
    with pytest.raises(FormatError, match=said) as caught:
        SourceWeights.open(folder)
    assert caught.value.code == code


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    save_file(
        {"a.0.w": TENSORS["a.0.w"], "a.1.w": TENSORS["a.1.w"]}, folder / "model-2.safetensors"
    )
    with pytest.raises(
        FormatError, match=r"a\.0\.w is stored in model-1\.safetensors and model-2"
    ) as caught:
        SourceWeights.open(folder)
    assert caught.value.code == "E4106"


def test_index_without_a_map_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    with pytest.raises(FormatError, match="has no weight_map") as caught:
        SourceWeights.open(folder)
    assert caught.value.code == "E4105"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(FormatError, match=f"only pickled weights: {name}") as caught:
        SourceWeights.open(tmp_path)
    assert caught.value.code == "E4108"
    assert "can run any program" in caught.value.why
    assert not Path("hacked").exists()


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="There are no weights in"):
        SourceWeights.open(tmp_path)


def test_file_that_changes_while_in_use_is_noticed(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    weights = SourceWeights.open(folder)
    save_file({"a.0.w": TENSORS["a.0.w"], "c": torch.ones(1)}, folder / "model-1.safetensors")
    with pytest.raises(
        FormatError, match=r"model-1\.safetensors changed while it was in use"
    ) as caught:
        weights.read("a.0.w")
    assert caught.value.code == "E4104"


def test_integers_are_no_weights(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.int64)}, tmp_path / "model.safetensors")
    weights = SourceWeights.open(tmp_path)
    with pytest.raises(FormatError, match="a has dtype I64"):
        weights.read("a")
    with pytest.raises(FormatError, match=r"a is I64 \(2,\)") as caught:
        compare(weights, {"a": (2,)})
    assert caught.value.code == "E4102"


def test_missing_extra_and_wrong_tensors_are_named(tmp_path: Path) -> None:
    weights = SourceWeights.open(sharded(tmp_path / "m"))
    shapes = {"a.0.w": (2, 3), "a.1.w": (4,), "b": (0,)}
    assert compare(weights, shapes) == ()
    with pytest.raises(FormatError, match=r"2 tensors are missing from the checkpoint: a\.2-3\.w"):
        compare(weights, shapes | {"a.2.w": (1,), "a.3.w": (1,)})
    with pytest.raises(FormatError, match="1 tensors belong to no part of the model: b"):
        compare(weights, {"a.0.w": (2, 3), "a.1.w": (4,)})
    assert compare(weights, {"a.0.w": (2, 3), "a.1.w": (4,)}, harmless=["^b$"]) == ("b",)
    with pytest.raises(FormatError, match=r"a\.0\.w is F32 \(2, 3\)") as caught:
        compare(weights, shapes | {"a.0.w": (3, 2)})
    assert "(3, 2)" in caught.value.why


def test_names_are_shortened_to_ranges() -> None:
    names = [f"m.layers.{n}.w" for n in (4, 5, 6)] + ["head"] + [f"m.layers.{n}.b" for n in (1, 9)]
    assert shortened(names) == "head, m.layers.1,9.b, m.layers.4-6.w"
    assert shortened([f"x{n}" for n in range(9)]).endswith("x5 and 3 more kinds")


def test_large_tensor_is_not_held_twice(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1 << 20)}, tmp_path / "model.safetensors")
    weights = SourceWeights.open(tmp_path)
    tracemalloc.start()
    tensor = weights.read("a", dtype=torch.float32)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tensor.numel() * 4 <= peak < tensor.numel() * 4 * 1.1
    assert np.count_nonzero(tensor.numpy()) == 0
