"""The oracle: the transformers model with dequantized weights, and an engine that looks like the ONNX graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbq_export.checkpoint import QuantCheckpoint
    from mbq_export.families.base import LoadedModel


def fake_quant_model(checkpoint: QuantCheckpoint) -> LoadedModel:
    """Build the transformers model that a checkpoint stands for, in float32.

    Everything downstream is compared with it: quantized linears hold ``(u - z) * s``, which float32 holds
    exactly; all other tensors are the stored ones.
    """
    raise NotImplementedError
