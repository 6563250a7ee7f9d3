"""Bundles as `build` seals them, without its calibration: quantized by rounding alone, exported, sealed."""

from pathlib import Path

from mbq_export.bundle import Bundle, seal
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.export import GraphForm, export
from mbq_export.families.base import LoadedModel
from mbq_export.quantize import quantize
from mbq_export.schemes import SCHEMES

QDQ = GraphForm(lowering="qdq", target="ort")
REFERENCE = GraphForm(lowering="reference", target="ort")


def rounded_bundle(
    root: Path,
    model: LoadedModel,
    *,
    scheme: str | None = "w3a16",
    group_size: int = 64,
    forms: tuple[GraphForm, ...] = (QDQ,),
) -> Bundle:
    """Make a bundle in a fresh folder; without a scheme it is the full-precision baseline."""
    root.mkdir(parents=True)
    scales = ChannelScales(
        scales={}, sensitivity={}, calib={"switches": Switches(method="rtn").resolved()}
    )
    checkpoint = quantize(
        model,
        scales,
        scheme=None if scheme is None else SCHEMES[scheme],
        group_size=group_size,
        out=root / "weights",
    )
    export(checkpoint, root / "onnx", family=model.family, forms=forms)
    facts = {"quant": dict(checkpoint.info), "limits": {"max_context": model.text.max_positions}}
    seal(root, facts, {})
    return Bundle.open(root)
