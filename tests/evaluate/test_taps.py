"""Tapped values of a small written graph and of torch modules."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from mbq_export.backends.ort import open_graph
from mbq_export.errors import FormatError
from mbq_export.evaluate.taps import (
    Recorder,
    linear_values,
    stream_values,
    tapped_graph,
    torch_values,
)
from mbq_export.families.base import LINEARS

K, N, GROUP = 64, 48, 32


def write_graph(folder: Path) -> tuple[Path, np.ndarray]:
    """Write embeds -> DequantizeLinear(INT4), MatMul -> Neg -> logits with external data."""
    random = np.random.default_rng(0)
    codes = random.integers(-7, 8, (K, N)).astype(ml_dtypes.int4)
    scales = random.uniform(0.01, 0.1, (K // GROUP, N)).astype(np.float32)
    x = ir.Value(name="inputs_embeds", type=ir.TensorType(ir.DataType.FLOAT))
    x.shape = ir.Shape([1, "sequence_length", K])
    constants = []
    for tensor in (
        ir.Tensor(codes, dtype=ir.DataType.INT4, name="codes"),
        ir.Tensor(scales, name="scales"),
    ):
        value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype))
        value.shape = tensor.shape
        constants.append(value)
    weight = ir.node("DequantizeLinear", constants, attributes={"axis": 0, "block_size": GROUP})
    product = ir.node("MatMul", [x, weight.outputs[0]], name="layers.0.q_proj")
    negated = ir.node("Neg", [product.outputs[0]])
    for node, name in ((weight, "w"), (product, "layers.0.q_proj.out"), (negated, "logits")):
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x],
        list(negated.outputs),
        nodes=[weight, product, negated],
        initializers=constants,
        opset_imports={"": 23},
        name="tapped",
    )
    path = folder / "graph.onnx"
    ir.save(
        ir.Model(graph, ir_version=11),
        path,
        external_data="graph.onnx_data",
        size_threshold_bytes=0,
    )
    weights = codes.astype(np.float64) * np.repeat(scales, GROUP, axis=0)
    return path, weights


def test_tapped_graph_returns_the_value_and_leaves_int4_weights_in_their_file(
    tmp_path: Path,
) -> None:
    path, weights = write_graph(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    proto = tapped_graph(path, ["layers.0.q_proj.out"])
    constants = onnx.load_from_string(proto).graph.initializer
    assert {c.name: (c.data_type, c.data_location, c.raw_data) for c in constants} == {
        "codes": (onnx.TensorProto.INT4, onnx.TensorProto.EXTERNAL, b""),
        "scales": (onnx.TensorProto.FLOAT, onnx.TensorProto.EXTERNAL, b""),
    }
    x = np.random.default_rng(1).normal(size=(1, 5, K)).astype(np.float32)
    with open_graph(path, proto=proto) as engine:
        found = engine.run({"inputs_embeds": x})
    np.testing.assert_allclose(found["layers.0.q_proj.out"], x @ weights, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["logits"], -found["layers.0.q_proj.out"])
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_value_that_the_graph_lacks_is_named(tmp_path: Path) -> None:
    path, _ = write_graph(tmp_path)
    with pytest.raises(FormatError, match=r"graph\.onnx has no value layers\.7\.hidden") as caught:
        tapped_graph(path, ["layers.0.q_proj.out", "layers.7.hidden"])
    assert caught.value.code == "E4407"


def test_recorder_joins_calls_and_hides_what_it_keeps(tmp_path: Path) -> None:
    path, _ = write_graph(tmp_path)
    x = np.random.default_rng(2).normal(size=(1, 5, K)).astype(np.float32)
    tap = "layers.0.q_proj.out"
    with Recorder(open_graph(path, proto=tapped_graph(path, [tap])), [tap]) as recorder:
        assert [spec.name for spec in recorder.outputs] == ["logits"]
        whole = recorder.run({"inputs_embeds": x})
        assert list(whole) == ["logits"]
        first = recorder.take()
        recorder.run({"inputs_embeds": x[:, :2]})
        recorder.run({"inputs_embeds": x[:, 2:]})
        second = recorder.take()
        assert recorder.take() == {}
    assert first[tap].shape == (5, N)
    np.testing.assert_allclose(first[tap], second[tap], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(first["inputs_embeds"], x[0])


def test_linears_that_share_an_input_are_tapped_once() -> None:
    names = linear_values(3, LINEARS)
    assert names[:4] == (
        "layers.3.q_proj.in",
        "layers.3.q_proj.out",
        "layers.3.k_proj.out",
        "layers.3.v_proj.out",
    )
    assert len(names) == len(set(names)) == 11
    assert stream_values(2) == ("layers.0.hidden", "layers.1.hidden", "norm.out")


class Block(nn.Module):
    """Returns a tuple, as some versions of transformers do, and changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor]:
        result = hidden + self.up(hidden)
        hidden.zero_()
        return (result,)


def tiny_decoder() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    module = nn.Module()
    module.layers = nn.ModuleList([Block(), Block()])
    module.norm = nn.LayerNorm(4)
    family = SimpleNamespace(
        blocks="layers",
        final_norm="norm",
        linears=("up",),
        linear_path=lambda layer, linear: f"layers.{layer}.{linear}",
    )
    return module, family


def test_hooks_catch_the_same_names_and_leave_no_trace() -> None:
    module, family = tiny_decoder()
    x = torch.randn(1, 3, 4)
    wanted = ["inputs_embeds", *linear_values(1, ["up"]), *stream_values(2)]
    with torch_values(module, family, wanted) as values, torch.no_grad():
        hidden = x.clone()
        for block in module.layers:
            (hidden,) = block(hidden)
        module.norm(hidden)
    assert set(values) == set(wanted)
    np.testing.assert_array_equal(values["inputs_embeds"], x[0].numpy())
    up = module.layers[1].up
    expected = values["layers.1.up.in"] @ up.weight.detach().numpy().T + up.bias.detach().numpy()
    np.testing.assert_allclose(values["layers.1.up.out"], expected, rtol=1e-6)
    np.testing.assert_array_equal(values["layers.0.hidden"], values["layers.1.up.in"])
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
