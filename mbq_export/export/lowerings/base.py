"""What a lowering is."""

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from mbq_export.schemes.base import QuantScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowering:
    """One form of the ``mbq`` nodes of a decoder.

    Attributes:
        name: Value of ``--lowering``.
        keeps_functions: Whether the graph holds ``mbq`` nodes with function bodies.
        supports: Reason why a scheme cannot be written for a target (``ort`` or ``trt``); None if it can.
        lower: Rewrites the nodes of a model in place for a target.
    """

    name: str
    keeps_functions: bool
    supports: Callable[[QuantScheme, str], str | None]
    lower: Callable[[ir.Model, str], None]
