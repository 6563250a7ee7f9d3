"""ONNX Runtime: runs the graphs as they are, on the CPU or on CUDA where that is present.

Two defaults of ONNX Runtime would be silent, so neither is left to it: blocked INT4 products round the
activations to int8 unless told not to (0.4 to 0.9 % error per linear; EXPORT.md 7.4), and a provider that
cannot start is replaced by the CPU.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from mbq_export.backends.base import Availability, Backend, Engine, TensorSpec

EXACT: Final = 0
FAST: Final = 4
"""Accuracy levels of 4-bit products: float32 activations, or activations rounded to int8."""


class OrtEngine:
    """A graph loaded into ONNX Runtime.

    Attributes:
        provider: Where its nodes run, for example ``CPUExecutionProvider``.
    """

    provider: str

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` wants, in graph order."""
        raise NotImplementedError

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` returns, in graph order."""
        raise NotImplementedError

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once. Float feeds are cast to the graph's float type.

        Raises:
            FormatError: E4102 for a missing, superfluous or misshapen feed.
            BuildError: E6011 if ONNX Runtime fails inside the graph.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Free the session. Closing twice is allowed."""
        raise NotImplementedError


def open_graph(
    path: Path,
    *,
    providers: Sequence[str] | None = None,
    threads: int = 0,
    accuracy_level: int = EXACT,
) -> Engine:
    """Load a graph.

    Args:
        path: ONNX file, external data beside it.
        providers: In order of preference; None takes CUDA where a device is present, else the CPU.
        threads: CPU threads; 0 takes all that this process may use.
        accuracy_level: `EXACT` or `FAST`.

    Raises:
        MachineError: E3003 without ONNX Runtime, E3008 with two of them, E3006 without a provider.
        BuildError: E6010 if it refuses the graph.
    """
    raise NotImplementedError


def available() -> Availability:
    """Say whether ONNX Runtime works here, without importing it."""
    raise NotImplementedError


BACKEND: Final = Backend(
    name="ort", lowerings=("qdq", "reference"), isolated=False, available=available, open=open_graph
)
