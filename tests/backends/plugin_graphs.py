"""Small graphs with plugins for TensorRT, right ones and doctored ones, and libraries to build them with."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mbq_export.backends.base import EngineGraph, SizeRange, TensorSpec
from mbq_export.export import ops
from mbq_export.plugin_library import FILE_NAME, PluginLibrary, read_plugin_library
from mbq_export.reading import sha256_of
from tests.plugins import compiled

N, K, GROUP, LINEARS = 32, 128, 64, 2
SM: Final = 86
"""Architecture of the library: its code serves sm89 too, its PTX what is newer."""


@functools.cache
def library() -> PluginLibrary:
    """The product's library for `SM`; compiling the kernels takes a minute once."""
    build = compiled.kernel_build()
    plan = build.Plan(sms=(SM,))
    kernels = build.compiled(
        plan, ["-c"], suffix=".o", objects=compiled.ROOT / "build/objects", jobs=1
    )
    exports = compiled.ROOT / "plugins/exports.map"
    command = [
        *(compiled.tool("nvcc"), "-shared", "-cudart", "static"),
        *("-Xlinker", f"--version-script={exports}", "-Xlinker", "--no-undefined"),
    ]
    made = compiled.made(f"sm{SM}.so", command, [*compiled.plugin_objects(), *kernels])
    return read_plugin_library(made, found="--plugin-lib")


@functools.cache
def emulated() -> PluginLibrary:
    """The same plugins over kernels that run on a CPU: builds engines as well, and needs no nvcc."""
    return read_plugin_library(compiled.emulated_library(), found="--plugin-lib")


def other_library(folder: Path, code: str) -> PluginLibrary:
    """A library of another's making under the name of ours; the checks of the file itself are skipped."""
    source, path = folder / "other.cpp", folder / FILE_NAME
    source.write_text(code)
    flags = ["-shared", "-fPIC", "-w", *compiled.includes()]
    outcome = compiled.run([compiled.tool("g++"), *flags, source, "-o", path])
    assert outcome.returncode == 0, outcome.stderr
    return stand_in(path)


def stand_in(path: Path) -> PluginLibrary:
    """What a file would be called if its own checks had let it pass."""
    return replace(emulated(), path=path, sha256=sha256_of(path))


def linears(
    folder: Path,
    *,
    dropped: tuple[str, ...] = (),
    body: bool = False,
    **attributes: object,
) -> EngineGraph:
    """x, two W3Linear one after the other, y.

    Args:
        folder: Where the file goes.
        dropped: Attributes that the second node lacks.
        body: Give W3Linear a function body, as a graph in the reference form has.
        attributes: Values that the second node has instead of the right ones.
    """
    nodes, constants = [], []
    for index in range(LINEARS):
        n, k = (K, K) if index == 0 else (N, K)
        name = f"layers.{index}.o_proj"
        inputs = [f"h{index}", *_constants(constants, name, n, k)]
        values = _attributes(n, k)
        if index:
            values = {
                key: each for key, each in (values | attributes).items() if key not in dropped
            }
        node = helper.make_node("W3Linear", inputs, [f"h{index + 1}"], name=name, domain=ops.DOMAIN)
        node.attribute.extend(helper.make_attribute(key, each) for key, each in values.items())
        nodes.append(node)
    specs = [
        TensorSpec(name=name, dtype="float16", shape=("rows", size))
        for name, size in (("h0", K), (f"h{LINEARS}", N))
    ]
    ports = [helper.make_tensor_value_info(s.name, TensorProto.FLOAT16, s.shape) for s in specs]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], constants)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(ops.DOMAIN, 1)]
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=12, functions=[_body(opsets)] if body else []
    )
    onnx.save(model, folder / "linears.onnx")
    return EngineGraph(
        name="decoder",
        onnx=folder / "linears.onnx",
        inputs=(specs[0],),
        outputs=(specs[1],),
        sizes={"rows": SizeRange(smallest=1, typical=1, largest=64)},
        plugin_layers={"W3Linear": tuple(node.name for node in nodes)},
        lowering="plugin",
    )


def _constants(constants: list[TensorProto], name: str, n: int, k: int) -> list[str]:
    draws = np.random.default_rng(n)
    tensors = {
        "qweight": draws.integers(-(2**31), 2**31 - 1, (n // 16, k // 128, 192), np.int32),
        "scales": draws.uniform(0.01, 0.02, (n // 16, k // GROUP, 8, 2)).astype(np.float16),
        "zeros": np.full((n // 16, k // GROUP, 2), 0x33333333, np.int32),
    }
    constants.extend(
        numpy_helper.from_array(each, f"{name}.{key}") for key, each in tensors.items()
    )
    return [f"{name}.{key}" for key in tensors]


def _attributes(n: int, k: int) -> dict[str, object]:
    numbers = {
        "N": n,
        "K": k,
        "group_size": GROUP,
        "bits": 3,
        "signed_codes": 0,
        "layout_version": 1,
    }
    plugin = {"has_bias": 0, "epilogue": 0, "act_bits": 16, "row_order": 0}
    text = {"layout": "w3t", "plugin_namespace": "mbq", "plugin_version": "1"}
    return {**numbers, **plugin, **text}


def _body(opsets: list[onnx.OperatorSetIdProto]) -> onnx.FunctionProto:
    """Something that parses in the place of a plugin: the first N columns of x."""
    zero = numpy_helper.from_array(np.zeros(1, np.int64))
    end = numpy_helper.from_array(np.full(1, N, np.int64))
    axis = numpy_helper.from_array(np.full(1, -1, np.int64))
    nodes = [
        helper.make_node("Constant", [], ["zero"], value=zero),
        helper.make_node("Constant", [], ["end"], value=end),
        helper.make_node("Constant", [], ["axis"], value=axis),
        helper.make_node("Slice", ["x", "zero", "end", "axis"], ["y"]),
    ]
    inputs = ["x", "qweight", "scales", "zeros"]
    return helper.make_function(ops.DOMAIN, "W3Linear", inputs, ["y"], nodes, opsets[:1])
