"""Files: where constants lie, that nothing is a link, and that the same graph gives the same bytes."""

import stat
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mbq_export.errors import InternalError, ResourceError
from mbq_export.export import GraphForm, save
from mbq_export.export.save import constant_bytes, node_counts, ports_of, save_graph
from tests.export import decoders
from tests.export.one_linear import one_node, random_packed


def model() -> ir.Model:
    return one_node(
        random_packed(np.random.default_rng(0), n=64, k=128, bits=3, group_size=32), lowering="qdq"
    )


def test_constants_begin_at_pages_in_the_order_of_their_use(tmp_path: Path) -> None:
    path = decoders.write_decoder(decoders.checkpoint(), GraphForm(), tmp_path / "g.onnx")
    graph = onnx.load(path, load_external_data=False).graph
    offsets = {
        tensor.name: int({entry.key: entry.value for entry in tensor.external_data}["offset"])
        for tensor in graph.initializer
        if tensor.external_data
    }
    order = dict.fromkeys(name for node in graph.node for name in node.input if name in offsets)
    assert [offsets[name] for name in order] == sorted(offsets.values())
    assert all(offset % 4096 == 0 for offset in offsets.values())


def test_files_are_plain_and_readable(tmp_path: Path) -> None:
    (data,) = save_graph(model(), tmp_path / "g.onnx")
    assert data.name == "g.onnx_data"
    for path in (tmp_path / "g.onnx", data):
        status = path.lstat()
        assert stat.S_ISREG(status.st_mode)
        assert (status.st_nlink, stat.S_IMODE(status.st_mode)) == (1, 0o644)


def test_the_same_graph_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        path = decoders.write_decoder(
            decoders.checkpoint(), GraphForm(), tmp_path / name / "g.onnx"
        )
        contents.append((path.read_bytes(), path.with_name("g.onnx_data").read_bytes()))
    assert contents[0] == contents[1]


def test_no_place_or_time_is_in_the_graph(tmp_path: Path) -> None:
    path = decoders.write_decoder(decoders.checkpoint(), GraphForm(), tmp_path / "g.onnx")
    proto = onnx.load(path, load_external_data=False)
    assert str(tmp_path).encode() not in path.read_bytes()
    assert not proto.doc_string
    assert not proto.metadata_props
    keys = {entry.key for node in proto.graph.node for entry in node.metadata_props}
    assert keys == {"mbq.source"}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        save_graph(model(), tmp_path / "missing" / "g.onnx")
    assert caught.value.code == "E5008"


def test_a_graph_of_megabytes_is_a_bug_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "LARGEST_PROTO", 100)
    with pytest.raises(InternalError, match=r"g\.onnx has .* bytes of graph"):
        save_graph(model(), tmp_path / "g.onnx")


def test_description_counts_nodes_bytes_and_ports() -> None:
    graph = model()
    assert node_counts(graph) == {"DequantizeLinear": 1, "MatMul": 1}
    reference = one_node(
        random_packed(np.random.default_rng(0), n=16, k=32, bits=3, group_size=32),
        lowering="reference",
    )
    assert node_counts(reference) == {"mbq::W3Linear": 1}
    assert constant_bytes(reference) == 16 * 3 * 4 + 16 * 2 + 16 * 4
    (port,) = ports_of(graph.graph.inputs)
    assert (port.name, port.dtype, port.shape) == ("x", "float32", (1, "rows", 128))
