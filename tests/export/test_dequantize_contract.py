"""Forms of DequantizeLinear that runtimes multiply from pass; the one they may get wrong never does."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mbq_export.errors import FormatError
from mbq_export.export.check import Limits, check_graph
from mbq_export.export.save import save_graph
from tests.export.one_linear import edit, one_node
from tests.schemes.integer_weights import random_q, weight_of

TRT = Limits(target="trt")


def write(folder: Path, *, target: str = "trt") -> Path:
    """A sound graph of one linear that rounds its activations, all constants in the graph file."""
    path = folder / "one.onnx"
    save_graph(one_node(weight_of(random_q(1, 16, 128)), lowering="qdq", target=target, scheme="w4a8"), path)  # fmt: skip
    onnx.save(onnx.load(path), path)
    return path


def refusal(path: Path, limits: Limits = TRT) -> FormatError:
    with pytest.raises(FormatError) as caught:
        check_graph(path, limits)
    return caught.value


def constant(model: onnx.ModelProto, suffix: str) -> TensorProto:
    return next(each for each in model.graph.initializer if each.name.endswith(suffix))


def weight_node(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == "linear.weight")


def put(model: onnx.ModelProto, suffix: str, values: np.ndarray) -> None:
    tensor = constant(model, suffix)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def in_blocks(model: onnx.ModelProto) -> None:
    """What a tool might write for groups of 64: the pattern that must never reach TensorRT."""
    put(model, ".channel_scales", np.full((2, 16), 0.01, np.float32))
    node = weight_node(model)
    del node.attribute[:]
    node.attribute.extend([helper.make_attribute("axis", 0), helper.make_attribute("block_size", 64)])  # fmt: skip


def in_blocks_behind_a_cast(model: onnx.ModelProto) -> None:
    in_blocks(model)
    nodes = list(model.graph.node)
    at = next(index for index, node in enumerate(nodes) if node.name == "linear")
    nodes[at].input[1] = "same"
    cast = helper.make_node("Cast", ["linear.weight"], ["same"], name="cast", to=TensorProto.FLOAT)
    nodes.insert(at, cast)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@pytest.mark.parametrize("target", ["ort", "trt"])
def test_one_scale_per_channel_passes(target: str, tmp_path: Path) -> None:
    check_graph(write(tmp_path, target=target), Limits(target=target))


@pytest.mark.parametrize("change", [in_blocks, in_blocks_behind_a_cast])
@pytest.mark.parametrize("target", [None, "ort", "trt"])
def test_blocks_times_rounded_activations_are_refused_everywhere(
    change: Callable[[onnx.ModelProto], None], target: str | None, tmp_path: Path
) -> None:
    error = refusal(edit(write(tmp_path), change), Limits(target=target))
    assert (error.code, error.where) == ("E4414", ["one.onnx", "linear"])
    assert error.message == "It multiplies weights in blocks of 64 with activations of 8 bits."
    assert error.why is not None
    assert error.why.startswith("group-wise W4A8 needs the plugin lowering")


def test_zero_points_of_signed_codes_are_refused_for_tensorrt_only(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        name = "linear.points"
        packed = helper.make_tensor(name, TensorProto.INT4, [16], [1] * 16)
        model.graph.initializer.append(packed)
        weight_node(model).input.append(name)

    path = edit(write(tmp_path), change)
    check_graph(path, Limits(target="ort"))
    error = refusal(path)
    assert (error.code, error.message) == ("E4410", "linear.points holds zero points other than 0.")
    assert "exact form" in (error.why or "")


@pytest.mark.parametrize("bad", [0, -0.5, np.nan, np.inf])
def test_a_scale_that_is_no_positive_number_is_named(bad: float, tmp_path: Path) -> None:
    scales = np.full(16, 0.01, np.float32)
    scales[3] = bad
    path = edit(write(tmp_path, target="ort"), lambda m: put(m, ".channel_scales", scales))
    error = refusal(path, Limits(target="ort"))
    assert (error.code, error.where[-1]) == ("E4411", "linear.weight")
    assert error.message.endswith("the first at (3,).")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(weight_node(m).attribute[0], "i", 0), "Blocks of 0 along axis 0"),
        (
            lambda m: put(m, ".channel_scales", np.ones(8, np.float32)),
            "Linear.channel_scales has the sizes [8]",
        ),
        (
            lambda m: weight_node(m).attribute.append(helper.make_attribute("block_size", 32)),
            "Blocks of 32 along axis 1",
        ),
    ],
)
def test_scales_that_run_along_k_are_refused(
    change: Callable[[onnx.ModelProto], object], message: str, tmp_path: Path
) -> None:
    error = refusal(edit(write(tmp_path), change))
    assert error.code == "E4409"
    assert error.message.startswith(message)
