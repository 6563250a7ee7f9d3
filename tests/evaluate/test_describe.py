"""`inspect` of a bundle with engines: plugins under their operator's name, found beside planned."""

import json
import shutil
from pathlib import Path

import pytest

from mbq_export.evaluate.describe import describe
from tests.evaluate.bundles import tiny_bundle
from tests.tiny import load_tiny, tiny_checkpoint

NODE = "layers.0.o_proj"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle whose record plans one plugin, and an engine that has it and one row more."""
    root = Path(shutil.copytree(tiny_bundle().root, tmp_path / "bundle"))
    path = root / "onnx" / "mbq_export.json"
    record = json.loads(path.read_text())
    record["graphs"][0]["plugin_layers"] = {"W3Linear": [NODE]}
    path.write_text(json.dumps(record))
    folder = root / "engines" / "rtx-1.7" / "sm89"
    folder.mkdir(parents=True)
    counts = {"plugin_layers_expected": {"W3Linear": 1}, "plugin_layers_found": {"W3Linear": 1}}
    engines = {"decoder": {"bytes": 9, "layers": 2, **counts}, "vision": {"bytes": 1, "layers": 0}}
    facts = {"verified": False, "why": "not run", "engines": engines}
    (folder / "engine.json").write_text(json.dumps(facts))
    rows = [
        {"type": "custom_layer", "const": [["w", "Int32", [1]]], "onnx": [NODE]},
        {"type": "kgen", "const": [], "onnx": [NODE, "norm"]},
    ]
    (folder / "layers.json").write_text(json.dumps({"engines": {"decoder": {"layers": rows}}}))
    files = json.loads((root / "manifest.json").read_text())
    for entry in files["files"]:
        if entry["path"] == "onnx/mbq_export.json":
            entry["bytes"] = path.stat().st_size
    files["source"] = {"model": "m", "family": "f"}
    files["quant"] = {"scheme": {"name": "w3a16"}, "method": {"name": "rtn"}}
    (root / "manifest.json").write_text(json.dumps(files))
    return root


def test_engine_shows_how_many_plugins_were_found_of_those_planned(bundle: Path) -> None:
    (engines,) = [table for table in describe(bundle).tables if table.title == "engines"]
    assert [row[:4] for row in engines.rows] == [
        ("rtx-1.7/sm89/decoder", 9, 2, "1 of 1 W3Linear"),
        ("rtx-1.7/sm89/vision", 1, 0, "-"),
    ]


def test_the_format_of_a_head_is_named(tmp_path: Path) -> None:
    tied = load_tiny(tmp_path / "model")
    names = [
        describe(tiny_checkpoint(tmp_path / str(bits), tied, head_bits=bits).folder).facts["head"]
        for bits in (16, 4)
    ]
    assert names == ["16 bits", "w4a16 g128, no longer the embedding"]


def test_row_of_a_plugin_has_its_operators_name(bundle: Path) -> None:
    (table,) = describe(bundle, layers=True).tables
    assert table.title == "layers of engines/rtx-1.7/sm89/decoder"
    assert table.rows == [("plugin W3Linear", "Int32", NODE), ("kgen", "", f"{NODE} norm")]
