"""A checkpoint folder: shards, index, companions, and a description that matches them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mbq_export.quantize.write import companions, write_checkpoint
from mbq_export.tensor_file import TensorFile
from tests.tiny import load_tiny, tiny_checkpoint

INFO = {"schema": "mbq-export/checkpoint@1", "linears": [{"name": "a.q"}, {"name": "b.q"}]}


def piece(name: str, rows: int) -> dict[str, NDArray[Any]]:
    return {
        f"{name}.qweight": np.full((rows, 8), 7, np.int32),
        f"{name}.scales": np.ones((rows, 2), np.float16),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (
        "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE",
        "NOTICE.txt", "README.md", "model.safetensors", "optimizer.pt", "modeling_own.py",
    ):  # fmt: skip
        (folder / name).write_text(name)
    (folder / "LICENSES").mkdir()
    return folder


def write(folder: Path, source: Path, *, shard_bytes: int = 1 << 20) -> dict[str, Any]:
    pieces = [piece("a.q", 16), piece("b.q", 16), {"norm": np.ones(4, np.float32)}]
    write_checkpoint(
        folder,
        pieces,
        info=INFO,
        config={"model_type": "m"},
        source=source,
        shard_bytes=shard_bytes,
    )
    info: dict[str, Any] = json.loads((folder / "mbq.json").read_text())
    return info


def test_one_shard_holds_everything_that_fits(tmp_path: Path, source: Path) -> None:
    info = write(tmp_path / "c", source)
    shards = [path.name for path in sorted((tmp_path / "c").glob("*.safetensors"))]
    assert shards == ["model-00001-of-00001.safetensors"]
    assert [row["file"] for row in info["linears"]] == shards * 2


def test_pieces_are_spread_but_never_split(tmp_path: Path, source: Path) -> None:
    info = write(tmp_path / "c", source, shard_bytes=600)
    shards = [path.name for path in sorted((tmp_path / "c").glob("*.safetensors"))]
    assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [row["file"] for row in info["linears"]] == shards
    assert set(TensorFile(tmp_path / "c" / shards[0]).entries) == set(piece("a.q", 16))
    assert set(TensorFile(tmp_path / "c" / shards[1]).entries) == {*piece("b.q", 16), "norm"}


def test_piece_larger_than_a_shard_has_its_own(tmp_path: Path, source: Path) -> None:
    write(tmp_path / "c", source, shard_bytes=1)
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 3


def test_index_says_where_each_tensor_lies_and_how_many_bytes_there_are(
    tmp_path: Path, source: Path
) -> None:
    write(tmp_path / "c", source, shard_bytes=600)
    index = json.loads((tmp_path / "c/model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2 * (16 * 8 * 4 + 16 * 2 * 2) + 16}
    for name, place in index["weight_map"].items():
        assert name in TensorFile(tmp_path / "c" / place).entries


def test_shards_say_what_they_are(tmp_path: Path, source: Path) -> None:
    write(tmp_path / "c", source)
    data = (tmp_path / "c/model-00001-of-00001.safetensors").read_bytes()
    assert data[8:].startswith(b'{"__metadata__":{"format":"pt","mbq":"1"}')


def test_every_file_is_listed_with_size_and_hash(tmp_path: Path, source: Path) -> None:
    info = write(tmp_path / "c", source)
    listed = {row["path"]: (row["bytes"], row["sha256"]) for row in info["files"]}
    found = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    del found["mbq.json"]
    assert listed == {n: (len(d), hashlib.sha256(d).hexdigest()) for n, d in found.items()}


def test_processor_and_licence_files_travel_and_code_does_not(source: Path) -> None:
    assert [path.name for path in companions(source)] == [
        "LICENSE", "NOTICE.txt", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_config_is_the_one_given_and_not_the_source_s(tmp_path: Path, source: Path) -> None:
    write(tmp_path / "c", source)
    assert json.loads((tmp_path / "c/config.json").read_text()) == {"model_type": "m"}


def test_format_page_names_every_key(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/formats/checkpoint.md").read_text()
    info = tiny_checkpoint(tmp_path / "c", load_tiny(tmp_path / "model")).info
    keys = [*info, *info["linears"][0], *info["skipped"][0], *info["files"][0]]
    keys += [key for part in ("tool", "model", "scheme", "layout") for key in info[part]]
    missing = [key for key in keys if f"`{key}`" not in page and f"`{key}." not in page]
    assert not missing


def test_leftovers_of_a_killed_run_are_gone(tmp_path: Path, source: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c/shard-00009.safetensors").write_text("half")
    write(tmp_path / "c", source)
    assert not list((tmp_path / "c").glob("shard-*"))
