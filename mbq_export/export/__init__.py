"""Stage 3, export: a quantized checkpoint becomes ONNX graphs.

QuantCheckpoint ── decoder.py ── passes ── lowering ──► decoder_model_merged_<variant>.onnx
                ├─ embed.py ───────────────────────────► embed_tokens.onnx
                └─ vision.py (traced) ─────────────────► vision_encoder.onnx
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mbq_export.export.record import ExportRecord, GraphForm
from mbq_export.progress import Progress, silent

if TYPE_CHECKING:
    from pathlib import Path

    from mbq_export.checkpoint import QuantCheckpoint
    from mbq_export.families.base import ModelFamily

__all__ = ["ExportRecord", "GraphForm", "export"]


def export(
    checkpoint: QuantCheckpoint,
    out: Path,
    *,
    family: ModelFamily,
    forms: tuple[GraphForm, ...],
    progress: Progress = silent,
) -> ExportRecord:
    """Write all graphs of a checkpoint into a fresh folder.

    One vision and one embedding graph are written per dtype that occurs in ``forms``.

    Args:
        checkpoint: What to export; without quantized linears the graphs hold plain MatMul weights.
        out: Folder to create (``onnx/`` of a bundle); published by one rename.
        family: The model's family.
        forms: Decoder graphs to write.
        progress: Called after each graph.

    Returns:
        What was written, also in ``mbq_export.json``.

    Raises:
        UsageError: E2002, E2011 if the folder exists.
        FormatError: E44xx if a written graph fails its checks.
    """
    raise NotImplementedError
