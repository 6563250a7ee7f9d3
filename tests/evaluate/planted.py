"""Bundles with one fault in the constants of a decoder graph, as a bug of the exporter would leave it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from mbq_export.bundle import PROVENANCE, Bundle, seal
from mbq_export.schemes.layouts.dense import pack, unpack

Constants = dict[str, NDArray[np.generic]]

GRAPHS = {
    "qdq": "decoder_model_merged_qdq_ort.onnx",
    "reference": "decoder_model_merged_reference.onnx",
}
BITS = 3


def planted(
    bundle: Bundle, root: Path, *, file: str, change: Callable[[Constants], None]
) -> Bundle:
    """Copy a bundle, change constants of one graph in the copy, and seal it again.

    Args:
        bundle: A good bundle; it stays as it is.
        root: Where the copy goes.
        file: Graph file in ``onnx/``.
        change: Changes arrays of the dictionary in place, or replaces them.
    """
    shutil.copytree(bundle.root, root)
    path = root / "onnx" / file
    model = onnx.load(path)
    constants = {each.name: numpy_helper.to_array(each).copy() for each in model.graph.initializer}
    before = {name: array.copy() for name, array in constants.items()}
    change(constants)
    differ = [name for name in before if (before[name] != constants[name]).any()]
    assert differ, "a fault that changes nothing is none"
    for tensor in model.graph.initializer:
        if tensor.name in differ:
            tensor.CopyFrom(numpy_helper.from_array(constants[tensor.name], tensor.name))
    path.unlink()
    (root / "onnx" / f"{file}_data").unlink()
    onnx.save(model, path, save_as_external_data=True, location=f"{file}_data", size_threshold=256)
    facts = {key: bundle.manifest[key] for key in bundle.manifest if key not in {"schema", "files"}}
    (root / PROVENANCE).unlink()
    seal(root, facts, {})
    return Bundle.open(root)


def wrong_scale(node: str, row: int, group: int) -> dict[str, Callable[[Constants], None]]:
    """One scale, ten percent too large, by lowering."""

    def qdq(constants: Constants) -> None:
        constants[f"{node}.block_scales"][group, row] *= 1.1

    def reference(constants: Constants) -> None:
        constants[f"{node}.scales"][row, group] *= np.float16(1.1)

    return {"qdq": qdq, "reference": reference}


def swapped_zero_points(node: str, row: int, group: int) -> dict[str, Callable[[Constants], None]]:
    """The zero points of two groups of one row, one for the other, by lowering.

    Signed codes have the zero point subtracted already, so there the codes move. ``zeros`` of the reference
    graph tell by how much.
    """

    def reference(constants: Constants) -> None:
        zeros = constants[f"{node}.zeros"]
        first, second = other_zero(zeros[row], group)
        zeros[row, [first, second]] = zeros[row, [second, first]]

    def qdq(constants: Constants) -> None:
        codes = constants[f"{node}.qweight_int4"]
        rows = len(codes) // len(constants[f"{node}.block_scales"])
        # Any two groups have codes that reach -z: the smallest is minus the zero point.
        columns = codes[:, row].astype(np.int8).reshape(-1, rows)
        first, second = other_zero(-columns.min(axis=1), group)
        shift = int(columns[first].min()) - int(columns[second].min())
        columns[first] -= shift
        columns[second] += shift
        moved = np.clip(columns, -8, 7).reshape(-1).astype(codes.dtype)
        codes[:, row] = moved

    return {"qdq": qdq, "reference": reference}


def other_zero(zeros: NDArray[np.generic], group: int) -> tuple[int, int]:
    """The group and the next one with another zero point."""
    count = len(zeros)
    for step in range(1, count):
        other = (group + step) % count
        if zeros[other] != zeros[group]:
            return group, other
    raise AssertionError("all zero points of this row are equal: choose another row")


def transposed_group(node: str, row: int, group: int) -> dict[str, Callable[[Constants], None]]:
    """A square of codes, one group wide, with rows and columns exchanged, by lowering."""

    def qdq(constants: Constants) -> None:
        codes = constants[f"{node}.qweight_int4"]
        size = len(codes) // len(constants[f"{node}.block_scales"])
        square = np.s_[group * size : (group + 1) * size, row : row + size]
        codes[square] = codes[square].T.copy()

    def reference(constants: Constants) -> None:
        words, groups = constants[f"{node}.qweight"], constants[f"{node}.scales"].shape[1]
        columns = words.shape[1] * 32 // BITS
        codes = unpack(words.view(np.uint32), bits=BITS, columns=columns)
        size = columns // groups
        square = np.s_[row : row + size, group * size : (group + 1) * size]
        codes[square] = codes[square].T.copy()
        constants[f"{node}.qweight"] = pack(codes, bits=BITS).view(np.int32)

    return {"qdq": qdq, "reference": reference}
