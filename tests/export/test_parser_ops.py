"""The checked-in list of what TensorRT's parser documents."""

import onnx

from mbq_export.export.ops import LARGEST_OPSET
from mbq_export.export.parser_ops import FIRST_READ, OLDEST, read_by


def test_every_name_is_an_operator_of_onnx() -> None:
    unknown = [op for op in FIRST_READ if not onnx.defs.has(op, LARGEST_OPSET, "")]
    assert unknown == []


def test_operators_of_large_models_came_late() -> None:
    """As the parser's changelog tells."""
    assert read_by((10, 14)) - read_by((10, 13)) == {"Attention"}
    came_with_15 = {"RMSNormalization", "RotaryEmbedding", "TensorScatter"}
    assert read_by((10, 15)) - read_by((10, 14)) == came_with_15
    assert read_by((11, 4)) - read_by((10, 16)) == {"Swish"}


def test_the_oldest_parser_reads_no_newer_operator_than_its_opset() -> None:
    for op in read_by(OLDEST):
        assert onnx.defs.has(op, 20, ""), op
    assert read_by((10, 2)) == frozenset()
