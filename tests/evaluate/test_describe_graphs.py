"""What `inspect` says of graphs: how large they are, and which layers of an engine must be plugins."""

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from mbq_export.errors import FormatError
from mbq_export.evaluate import describe_graphs
from mbq_export.evaluate.describe import describe
from mbq_export.export import ops, record
from tests.export.one_linear import edit, write_one

GRAPH = {
    "file": "g.onnx",
    "nodes": {"MatMul": 2, "mbq::W3Linear": 3},
    "opset": 24,
    "weight_bytes": 10,
}


def folder(tmp_path: Path, **changes: object) -> Path:
    graph = {**GRAPH, "plugin_layers": {"W3Linear": ["b", "a"]}, **changes}
    found = {"family": "f", "scheme": "w3a16", "group_size": 128, "versions": {}, "graphs": [graph]}
    (tmp_path / "mbq_export.json").write_text(json.dumps(found))
    return tmp_path


def test_names_are_those_of_the_exporter() -> None:
    assert describe_graphs.RECORD == record.RECORD
    assert describe_graphs.PLUGIN_LAYERS == ops.PLUGIN_LAYERS


def test_looking_at_a_record_loads_neither_onnx_nor_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mbq_export.evaluate.describe import describe;"
        f"describe(Path({str(folder(tmp_path))!r})); raise SystemExit('onnx' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_of_graphs_is_a_table_of_graphs_and_one_of_plugins(tmp_path: Path) -> None:
    found = describe(folder(tmp_path))
    assert (found.kind, found.facts["scheme"]) == ("graphs", "w3a16")
    graphs, plugins = found.tables
    assert graphs.rows == [("g.onnx", 5, 24, 10, 2)]
    assert plugins.rows == [("g.onnx", "W3Linear", "b"), ("g.onnx", "W3Linear", "a")]


def test_a_record_of_a_release_without_plugins_has_none(tmp_path: Path) -> None:
    (graphs,) = describe(folder(tmp_path, plugin_layers={})).tables
    assert graphs.rows == [("g.onnx", 5, 24, 10, 0)]


@pytest.mark.parametrize("change", [{"nodes": 3}, {"file": None}, {"opset": "24"}])
def test_a_damaged_record_is_said_to_be_one(change: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"mbq_export\.json does not list graphs\.") as caught:
        describe(folder(tmp_path, **change))
    assert caught.value.code == "E4604"


def test_a_plugin_graph_names_the_layers_it_expects(tmp_path: Path) -> None:
    found = describe(write_one(tmp_path, lowering="plugin"))
    assert found.facts["expected plugin layers"] == {"W3Linear": 1}
    assert found.tables[0].rows == [("mbq::W3Linear", 1)]
    assert found.tables[-1].title == "plugins"
    assert found.tables[-1].rows == [("W3Linear", "linear")]


def test_a_graph_without_plugins_says_nothing_of_them(tmp_path: Path) -> None:
    found = describe(write_one(tmp_path))
    assert "expected plugin layers" not in found.facts
    assert [table.title for table in found.tables] == ["operators", "inputs and outputs"]


@pytest.mark.parametrize("value", ["[", "[1]", '{"W3Linear": 3}'])
def test_metadata_of_another_form_is_shown_not_believed(value: str, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.metadata_props[0].value = value

    path = edit(write_one(tmp_path, lowering="plugin"), change)
    with pytest.raises(FormatError, match=r"Metadata 'mbq\.plugin_layers' is ") as caught:
        describe(path)
    assert caught.value.code == "E4409"
