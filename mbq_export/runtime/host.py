"""The engines of a bundle that fit this machine, each in a process of its own; the rest of a session is as ever.

    vision.engine, decoder.engine ── child each ──► Engine          embed_tokens ── mapped file ──► rows

Embeddings are looked up on the host, unless the bundle was built with an engine for that. A decoder's cache stays on
the device; embeddings, positions and logits cross a pipe. Nothing here has run on a GPU yet (docs/verification.md).
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from mbq_export.backends._trt_host import gpu_for, open_hosted
from mbq_export.backends._trt_record import ENGINE_RECORD
from mbq_export.errors import UsageError
from mbq_export.native import CALL_SECONDS
from mbq_export.reading import read_json
from mbq_export.runtime.request import Engines

if TYPE_CHECKING:
    from pathlib import Path

    from mbq_export.backends.base import Engine
    from mbq_export.bundle import Bundle

DECODER: Final = "decoder.engine"
VISION: Final = "vision.engine"
EMBED: Final = "embed.engine"
DTYPES: Final = {"float16": "fp16", "bfloat16": "bf16"}
"""Name of a graph's type by that of its tensors."""


def hosted_engines(
    folder: Path, backend: str, *, embed: Path, timeout_s: float = CALL_SECONDS
) -> Engines:
    """Load the engines of a folder.

    Args:
        folder: As `engine_folder` chooses it.
        backend: ``trt`` or ``rtx``.
        embed: Graph of the embedding, whose table is read where the folder has no engine of it.
        timeout_s: Limit of one call.

    Raises:
        MachineError: E30xx if this machine cannot run one.
        IncompatibleError: E70xx if they were built for something else.
    """
    load = partial(open_hosted, backend, timeout_s=timeout_s)
    from mbq_export.backends._table import open_table  # noqa: PLC0415 - brings onnx, which describing needs not

    with ExitStack() as opened:
        hosted = (folder / EMBED).stem in _record(folder / ENGINE_RECORD)["engines"]
        vision = opened.enter_context(load(folder / VISION))
        decoder = opened.enter_context(load(folder / DECODER))
        rows: Engine = load(folder / EMBED) if hosted else open_table(embed)
        engines = Engines(vision=vision, decoder=decoder, embed=opened.enter_context(rows))
        opened.pop_all()
    return engines


def engine_folder(bundle: Bundle, backend: str) -> Path:
    """Choose the folder for this GPU; the first of the flavour if none fits, whose misfit is then told in full.

    Raises:
        UsageError: E2001 if there is none of the flavour.
        MachineError: E3001 or E3002 without a GPU or its driver.
    """
    records = {path.parent: _record(path) for path in sorted(bundle.engines.rglob(ENGINE_RECORD))}
    folders = [place for place, record in records.items() if record["flavour"] == backend]
    if not folders:
        built = [place.relative_to(bundle.engines).as_posix() for place in records]
        raise UsageError(
            "E2001",
            f"{bundle.name} has no engines of {backend}.",
            why=f"it has {', '.join(built) or 'none'}",
            fix=(
                "--backend ort",
                f"mbq-export build --model MODEL --target DEVICE:{backend} -o DIR",
            ),
        )
    sm = f"sm{gpu_for(folders[0] / DECODER).sm}"
    return next((place for place in folders if sm in records[place]["sm"]), folders[0])


def engine_dtype(folder: Path) -> str:
    """Type of the activations of a folder's engines: ``fp16`` or ``bf16``."""
    inputs = _record(folder / ENGINE_RECORD)["engines"][DECODER.partition(".")[0]]["inputs"]
    return DTYPES[inputs[0]["dtype"]]


def _record(path: Path) -> dict[str, Any]:
    return read_json(path, code="E4604")
