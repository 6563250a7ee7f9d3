"""What a lowering is."""

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from mbq_export.schemes.base import QuantScheme


def any_group(scheme: QuantScheme, group_size: int) -> None:
    """Refuse no group size."""
    del scheme, group_size


def any_dtype(scheme: QuantScheme | None, target: str, dtype: str) -> None:
    """Refuse none of the types that the form is written for."""
    del scheme, target, dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowering:
    """One form of the ``mbq`` nodes of a decoder.

    Attributes:
        name: Value of ``--lowering``.
        dtypes: Types of activations that it is written for.
        keeps_functions: Whether the graph holds ``mbq`` nodes with function bodies.
        supports: Reason why a scheme cannot be written for a target (``ort`` or ``trt``); None if it can.
        lower: Rewrites the nodes of a model in place for a target.
        check_group: Raises UsageError E2006 for groups of a scheme that this form cannot hold for any target.
        refuses_dtype: Reason why a scheme, None for no linear quantized, is not written in one of ``dtypes`` for a
            target; None if it is.
    """

    name: str
    dtypes: tuple[str, ...]
    keeps_functions: bool
    supports: Callable[[QuantScheme, str], str | None]
    lower: Callable[[ir.Model, str], None]
    check_group: Callable[[QuantScheme, int], None] = any_group
    refuses_dtype: Callable[[QuantScheme | None, str, str], str | None] = any_dtype

    def misfit(self, scheme: QuantScheme | None, target: str, dtype: str) -> str | None:
        """Reason why it is not written in a type; None if it is."""
        if dtype not in self.dtypes:
            return f"it exists in {', '.join(self.dtypes)}"
        return self.refuses_dtype(scheme, target, dtype)
