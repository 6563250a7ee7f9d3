"""Linears of channels for TensorRT, one that rounds its activations: written by hand, apart from the exporter."""

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
from onnx import TensorProto

from mbq_export.backends.base import EngineGraph, QuantizedLinear, SizeRange, TensorSpec
from tests.backends.trt_graphs import Draft, save

N, K = 64, 128
NODE = "n.sums"


def rounded_linear(
    folder: Path, *, island: type[np.floating] = np.float32, bits: int = 4
) -> EngineGraph:
    """Scale of the token outside, unit scale inside; ``island`` is the type that surrounds the integers.

    Weights of 4 or 8 bits. With float16 the product's sums are written as Half before they are scaled: what A4 refuses.
    """
    draft = Draft()
    draws = np.random.default_rng(0)
    kind = TensorProto.FLOAT if island is np.float32 else TensorProto.FLOAT16
    draft.constant("smallest", np.array(1e-5, island))
    draft.constant("steps", np.array(127, island))
    draft.constant("one", np.array(1, island))
    draft.constant("zero", np.array(0, np.int8))
    draft.constant("last", np.array([-1], np.int64))
    draft.constant("q", _codes(draws, bits))
    draft.constant("s", draws.uniform(0.01, 0.02, N).astype(island))
    draft.node("Cast", ["x"], "wide", to=kind)
    draft.node("Abs", ["wide"], "sizes")
    draft.node("ReduceMax", ["sizes", "last"], "largest", keepdims=1)
    draft.node("Max", ["largest", "smallest"], "bounded")
    draft.node("Div", ["bounded", "steps"], "scale")
    draft.node("Div", ["wide", "scale"], "quotient")
    draft.node("QuantizeLinear", ["quotient", "one", "zero"], "codes")
    draft.node("DequantizeLinear", ["codes", "one", "zero"], "rounded")
    draft.node("DequantizeLinear", ["q", "s"], "w", axis=1)
    draft.node("MatMul", ["rounded", "w"], "sums")
    draft.node("Mul", ["sums", "scale"], "scaled")
    draft.node("Cast", ["scaled"], "y", to=TensorProto.FLOAT16)
    shape = ("batch_size", "sequence_length")
    graph = EngineGraph(
        name="decoder",
        onnx=folder / "rounded.onnx",
        inputs=(TensorSpec(name="x", dtype="float16", shape=(*shape, K)),),
        outputs=(TensorSpec(name="y", dtype="float16", shape=(*shape, N)),),
        sizes={
            "batch_size": SizeRange(smallest=1, typical=1, largest=1),
            "sequence_length": SizeRange(smallest=1, typical=1, largest=64),
        },
        linears=(QuantizedLinear(node=NODE, shape=(N, K), group_size=0, act_bits=8, bits=bits),),
        weight_bytes=N * K * bits // 8 + 4 * N + 4,
    )
    return save(graph, draft)


def channel_linear(folder: Path) -> EngineGraph:
    """Weights of 8 bits alone: FLOAT scales of channels, then a Cast to the type of the activations."""
    draft = Draft()
    draws = np.random.default_rng(0)
    draft.constant("q", _codes(draws, 8))
    draft.constant("s", draws.uniform(0.01, 0.02, N).astype(np.float32))
    draft.node("DequantizeLinear", ["q", "s"], "wide", axis=1)
    draft.node("Cast", ["wide"], "w", to=TensorProto.FLOAT16)
    draft.node("MatMul", ["x", "w"], "y")
    linear = QuantizedLinear(node="n.y", shape=(N, K), group_size=0, bits=8)
    rounded = rounded_linear(folder)
    graph = replace(
        rounded, onnx=folder / "channel.onnx", linears=(linear,), weight_bytes=N * K + 4 * N
    )
    return save(graph, draft)


def _codes(draws: np.random.Generator, bits: int) -> np.ndarray:
    if bits == 8:
        return draws.integers(-127, 128, (K, N)).astype(np.int8)
    return draws.integers(-7, 8, (K, N)).astype(ml_dtypes.int4)
