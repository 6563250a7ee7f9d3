"""Something that runs a graph (Engine) and the file that makes it (Backend).

graphs ── build ──► engine files + engine.json + layers.json     (only runtimes that compile)
graph or engine file ── open ──► Engine ── run(feeds) ──► outputs
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from numpy.typing import NDArray

from mbq_export.plugin_library import PluginLibrary
from mbq_export.progress import Progress
from mbq_export.report import Check
from mbq_export.target import Target


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: Tensor name, for example ``past_key_values.0.key``.
        dtype: Numpy's name of the element type, for example ``float16``.
        shape: Sizes, or the symbol of a size that varies (``sequence_length``).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Engine(Protocol):
    """A graph that is loaded and can be run. Closing twice is allowed."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` wants, in graph order."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` returns, in graph order."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once.

        Args:
            feeds: One array per input, dtype and shape as `inputs` say.

        Returns:
            One array per output.

        Raises:
            FormatError: E4102 if an array is missing, superfluous, or has a wrong dtype or shape.
        """

    def close(self) -> None:
        """Free memory and devices."""

    def __enter__(self) -> Self:
        """Return the engine."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the engine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Availability:
    """Whether a backend can work on this machine, as ``doctor`` prints it.

    Attributes:
        ok: Whether it can.
        found: What is there, for example ``rtx 1.7.1.116``.
        version: Exact version, empty if nothing is there; names the folder of its engines.
        needed: What it wants.
        fix: Command that mends it; empty when ``ok``.
    """

    ok: bool
    found: str
    needed: str
    version: str = ""
    fix: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeRange:
    """Smallest, typical and largest value of one symbol in an engine's single profile."""

    smallest: int
    typical: int
    largest: int


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedLinear:
    """A linear layer that must stay packed in the engine.

    Attributes:
        node: Name of its MatMul node in the ONNX graph.
        shape: (N, K).
        group_size: Columns that share a scale; 0 for one scale per row.
        act_bits: Width of the activations that it multiplies.
        bits: Width of its constant: 4, or 8; codes of 3 bits lie in 4.
    """

    node: str
    shape: tuple[int, int]
    group_size: int
    act_bits: int = 16
    bits: int = 4

    @property
    def constant(self) -> str:
        """Type of its constant, as TensorRT calls it."""
        return f"Int{self.bits}"


@dataclass(frozen=True, kw_only=True)
class EngineGraph:
    """One ONNX file to compile, and what the result must look like.

    Attributes:
        name: Stem of the engine file: ``decoder``, ``vision`` or ``embed``.
        onnx: The file; external data beside it.
        inputs: Contract of the graph, sizes that vary as symbols.
        outputs: The same for its results.
        sizes: One range for every symbol in ``inputs``; all inputs derive their profile from it.
        linears: Layers that must hold Int4 or Int8 constants.
        attention_layers: Fused attention rows expected, or None if the graph decomposes attention.
        kv_updates: In-place cache updates expected, or None.
        weight_bytes: Bytes of all constants by the exporter's count, or None to skip that check.
        plugin_layers: Names of the nodes that must become plugin layers, by operator.
        lowering: Form of the graph, recorded.
        op_level: Name of its op level, recorded.
        kv: Its cache, recorded: ``static``, ``concat``, or ``none``.
        dtype: Type of its activations, recorded: ``fp16`` or ``bf16``.
    """

    name: str
    onnx: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sizes: Mapping[str, SizeRange] = field(default_factory=dict)
    linears: tuple[QuantizedLinear, ...] = ()
    attention_layers: int | None = None
    kv_updates: int | None = None
    weight_bytes: int | None = None
    plugin_layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lowering: str = "qdq"
    op_level: str = ""
    kv: str = "none"
    dtype: str = "fp16"


@dataclass(frozen=True, kw_only=True, slots=True)
class BuilderOptions:
    """How the builder works; recorded with every engine.

    Attributes:
        workspace_mib: Scratch memory the builder may plan with.
        opt_level: Builder optimization level.
        weight_streaming: Let the device keep weights in host memory and fetch them while it runs.
        timing_cache: File with the times of kernels that an earlier build measured, or None.
    """

    workspace_mib: int = 1024
    opt_level: int = 3
    weight_streaming: bool = False
    timing_cache: Path | None = None


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """What to build: all graphs of one plan, into one folder.

    Attributes:
        graphs: The files, one engine each.
        target: Device and flavour.
        also: Further devices of the same flavour that the engines must run on.
        out: Folder to publish, whole or not at all.
        plugins: Library to load before a graph with plugin layers is read.
        options: How to build.
        logs: Where the child's logs go when it fails; default ``<out>.logs``.
        timeout_s: Limit for one engine.
    """

    graphs: tuple[EngineGraph, ...]
    target: Target
    out: Path
    also: tuple[Target, ...] = ()
    plugins: PluginLibrary | None = None
    options: BuilderOptions = field(default_factory=BuilderOptions)
    logs: Path | None = None
    timeout_s: float = 3600.0

    @property
    def devices(self) -> tuple[Target, ...]:
        """All devices, `target` first."""
        return (self.target, *self.also)


@dataclass(frozen=True, kw_only=True)
class EngineFile:
    """One engine on disk.

    Attributes:
        path: The file.
        sha256: Its hash.
        size: Its bytes.
        layers: Rows of its layer table.
        plugin_layers: Number of plugin layers that the parser made, by operator.
        checks: What was asserted about that table; the caller's gates decide about a failure.
        seconds: Wall time of parse and build.
        peak_rss_bytes: Largest memory of the child.
    """

    path: Path
    sha256: str
    size: int
    layers: int
    plugin_layers: Mapping[str, int]
    checks: tuple[Check, ...]
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """What a build wrote.

    Attributes:
        folder: The published folder.
        library: Flavour and exact version, for example ``rtx 1.7.1.116``.
        engines: One file per graph, by graph name.
        verified: Whether the engines ran on a device.
        reason: Why not.
    """

    folder: Path
    library: str
    engines: Mapping[str, EngineFile]
    verified: bool
    reason: str

    @property
    def failed(self) -> tuple[Check, ...]:
        """Checks of any engine that said no."""
        return tuple(c for each in self.engines.values() for c in each.checks if c.ok is False)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A runtime.

    Attributes:
        name: Value of ``--backend``.
        lowerings: Forms of the decoder it reads, best first.
        isolated: Whether its engines live in a child process.
        available: Whether it works here, and what would mend it. Imports no foreign library.
        open: Load a graph (or, where ``build`` exists, an engine file).
        build: Compile graphs into an engine folder; None where graphs run as they are.
    """

    name: str
    lowerings: tuple[str, ...]
    isolated: bool
    available: Callable[[], Availability]
    open: Callable[[Path], Engine]
    build: Callable[[EngineRequest, Progress], EngineRecord] | None = None
