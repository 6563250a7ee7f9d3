"""The vision graph: tower and projector, traced, because towers differ in structure and are small.

pixel_values (tiles, 3, h, w) ──► image_features (tiles, tokens, hidden)
"""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from mbq_export import __version__
from mbq_export.errors import FormatError, InternalError
from mbq_export.export import ops
from mbq_export.export.graph import (
    DTYPES,
    PRODUCER,
)
from mbq_export.export.passes import PASSES
from mbq_export.export.passes.halve_floats import halve
from mbq_export.export.rounded_vision import mark
from mbq_export.families.weights import SourceWeights, StoredTensor
from mbq_export.reading import TensorEntry
from mbq_export.schemes.oracle import dequantized

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from mbq_export.checkpoint import QuantCheckpoint
    from mbq_export.export.profile import OpProfile
    from mbq_export.families.base import ModelFamily

GRAPH_NAME: Final = "vision_encoder"
EXAMPLE_TILES: Final = 3
"""Not 1, which the tracer would take for a fixed size, and no other size of the graph."""


def vision_graph(
    checkpoint: QuantCheckpoint, *, family: ModelFamily, profile: OpProfile
) -> ir.Model:
    """Trace tower and projector in fp32.

    Args:
        checkpoint: Holds their weights; `rounded_vision` puts codes in the place of those that are some.
        family: Builds the module.
        profile: Gives the opset.

    Raises:
        InternalError: E9001 if the tracer returns no graph.
    """
    weights = _tower_weights(checkpoint, head=family.head)
    model = family.load(checkpoint.folder, meta_blocks=True, weights=weights)
    shape = model.vision
    tower = family.vision_module(model)
    pixels = torch.zeros(EXAMPLE_TILES, shape.channels, shape.image_size, shape.image_size)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            tower,
            (pixels,),
            dynamo=True,
            opset_version=profile.opset,
            input_names=[ops.PIXEL_VALUES],
            output_names=[ops.IMAGE_FEATURES],
            dynamic_shapes={ops.PIXEL_VALUES: {0: ops.TILES}},
            verbose=False,
        )
    if program is None:
        raise InternalError("E9001", "The tracer returned no vision graph.")
    traced: ir.Model = program.model
    PASSES["strip_metadata"].run(traced)
    mark(traced, model, tower, checkpoint.tower)
    traced.graph.name = GRAPH_NAME
    traced.ir_version = profile.ir_version
    traced.producer_name, traced.producer_version = PRODUCER, __version__
    return traced


def halved(model: ir.Model, dtype: str) -> ir.Model:
    """Copy a traced graph in a type of 16 bits; constants are rounded when the copy is written.

    Args:
        model: In fp32.
        dtype: ``fp16`` or ``bf16``.

    Raises:
        FormatError: E4005 if the tower mixes precisions on purpose.
    """
    copy = model.clone()
    reasons = halve(copy, DTYPES[dtype])
    if reasons:
        raise FormatError(
            "E4005",
            f"The vision tower cannot be written in {dtype}: {reasons[0]}.",
            why="a tower that mixes precisions would change its function",
            fix="--dtype fp32 and a target that takes it",
        )
    return copy


@dataclass(frozen=True, kw_only=True)
class _TowerWeights(SourceWeights):
    """A checkpoint as a loader sees it that leaves the decoder's blocks alone.

    A packed head has no part in the tower: zeros that take no memory stand for it.
    """

    checkpoint: QuantCheckpoint
    head: str

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        linear = name.removesuffix(".weight")
        if linear == self.head and linear in self.checkpoint.records:
            tensor = torch.zeros(1, 1).expand(self.tensors[name].entry.shape)
        elif linear in self.checkpoint.records:
            tensor = torch.from_numpy(
                dequantized(self.checkpoint.packed(linear)).astype(np.float32)
            )
        else:
            tensor = torch.from_numpy(np.array(self.checkpoint.tensor(name)))
        return tensor if dtype is None else tensor.to(dtype)


def _tower_weights(checkpoint: QuantCheckpoint, *, head: str) -> _TowerWeights:
    shapes = {name: checkpoint.tensor(name).shape for name in checkpoint.tensors}
    for record in checkpoint.records.values():
        shapes[f"{record.name}.weight"] = (record.n, record.k)
        if record.bias:
            shapes[f"{record.name}.bias"] = (record.n,)
    tensors = {
        name: StoredTensor(
            path=checkpoint.folder,
            # Not a place in a file: what `read` would return.
            entry=TensorEntry(dtype="F32", shape=tuple(shape), start=0, end=0),
        )
        for name, shape in sorted(shapes.items())
    }
    return _TowerWeights(
        folder=checkpoint.folder, tensors=tensors, stamps={}, checkpoint=checkpoint, head=head
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tracer's notes about packages that are not installed, and its own deprecations, to itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*LeafSpec", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
