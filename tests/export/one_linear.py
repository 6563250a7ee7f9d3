"""Single packed linears, and graphs of one node made from them: what the op-level tests run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from mbq_export.backends.ort import open_graph
from mbq_export.checkpoint import LinearRecord
from mbq_export.export.graph import Emitter, packed_node
from mbq_export.export.lowerings import LOWERINGS
from mbq_export.export.profile import OPSET23, OpProfile
from mbq_export.export.save import save_graph
from mbq_export.export.weights import PackedSource
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL, PackedWeight, QuantScheme
from mbq_export.schemes.layouts import dense


@dataclass(frozen=True)
class Shelf:
    """Packed linears by name: all that the constants of a graph ask of a checkpoint."""

    linears: dict[str, PackedWeight]
    scheme: QuantScheme | None = None

    @property
    def records(self) -> dict[str, LinearRecord]:
        """What is asked of a record is the scheme: the weight-only one of the width, if none is given."""
        return {name: self._record(name, weight) for name, weight in self.linears.items()}

    def _record(self, name: str, weight: PackedWeight) -> LinearRecord:
        scheme = self.scheme or SCHEMES[f"w{weight.bits}a16"]
        return LinearRecord(
            name=name, n=weight.n, k=weight.k, scheme=scheme, group_size=weight.group_size, bias=False
        )  # fmt: skip

    def packed(self, name: str) -> PackedWeight:
        return self.linears[name]


def packed(
    codes: NDArray[np.integer],
    *,
    bits: int,
    group_size: int,
    scales: NDArray[np.floating] | None = None,
    zeros: NDArray[np.integer] | int | None = 3,
) -> PackedWeight:
    """Pack (N, K) codes; scales default to one 0.01 per group, a zero point to the same everywhere."""
    rows, columns = codes.shape
    shape = (rows, columns // group_size)
    return PackedWeight(
        words=dense.pack(codes.astype(np.uint8), bits=bits),
        scales=np.full(shape, 0.01, np.float16) if scales is None else scales.astype(np.float16),
        zeros=None if zeros is None else np.broadcast_to(np.asarray(zeros, np.uint8), shape).copy(),
        k=columns,
        bits=bits,
        group_size=group_size,
    )


def random_packed(
    rng: np.random.Generator, *, n: int, k: int, bits: int, group_size: int
) -> PackedWeight:
    """Codes, scales and zero points that use their whole range; half of the words are negative."""
    shape = (n, k // group_size)
    return packed(
        rng.integers(0, 2**bits, (n, k)),
        bits=bits,
        group_size=group_size,
        scales=rng.uniform(2**-10, 2**-4, shape),
        zeros=rng.integers(0, 2**bits, shape),
    )


def random_symmetric(
    rng: np.random.Generator, *, n: int, k: int, group_size: int = CHANNEL
) -> PackedWeight:
    """A weight of w4a8, all codes in use."""
    shape = (n, 1) if group_size == CHANNEL else (n, k // group_size)
    scales = rng.uniform(2**-10, 2**-4, shape)
    return PackedWeight(
        words=dense.pack(rng.integers(0, 16, (n, k)).astype(np.uint8), bits=4),
        scales=scales.astype(np.float32 if group_size == CHANNEL else np.float16),
        zeros=None,
        k=k,
        bits=4,
        group_size=group_size,
    )


def source_of(weight: PackedWeight, name: str = "w", scheme: str | None = None) -> PackedSource:
    """Describe one linear as a node's weight; by default of the weight-only scheme of its width."""
    shelf = Shelf({name: weight}, None if scheme is None else SCHEMES[scheme])
    return PackedSource.of(shelf, name)  # type: ignore[arg-type]


def one_node(
    weight: PackedWeight,
    *,
    lowering: str,
    target: str = "ort",
    dtype: str = "fp32",
    profile: OpProfile = OPSET23,
    scheme: str | None = None,
) -> ir.Model:
    """A graph ``x (1, rows, K) -> y`` of one lowered linear."""
    g = Emitter(profile=profile, dtype=dtype)
    x = g.input("x", [1, "rows", weight.k])
    out = g.value("y", [1, "rows", weight.n])
    source = source_of(weight, scheme=scheme)
    g.append(packed_node(g.constant, x, name="linear", source=source, out=out))
    model = g.model("one_linear", [out])
    LOWERINGS[lowering].lower(model, target)
    return model


def write_one(folder: Path, *, bits: int = 3, lowering: str = "reference") -> Path:
    """A sound graph of one linear with external constants, to be damaged."""
    weight = random_packed(np.random.default_rng(1), n=64, k=128, bits=bits, group_size=32)
    path = folder / "one.onnx"
    target, dtype = ("trt", "fp16") if lowering == "plugin" else ("ort", "fp32")
    save_graph(one_node(weight, lowering=lowering, target=target, dtype=dtype), path)
    return path


def edit(path: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    """Change the protobuf of a graph file; its data file stays as it is."""
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def external(model: onnx.ModelProto, suffix: str) -> onnx.TensorProto:
    """The external constant whose name ends like this."""
    return next(tensor for tensor in model.graph.initializer if tensor.name.endswith(suffix))


def run_on_ort(model: ir.Model, x: NDArray[np.floating], folder: Path) -> NDArray[np.floating]:
    """Save a graph of `one_node` and run it on ONNX Runtime at accuracy level 0."""
    path = folder / "one.onnx"
    save_graph(model, path)
    with open_graph(path, threads=1) as engine:
        return engine.run({"x": x[None]})["y"][0]


def relative_error(found: NDArray[np.floating], wanted: NDArray[np.floating]) -> float:
    """Largest error against the largest wanted number; the error itself where all of those are 0."""
    scale = float(np.abs(wanted).max())
    error = float(np.abs(found.astype(np.float64) - wanted).max())
    return error / scale if scale else error
