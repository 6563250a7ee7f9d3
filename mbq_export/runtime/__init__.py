"""5  Bundle -> tokens: `open_session` picks the graphs, a `Session` answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from mbq_export.backends import BACKENDS
from mbq_export.backends.ort import open_graph
from mbq_export.backends.torch import (
    decoder_engine,
    embed_engine,
    fake_quant_model,
    kernel_engines,
    vision_engine,
)
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import FormatError, UsageError
from mbq_export.families.inputs import Processor
from mbq_export.families.locate import family_of, read_config
from mbq_export.native import CALL_SECONDS
from mbq_export.reading import read_json
from mbq_export.runtime.host import engine_dtype, engine_folder, hosted_engines
from mbq_export.runtime.preprocess import HostMerge
from mbq_export.runtime.request import Engines, Model
from mbq_export.runtime.session import Session
from mbq_export.tensor_file import TensorFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mbq_export.backends.base import Engine
    from mbq_export.bundle import Bundle

__all__ = [
    "Session",
    "Tuning",
    "default_lowering",
    "graph_record",
    "lowerings_of",
    "open_session",
    "runs_graphs",
]

# What export calls its files and graphs; a test holds them to `export.record`.
RECORD: Final = "mbq_export.json"
HOST_TENSORS: Final = "host_tensors.safetensors"
NEWLINE: Final = "image_newline"
VISION: Final = "vision_encoder"
EMBED: Final = "embed_tokens"
DECODER: Final = "decoder_model_merged"

TORCH: Final = "torch"
ORACLE: Final = "oracle"
AUTO: Final = "auto"
ORT: Final = "ort"
PLUGIN: Final = "plugin"
QDQ: Final = "qdq"
ISOLATED: Final = ("rtx", "trt")
"""Backends that run engines, each in a process of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What only some backends know.

    Attributes:
        accuracy_level: Of ONNX Runtime's 4-bit products: 0 exact, 4 int8 activations (fast, not exact).
        engine_timeout_s: Limit of one call of an engine of ``rtx`` or ``trt``, after which its process is ended.
    """

    accuracy_level: int = 0
    engine_timeout_s: float = CALL_SECONDS


def open_session(
    bundle: Bundle,
    *,
    backend: str = ORT,
    lowering: str | None = None,
    dtype: str = "fp32",
    threads: int = 0,
    tuning: Tuning | None = None,
) -> Session:
    """Load the graphs of a bundle.

    Args:
        bundle: An opened bundle.
        backend: ``ort``; ``rtx`` or ``trt`` for engines; ``torch`` for the packed weights on the kernels, on a
            GPU if there is one, or ``torch:cpu``, ``torch:cuda``; ``oracle`` for the reference model with dequantized weights.
        lowering: Form of the decoder graph, None for `default_lowering`; only ``ort`` runs graphs.
        dtype: ``fp32`` or ``fp16`` of the graphs of ``ort``.
        threads: CPU threads; 0 takes all that this process may use. torch has its own setting.
        tuning: What some backends know beside that.

    Raises:
        UsageError: E2001 if the bundle has no such graph, or there is no such backend or device.
        MachineError: E30xx if the backend does not work here.
        BuildError: E6010 if it refuses a graph.
        FormatError: E40xx to E46xx for damaged files.
    """
    config = read_config(bundle.checkpoint_folder)
    family = family_of(config)
    processor = Processor.from_folder(bundle.checkpoint_folder, family)
    longest = family.text_shape(config).max_positions
    limit = bundle.manifest.get("limits", {}).get("max_context") or longest
    name, tuning = backend, tuning or Tuning()
    if backend in ISOLATED:
        folder = engine_folder(bundle, backend)
        embed = graph_record(bundle, EMBED, dtype=engine_dtype(folder))["file"]
        engines = hosted_engines(
            folder, backend, embed=bundle.onnx / embed, timeout_s=tuning.engine_timeout_s
        )
        newline = TensorFile(bundle.onnx / HOST_TENSORS).array(NEWLINE)
    elif runs_graphs(backend):
        lowering = lowering or default_lowering(bundle)
        engines = _graphs(bundle, _opener(backend, threads, tuning.accuracy_level), lowering, dtype)
        newline, name = TensorFile(bundle.onnx / HOST_TENSORS).array(NEWLINE), f"{name}:{lowering}"
    else:
        checkpoint = _checkpoint(bundle)
        newline = checkpoint.tensor(family.newline)
        if backend == ORACLE:
            engines = _oracle(checkpoint)
        else:
            engines, name = _kernels(checkpoint, backend, limit)
    model = Model(
        engines=engines,
        preprocessor=processor,
        merge=HostMerge(
            family=family,
            config=config,
            newline=newline,
            image_token_id=processor.image_token_id,
        ),
        limit=limit,
    )
    return Session(model, name=name)


def runs_graphs(backend: str) -> bool:
    """Whether a backend runs graphs, not the checkpoint."""
    return backend != ORACLE and backend.partition(":")[0] != TORCH


def lowerings_of(bundle: Bundle) -> list[str]:
    """Forms of the decoder graph that ONNX Runtime runs in float32, in the order they were written."""
    if not bundle.has_graphs:
        return []
    graphs = read_json(bundle.onnx / RECORD, code="E4604")["graphs"]
    forms = [graph["form"] for graph in graphs if graph["form"] and graph["dtype"] == "fp32"]
    return [form["lowering"] for form in forms if form["target"] == ORT]


def default_lowering(bundle: Bundle) -> str:
    """Form of the decoder graph to run where none was named: ``qdq``, unless there are only others."""
    found = lowerings_of(bundle)
    return found[0] if found and QDQ not in found else QDQ


def graph_record(
    bundle: Bundle, name: str, *, dtype: str = "fp32", lowering: str | None = None
) -> dict[str, Any]:
    """Return what the exporter recorded about one graph.

    Args:
        bundle: An opened bundle.
        name: `VISION`, `EMBED` or `DECODER`.
        dtype: ``fp32`` or ``fp16``.
        lowering: Form of a decoder; the one for ONNX Runtime is taken.

    Raises:
        UsageError: E2001 if there is no such graph, naming those that are there; E2006 if there is none at all.
        FormatError: E4604 for a damaged record.
    """
    if not bundle.has_graphs:
        raise UsageError(
            "E2006",
            f"{bundle.name} has no graphs.",
            why="it was built with --fake-quant, to evaluate its checkpoint",
            fix=("--backend oracle runs the checkpoint itself", "build it without --fake-quant"),
        )
    graphs = read_json(bundle.onnx / RECORD, code="E4604")["graphs"]
    for graph in graphs:
        form = graph["form"] or {}
        fits = lowering is None or (form.get("lowering"), form.get("target")) == (lowering, ORT)
        if (graph["name"], graph["dtype"]) == (name, dtype) and fits:
            found: dict[str, Any] = graph
            return found
    raise UsageError(
        "E2001",
        f"The bundle has no {dtype} graph {' '.join(filter(None, (name, lowering)))} for ONNX Runtime.",
        why="plugins run in engines of TensorRT only"
        if lowering == PLUGIN
        else f"it has {', '.join(graph['file'] for graph in graphs)}",
        fix=("--lowering qdq", "--backend oracle runs the checkpoint itself"),
    )


def _opener(backend: str, threads: int, accuracy_level: int) -> Callable[[Path], Engine]:
    if backend == ORT:
        return partial(open_graph, threads=threads, accuracy_level=accuracy_level)
    return BACKENDS[backend].open


def _graphs(bundle: Bundle, load: Callable[[Path], Engine], lowering: str, dtype: str) -> Engines:
    files = {
        name: graph_record(bundle, name, dtype=dtype, lowering=form)["file"]
        for name, form in ((VISION, None), (EMBED, None), (DECODER, lowering))
    }
    return Engines(
        vision=load(bundle.onnx / files[VISION]),
        embed=load(bundle.onnx / files[EMBED]),
        decoder=load(bundle.onnx / files[DECODER]),
    )


def _checkpoint(bundle: Bundle) -> QuantCheckpoint:
    if not bundle.checkpoint_folder.is_dir():
        raise FormatError(
            "E4601",
            f"The bundle has no {bundle.checkpoint_folder.name} folder.",
            why="torch runs the checkpoint, not the graphs",
            fix="--backend ort",
        )
    return QuantCheckpoint.open(bundle.checkpoint_folder, verify=False)


def _oracle(checkpoint: QuantCheckpoint) -> Engines:
    model = fake_quant_model(checkpoint)
    return Engines(
        vision=vision_engine(model), embed=embed_engine(model), decoder=decoder_engine(model)
    )


def _kernels(checkpoint: QuantCheckpoint, backend: str, limit: int) -> tuple[Engines, str]:
    """The engines, and what reports call them: ``torch:cuda``."""
    device = backend.partition(":")[2] or AUTO
    found = kernel_engines(checkpoint, device=device, slots=limit)
    engines = Engines(vision=found.vision, embed=found.embed, decoder=found.decoder)
    return engines, f"{TORCH}:{found.device}"
