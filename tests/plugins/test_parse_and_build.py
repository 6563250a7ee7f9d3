"""TensorRT for RTX reads single nodes of every operator and builds plans of them, without a GPU.

Each build is a child with the library path that `mbq_export.backends._trt_flavour` prepares. Plugins enter through the
ONNX parser only; what it hands on of constants is asserted, because it widens some types silently.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from mbq_export.backends import _trt_flavour
from mbq_export.errors import MachineError
from mbq_export.export import ops
from mbq_export.schemes import SCHEMES
from mbq_kernels.testing import Case
from tests.plugins import compiled

pytestmark = pytest.mark.trt

N, K = 64, 256
ONNX_TYPES = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}
RTX_TYPES = {torch.float16: "HALF", torch.bfloat16: "BF16"}

CHILD = """
import ctypes, json, os, sys
ctypes.CDLL("libtensorrt_rtx.so")
import {module} as trt

class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.lines = []

    def log(self, severity, text):
        if severity <= trt.ILogger.WARNING or "LayerType: " in text:
            self.lines.append(text)

def tensors(layer):
    found = [layer.get_input(i) for i in range(layer.num_inputs)]
    return [[t.dtype.name, list(t.shape)] for t in found]

log = Log()
library = trt.get_plugin_registry().load_library(sys.argv[1])
builder = trt.Builder(log)
network = builder.create_network(0)
parser = trt.OnnxParser(network, log)
parsed = parser.parse_from_file(sys.argv[2])
plugins, size, output = [], 0, None
if parsed:
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    plugins = [[each.name, tensors(each)] for each in layers if each.type == trt.LayerType.PLUGIN_V3]
    output = list(network.get_output(0).shape)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    k = network.get_input(0).shape[-1]
    profile.set_shape("x", (1, 1, k), (1, 1, k), (2, 64, k))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    size = 0 if plan is None else plan.nbytes
print(json.dumps({{"loaded": library is not None, "parsed": parsed, "plugins": plugins, "plan": size, "output": output,
                  "log": log.lines}}), flush=True)
os._exit(0)
"""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node, and what a test bends about it."""

    scheme: str
    dtype: torch.dtype
    bias: bool = False
    group_size: int = 128
    changed: dict[str, int | str] = field(default_factory=dict)
    without: str = ""


def write_graph(node: Node, path: Path) -> Path:
    """A model of one plugin node with the weights of a kernel case."""
    case = Case(
        scheme=node.scheme, dtype=node.dtype, m=2, n=N, k=K, group_size=node.group_size, bias=node.bias
    )  # fmt: skip
    problem = case.make(0)
    tiled, kind = problem.tiled, ONNX_TYPES[node.dtype]
    arrays = {"qweight": tiled.codes, "scales": tiled.scales, "zeros": tiled.zeros}
    constants = [
        onnx.helper.make_tensor(
            name, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape, a.tobytes(), raw=True
        )
        for name, a in arrays.items()
        if a is not None
    ]
    if node.bias:
        bias = torch.from_numpy(np.asarray(problem.packed.bias)).to(node.dtype).view(torch.int16)
        data = bias.numpy().tobytes()
        constants.append(onnx.helper.make_tensor("bias", kind, (N,), data, raw=True))
    scheme = SCHEMES[node.scheme]
    attributes: dict[str, int | str] = {
        "N": N, "K": K, "group_size": node.group_size, "bits": scheme.weight_bits, "layout_version": 1,
        "has_bias": int(node.bias), "epilogue": 0, "act_bits": scheme.act_bits,
        "plugin_namespace": ops.PLUGIN_NAMESPACE, "plugin_version": ops.PLUGIN_VERSION, **node.changed,
    }  # fmt: skip
    attributes.pop(node.without, None)
    inputs = ["x", *(constant.name for constant in constants)]
    made = onnx.helper.make_node(
        ops.OPS[node.scheme].name, inputs, ["y"], name="layers.0.q", domain=ops.DOMAIN, **attributes
    )
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [made],
        "one",
        [value("x", kind, ["B", "S", K])],
        [value("y", kind, ["B", "S", N])],
        constants,
    )
    imports = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(ops.DOMAIN, 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def built(node: Node, folder: Path) -> dict[str, Any]:
    """What a child makes of a node; fails if it dies."""
    try:
        rtx = _trt_flavour.find("rtx")
    except MachineError as error:
        pytest.skip(str(error))
    library, graph = compiled.emulated_library(), write_graph(node, folder / "one.onnx")
    environment = _trt_flavour.child_environment(rtx, folder)
    script = CHILD.format(module=rtx.module)
    outcome = compiled.run(
        [sys.executable, "-c", script, library, graph], env=environment, cwd=folder, timeout=100
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    found: dict[str, Any] = json.loads(outcome.stdout.splitlines()[-1])
    found["said"] = outcome.stderr
    return found


NODES = [
    Node(scheme=scheme, dtype=dtype, bias=bias, group_size=group)
    for scheme, groups in (("w3a16", (64, 128)), ("w4a16", (128,)), ("w4a8", (0, 128)))
    for group in groups
    for dtype, bias in ((torch.float16, False), (torch.bfloat16, True))
]


@pytest.mark.parametrize(
    "node", NODES, ids=lambda n: f"{n.scheme}-{n.group_size}-{n.dtype}-{n.bias}"
)
def test_a_node_becomes_one_plugin_layer_of_a_plan(node: Node, tmp_path: Path) -> None:
    """FP32 scales and bf16 biases reach the plugin as they are in the graph."""
    found = built(node, tmp_path)
    assert found["parsed"], found["log"]
    activation = RTX_TYPES[node.dtype]
    zeros = [["INT32", [N // 16, K // node.group_size, 2]]] if node.scheme != "w4a8" else []
    scales = ["HALF", [N // 16, K // node.group_size, 8, 2]] if node.group_size else ["FLOAT", [N]]
    expected = [
        [activation, [-1, -1, K]],
        ["INT32", [N // 16, 2, 192 if node.scheme == "w3a16" else 256]],
        scales,
        *zeros,
        *([[activation, [N]]] if node.bias else []),
    ]
    assert found["plugins"] == [["layers.0.q", expected]]
    assert found["output"] == [-1, -1, N]
    assert found["plan"] > 0
    rows = [line for text in found["log"] for line in text.splitlines() if "LayerType: " in line]
    custom = [row for row in rows if "LayerType: custom_layer" in row]
    assert len(custom) == 1
    assert "[ONNX Layer: layers.0.q]" in custom[0]


def test_gate_and_up_leave_half_the_columns(tmp_path: Path) -> None:
    node = Node(scheme="w3a16", dtype=torch.float16, changed={"epilogue": 1})
    found = built(node, tmp_path)
    assert found["output"] == [-1, -1, N // 2]
    assert found["plan"] > 0


@pytest.mark.parametrize(
    ("bent", "stage", "reason"),
    [
        (Node(scheme="w3a16", dtype=torch.float16, without="epilogue"), "parse", "field epilogue is missing"),
        (Node(scheme="w3a16", dtype=torch.float16, changed={"K": 384}), "parse", "x has 256 columns, expected K = 384"),
        (Node(scheme="w3a16", dtype=torch.float16, changed={"has_bias": 1}), "parse", "4 inputs, expected 5"),
        (Node(scheme="w3a16", dtype=torch.float16, changed={"bits": 4}), "parse", "bits is 4, not 3"),
        (Node(scheme="w3a16", dtype=torch.float16, changed={"N": 96}), "build", "input 1 has rank 3 and size 4 first"),
    ],
    ids=["missing", "K", "bias", "bits", "N"],
)  # fmt: skip
def test_a_bent_node_is_refused_with_the_plugins_reason(
    bent: Node, stage: str, reason: str, tmp_path: Path
) -> None:
    found = built(bent, tmp_path)
    assert found["parsed"] is (stage == "build")
    assert found["plan"] == 0
    assert reason in found["said"]
