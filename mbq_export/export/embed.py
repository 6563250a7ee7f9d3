"""The embedding graph: token ids to rows of the table, one Gather."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mbq_export.export import ops, weights
from mbq_export.export.graph import INT64, Emitter

if TYPE_CHECKING:
    import onnx_ir as ir

    from mbq_export.checkpoint import QuantCheckpoint
    from mbq_export.export.profile import OpProfile
    from mbq_export.families.base import ModelFamily

GRAPH_NAME: Final = "embed_tokens"


def embed_graph(
    checkpoint: QuantCheckpoint, *, family: ModelFamily, dtype: str, profile: OpProfile
) -> ir.Model:
    """Write ``input_ids`` (B, T) INT64 to ``inputs_embeds`` (B, T, hidden).

    Args:
        checkpoint: Holds the table.
        family: Its path and sizes.
        dtype: Type of the table and the output.
        profile: Op level.
    """
    shape = family.text_shape(checkpoint.config)
    g = Emitter(profile=profile, dtype=dtype)
    ids = g.input(ops.INPUT_IDS, [ops.BATCH, ops.SEQUENCE], dtype=INT64)
    table = weights.plain_tensor(
        f"{GRAPH_NAME}.weight",
        weights.tensor_reader(checkpoint, f"{family.embed}.weight"),
        shape=(shape.vocab, shape.hidden),
        dtype=g.dtype,
    )
    out = g.value(ops.INPUTS_EMBEDS, [ops.BATCH, ops.SEQUENCE, shape.hidden])
    rows = g.op("Gather", [g.constant(table), ids], out, name=GRAPH_NAME, axis=0)
    return g.model(GRAPH_NAME, [rows])
