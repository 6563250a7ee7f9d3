"""Nodes, bodies and constants that break the contract of the domain (FAULTS F071 to F075)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mbq_export.errors import FormatError, IncompatibleError
from mbq_export.export import functions, ops
from mbq_export.export.check import Limits, check_graph
from mbq_export.export.contract import signature
from mbq_export.export.profile import OPSET23
from tests.export.one_linear import edit, external, write_one

Change = Callable[[onnx.ModelProto], object]


def refusal(path: Path, code: str, limits: Limits | None = None) -> FormatError:
    with pytest.raises(FormatError) as caught:
        check_graph(path, limits or Limits())
    assert caught.value.code == code
    return caught.value


def attribute(model: onnx.ModelProto, name: str) -> onnx.AttributeProto:
    return next(each for each in model.graph.node[0].attribute if each.name == name)


def overwrite(path: Path, suffix: str, values: np.ndarray) -> Path:
    """Replace the first values of an external constant in the data file."""
    tensor = external(onnx.load(path, load_external_data=False), suffix)
    offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
    with (path.parent / "one.onnx_data").open("r+b") as file:
        file.seek(offset)
        file.write(values.tobytes())
    return path


@pytest.mark.parametrize("lowering", ["reference", "qdq"])
@pytest.mark.parametrize("bits", [3, 4])
def test_graphs_of_ours_pass(lowering: str, bits: int, tmp_path: Path) -> None:
    check_graph(write_one(tmp_path, bits=bits, lowering=lowering), Limits(allowed=OPSET23.ops))


def drop(name: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        kept = [each for each in model.graph.node[0].attribute if each.name != name]
        del model.graph.node[0].attribute[:]
        model.graph.node[0].attribute.extend(kept)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: setattr(m.graph.node[0], "domain", "com.foo"),
            "is of the unknown domain 'com.foo'",
        ),
        (lambda m: setattr(m.graph.node[0], "op_type", "W9Linear"), "has no operator 'W9Linear'"),
        (lambda m: m.ClearField("functions"), "Operator W3Linear has no body in this file."),
        (drop("group_size"), "Attributes of W3Linear: ['group_size'] missing, none unknown."),
        (
            lambda m: m.graph.node[0].attribute.append(helper.make_attribute("bias", 1)),
            "Attributes of W3Linear: none missing, ['bias'] unknown.",
        ),
        (
            lambda m: m.graph.node.append(helper.make_node("Foo", ["x"], ["z"], name="foo")),
            "Opset 23 has no operator 'Foo'.",
        ),
        (lambda m: m.graph.node[0].input.pop(), "W3Linear has 3 inputs and 1 outputs."),
    ],
)
def test_operators_without_a_home_are_refused(change: Change, message: str, tmp_path: Path) -> None:
    assert message in refusal(edit(write_one(tmp_path), change), "E4408").message


def test_another_version_of_the_domain_is_refused(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        for entry in model.opset_import:
            entry.version = 2 if entry.domain == ops.DOMAIN else entry.version

    error = refusal(edit(write_one(tmp_path), change), "E4408")
    assert error.message == "Domain 'mbq' is imported in version 2."
    assert error.where == ["one.onnx", "linear"]


def test_operator_above_the_op_level_is_refused(tmp_path: Path) -> None:
    path = edit(
        write_one(tmp_path),
        lambda m: m.graph.node.append(helper.make_node("Erf", ["x"], ["z"], name="erf")),
    )
    error = refusal(path, "E4408", Limits(allowed=OPSET23.ops))
    assert error.message == "Operator Erf is above the op level of this graph."


def test_body_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        node = next(each for each in model.functions[0].node if each.op_type == "Sub")
        node.op_type = "Add"

    error = refusal(edit(write_one(tmp_path), change), "E4412")
    assert error.message == "The body of W3Linear is not the registered one."


def test_foreign_body_is_refused(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.functions.append(functions.body(ops.OPS["w4a16"], opset=23))

    error = refusal(edit(write_one(tmp_path), change), "E4408")
    assert error.message == "Function W4A16Linear of domain 'mbq' belongs to no node of ours."


def test_signature_sees_a_changed_constant_and_no_documentation() -> None:
    body = functions.body(ops.OPS["w3a16"], opset=23)
    changed, documented = onnx.FunctionProto(), onnx.FunctionProto()
    changed.CopyFrom(body)
    documented.CopyFrom(body)
    documented.doc_string = "words"
    documented.node[0].name = "renamed"
    power = next(node for node in changed.node if node.output[0] == "power")
    power.attribute[0].t.int32_data[1] = 7
    assert signature(documented) == signature(body)
    assert signature(changed) != signature(body)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("N", 128, "linear.qweight is INT32 [64, 12], N, K and group_size ask for INT32 [128, 12]"),
        ("K", 256, "linear.qweight is INT32 [64, 12], N, K and group_size ask for INT32 [64, 24]"),
        (
            "group_size",
            64,
            "linear.scales is FLOAT16 [64, 4], N, K and group_size ask for FLOAT16 [64, 2]",
        ),
        ("group_size", 100, "Group_size is 100."),
        ("bits", 4, "Bits is 4, W3Linear has 3."),
    ],
)
def test_attributes_that_contradict_constants_are_refused(
    name: str, value: int, message: str, tmp_path: Path
) -> None:
    path = edit(write_one(tmp_path), lambda m: setattr(attribute(m, name), "i", value))
    found = refusal(path, "E4409").message
    assert found.lower().startswith(message.lower().rstrip("."))


@pytest.mark.parametrize("layout", ["woven", "w3t"])
def test_a_layout_other_than_that_of_its_words_is_refused(tmp_path: Path, layout: str) -> None:
    path = edit(
        write_one(tmp_path), lambda m: setattr(attribute(m, "layout"), "s", layout.encode())
    )
    assert refusal(path, "E4409").message == f"Layout is '{layout}'."


def test_newer_layout_names_the_version_that_is_known(tmp_path: Path) -> None:
    path = edit(write_one(tmp_path), lambda m: setattr(attribute(m, "layout_version"), "i", 2))
    with pytest.raises(IncompatibleError, match="Layout dense version 2 is unknown here"):
        check_graph(path)


def test_computed_weight_is_refused(tmp_path: Path) -> None:
    path = edit(write_one(tmp_path), lambda m: m.graph.node[0].input.__setitem__(1, "x"))
    assert refusal(path, "E4409").message == "X is no constant."


@pytest.mark.parametrize("dtype", [TensorProto.UINT8, TensorProto.UINT32])
def test_types_that_are_widened_or_refused_are_refused(dtype: int, tmp_path: Path) -> None:
    tensor = TensorProto(
        name="codes", data_type=dtype, dims=[1], raw_data=b"\0" * (1 if dtype == 2 else 4)
    )
    path = edit(write_one(tmp_path), lambda m: m.graph.initializer.append(tensor))
    assert "Constant 'codes' is UINT" in refusal(path, "E4410").message


def test_nibbles_without_sign_are_refused_for_tensorrt_only(tmp_path: Path) -> None:
    path = write_one(tmp_path, bits=4, lowering="qdq")
    check_graph(path)
    error = refusal(path, "E4410", Limits(target="trt"))
    assert error.message == "Constant 'linear.qweight_uint4' is UINT4."


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -0.5])
@pytest.mark.parametrize(
    ("lowering", "suffix", "dtype"),
    [("reference", ".scales", np.float16), ("qdq", ".block_scales", np.float32)],
)
def test_scale_that_is_no_positive_number_is_named(
    bad: float, lowering: str, suffix: str, dtype: type, tmp_path: Path
) -> None:
    path = overwrite(write_one(tmp_path, lowering=lowering), suffix, np.array([0.5, bad], dtype))
    assert refusal(path, "E4411").message == (
        f"linear{suffix} holds 1 scales that are not positive numbers, the first at (0, 1)."
    )


@pytest.mark.parametrize("bad", [8, -1])
def test_zero_point_outside_the_codes_is_named(bad: int, tmp_path: Path) -> None:
    path = overwrite(write_one(tmp_path), ".zeros", np.array([3, 3, bad], np.int32))
    assert refusal(path, "E4411").message == f"linear.zeros holds the zero point {bad} at (0, 2)."


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("axis", 1, "Blocks of 32 along axis 1 of sizes [128, 64]."),
        ("block_size", 64, "linear.block_scales has the sizes [4, 64], blocks ask for [2, 64]."),
    ],
)
def test_blocks_that_do_not_run_along_k_are_refused(
    name: str, value: int, message: str, tmp_path: Path
) -> None:
    path = edit(
        write_one(tmp_path, lowering="qdq"), lambda m: setattr(attribute(m, name), "i", value)
    )
    assert refusal(path, "E4409").message.lower() == message.lower()
