"""Rows of an embedding graph, read from its file: those that ONNX Runtime answers with, in every type."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from mbq_export.backends._table import open_table
from mbq_export.backends.ort import open_graph
from mbq_export.errors import FormatError
from mbq_export.export.embed import embed_graph
from mbq_export.export.profile import OPSET23
from mbq_export.export.save import save_graph
from mbq_export.tensor_file import BFLOAT16
from tests.export import decoders

RNG = np.random.default_rng(41)


def written(folder: Path, dtype: str) -> Path:
    """The embedding graph of the tiny decoder."""
    graph = embed_graph(decoders.checkpoint(), family=decoders.FAMILY, dtype=dtype, profile=OPSET23)
    save_graph(graph, folder / f"embed_{dtype}.onnx")
    return folder / f"embed_{dtype}.onnx"


def stored(folder: Path) -> np.ndarray:
    """The (V, hidden) table in fp32."""
    tensor = onnx.load(written(folder, "fp32")).graph.initializer[0]
    return onnx.numpy_helper.to_array(tensor)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_rows_are_those_that_the_graph_answers_with(tmp_path: Path, dtype: str) -> None:
    path = written(tmp_path, dtype)
    with open_table(path) as table, open_graph(path, threads=1) as graph:
        ids = RNG.integers(0, len(stored(tmp_path)), (2, 7))
        (rows,) = table.run({table.inputs[0].name: ids}).values()
        (expected,) = graph.run({graph.inputs[0].name: ids}).values()
        assert [each.name for each in (*table.inputs, *table.outputs)] == [
            each.name for each in (*graph.inputs, *graph.outputs)
        ]
    assert rows.dtype == expected.dtype
    assert (rows == expected).all()


def test_bfloat16_rows_are_the_table_rounded_to_it(tmp_path: Path) -> None:
    """ONNX Runtime hands no bfloat16 over, so the table itself is the reference."""
    table, exact = open_table(written(tmp_path, "bf16")), stored(tmp_path)
    ids = RNG.integers(0, len(exact), (1, 9))
    (rows,) = table.run({"input_ids": ids}).values()
    assert rows.dtype == BFLOAT16
    assert (rows == exact[ids].astype(BFLOAT16)).all()
    assert table.outputs[0].dtype == "bfloat16"


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_number_without_a_row_is_refused(tmp_path: Path, wrong: int) -> None:
    """A negative number would be a row counted from the end."""
    table = open_table(written(tmp_path, "fp16"))
    with pytest.raises(FormatError, match=f"Token {wrong} has no embedding") as error:
        table.run({"input_ids": np.array([[0, wrong]])})
    assert error.value.code == "E4102"


def test_short_data_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "fp16")
    data = path.with_name(f"{path.name}_data")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(FormatError, match="is not at byte 0") as error:
        open_table(path)
    assert error.value.code == "E4403"


def test_data_in_another_folder_are_not_read(tmp_path: Path) -> None:
    path = written(tmp_path, "fp16")
    model = onnx.load(path, load_external_data=False)
    (location,) = (
        entry for entry in model.graph.initializer[0].external_data if entry.key == "location"
    )
    location.value = f"../{tmp_path.name}/{location.value}"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FormatError) as error:
        open_table(path)
    assert error.value.code == "E4403"


def test_graph_that_does_more_is_no_table(tmp_path: Path) -> None:
    path = written(tmp_path, "fp16")
    model = onnx.load(path, load_external_data=False)
    model.graph.node[0].op_type = "GatherND"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FormatError) as error:
        open_table(path)
    assert error.value.code == "E4413"


def test_missing_graph_is_told(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as error:
        open_table(tmp_path / "embed.onnx")
    assert error.value.code == "E4404"
