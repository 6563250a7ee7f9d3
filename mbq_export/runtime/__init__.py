"""Stage 5, run: Bundle -> tokens. `open_session` picks the graphs, a `Session` answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mbq_export.runtime.session import Session

if TYPE_CHECKING:
    from mbq_export.bundle import Bundle

__all__ = ["Session", "open_session"]


def open_session(
    bundle: Bundle,
    *,
    backend: str = "ort",
    lowering: str = "qdq",
    dtype: str = "fp32",
    threads: int = 0,
    accuracy_level: int = 0,
) -> Session:
    """Load the graphs of a bundle.

    Args:
        bundle: An opened bundle.
        backend: ``ort``, or ``torch`` for the reference model, which needs no graphs.
        lowering: Form of the decoder graph; ``torch`` has none and ignores it.
        dtype: ``fp32`` or ``fp16``.
        threads: CPU threads; 0 takes all that this process may use.
        accuracy_level: Of ONNX Runtime's 4-bit products: 0 exact, 4 int8 activations (fast, not exact).

    Raises:
        UsageError: E2001 if the bundle has no such graph, or there is no such backend.
        MachineError: E30xx if the backend does not work here.
        BuildError: E6010 if it refuses a graph.
    """
    raise NotImplementedError
