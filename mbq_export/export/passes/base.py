"""What a pass is."""

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One exact rewrite.

    Attributes:
        name: What reports call it.
        run: Changes the model in place and returns one sentence for each place it had to leave.
    """

    name: str
    run: Callable[[ir.Model], list[str]]
