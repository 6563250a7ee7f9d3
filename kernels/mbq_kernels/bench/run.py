"""A whole run: ceilings, linears, chain, decode, targets; or a rehearsal of all of it on a CPU."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from mbq_export.errors import MachineError
from mbq_export.progress import Progress, silent
from mbq_kernels.bench.ceilings import Ceilings
from mbq_kernels.bench.chain import chain_entrants, time_chain
from mbq_kernels.bench.clock import Clock, GraphClock, Rehearsal
from mbq_kernels.bench.decode import TINY, TINY_CONTEXTS, time_decode
from mbq_kernels.bench.document import SCHEMA, check_document
from mbq_kernels.bench.emulated import check_emulated
from mbq_kernels.bench.entrant import Entrant, Setting
from mbq_kernels.bench.limits import PREDICTED, card_named, card_of, predicted_chain_ms
from mbq_kernels.bench.linears import FORMATS, contenders, format_name
from mbq_kernels.bench.machine import ROOT, Device, Sensors, software
from mbq_kernels.bench.peers import peers_of
from mbq_kernels.bench.plan import absent_entrants, planned_rows, seconds
from mbq_kernels.bench.protocol import (
    CACHES,
    DRIFT_PERCENT,
    LEAST_LAUNCHES,
    LEAST_REPLAYS,
    NOISY_PERCENT,
    REPLAYS,
    SMALLEST_ROTATION_BYTES,
    WARM_REPLAYS,
)
from mbq_kernels.bench.session import Rig, time_linears
from mbq_kernels.bench.shapes import LLAVA_OV_7B, REHEARSAL, REHEARSAL_BLOCK, Shape, Suite
from mbq_kernels.bench.targets import judged
from mbq_kernels.library import KernelLibrary

BUILT: Final = ROOT / "build" / "libmbq_kernels.so"
EMULATED: Final = ROOT / "build" / "libmbq_emulated.so"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for.

    Attributes:
        suite: Shapes and rows.
        peers: ``auto``, ``none`` or a list of packages.
        library: The compiled kernels; None looks where a checkout builds them.
        dry_run: Rehearse on the CPU and time nothing.
        decode: Whether to decode a whole decoder too.
    """

    suite: Suite
    peers: str = "auto"
    library: Path | None = None
    dry_run: bool = False
    decode: bool = True

    def entrants(self) -> tuple[Entrant, ...]:
        """Everyone who is asked, base of each dtype first.

        Raises:
            UsageError: E2001 for an unknown peer.
        """
        return (*contenders("float16"), *contenders("bfloat16"), *peers_of(self.peers))


Keep = Callable[[dict[str, Any]], None]
"""Told the result so far after every part, so that an ended run leaves what it has."""


def run(
    request: Request, *, progress: Progress = silent, keep: Keep = lambda _: None
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        request: What to time.
        progress: Told after every linear.
        keep: Told after every part.

    Returns:
        The result; its ``dry_run`` says whether anything was timed.

    Raises:
        MachineError: E3001 without a GPU, E3005 without the kernel library, unless it is a dry run.
        UsageError: E2001 for an unknown peer.
    """
    entrants = request.entrants()
    if request.dry_run:
        return _rehearse(request, entrants, progress)
    rig = open_rig(request.library, progress=progress)
    result = _frame(request, rig, entrants)
    present = [entrant for entrant in entrants if not entrant.absent(rig.setting)]
    started = time.monotonic()
    sizes = [
        int(entrant.traffic(shape, 1).weight_bytes)
        for shape in request.suite.shapes
        for entrant in present
        if entrant.source != "peer"
    ]
    rig.ceilings.measure_first(sorted(set(sizes)))
    parts: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("rows", lambda: time_linears(rig, request.suite, present, result["rows"])),
        ("chain", lambda: time_chain(rig, LLAVA_OV_7B, chain_entrants(present))),
        ("decode", lambda: time_decode(rig) if request.decode else None),
    )
    sensors = Sensors(rig.setting.device)
    for name, measured in parts:
        try:
            result[name] = measured()
        finally:  # whatever ends the run, what it measured is kept
            result["ceilings"] = rig.ceilings.as_json()
            result["sensors"][f"after_{name}"] = sensors.read()
            result["software"]["seconds"] = round(time.monotonic() - started, 1)
            result["targets"] = judged(result)
            keep(result)
    result["complete"] = True
    return check_document(result)


def open_rig(library: Path | None, *, progress: Progress = silent) -> Rig:
    """Take the first GPU and load the kernels.

    Raises:
        MachineError: E3001 without a GPU, E3005 without the library.
    """
    if not torch.cuda.is_available():
        raise MachineError(
            "E3001",
            "Kernels are timed on an NVIDIA GPU, and torch sees none here.",
            why="a time measured elsewhere would mean nothing",
            fix=("mbq-export bench --kernels --dry-run", "run it on a machine with a GPU"),
        )
    device = torch.device("cuda", torch.cuda.current_device())
    loaded = KernelLibrary.load(library or BUILT)
    setting = Setting(device=device, machine=Device.of(device), library=loaded)
    return _rig(GraphClock(device), setting, progress)


def _rig(clock: Clock, setting: Setting, progress: Progress) -> Rig:
    return Rig(
        clock=clock,
        setting=setting,
        ceilings=Ceilings(clock, setting),
        card=card_of(setting.machine.name),
        progress=progress,
    )


def _rehearse(
    request: Request, entrants: tuple[Entrant, ...], progress: Progress
) -> dict[str, Any]:
    """Plan the asked-for run, and run all of its code once at tiny sizes on the CPU."""
    clock = Rehearsal()
    path = request.library or (EMULATED if EMULATED.is_file() else None)
    library = None if path is None else KernelLibrary.load(path)
    if library is not None:
        check_emulated(library)
    setting = Setting(device=clock.device, machine=Device.of(clock.device), library=library)
    rig = _rig(clock, setting, progress)
    result = _frame(request, rig, entrants)
    present = [entrant for entrant in entrants if not entrant.absent(setting)]
    rig.ceilings.measure_first([])
    result["ceilings"] = rig.ceilings.as_json()
    result["rows"] = planned_rows(request.suite, entrants)
    result["rehearsal"] = {
        "kernels": "emulated" if library is not None else "none; the oracle stands in",
        "rows": time_linears(rig, REHEARSAL, present),
        "chain": time_chain(rig, REHEARSAL_BLOCK, chain_entrants(present)),
        "decode": time_decode(rig, shape=TINY, contexts=TINY_CONTEXTS),
    }
    result["targets"] = judged(result)
    result["complete"] = True
    return check_document(result)


def _frame(request: Request, rig: Rig, entrants: tuple[Entrant, ...]) -> dict[str, Any]:
    """Everything that is known before anything is timed."""
    library = rig.setting.library
    return {
        "schema": SCHEMA,
        "dry_run": request.dry_run,
        "complete": False,
        "suite": {
            "name": request.suite.name,
            "shapes": [[shape.n, shape.k] for shape in request.suite.shapes],
            "rows": list(request.suite.rows),
            "estimated_seconds": {
                name: round(seconds(request.suite, entrants, card_named(name)))
                for name in PREDICTED
            },
        },
        "device": rig.setting.machine.as_json(),
        "software": software(None if library is None else library.path),
        "sensors": {"before": Sensors(rig.setting.device).read()},
        "protocol": PROTOCOL,
        "ceilings": None,
        "absent": absent_entrants(entrants, rig.setting, rehearsal=request.dry_run),
        "rows": [],
        "chain": [],
        "decode": None,
        "rehearsal": {"kernels": "", "rows": [], "chain": [], "decode": None},
        "targets": [],
        "predictions": chain_predictions(),
    }


PROTOCOL: Final = {
    "smallest_rotation_bytes": SMALLEST_ROTATION_BYTES,
    "rotation_caches": CACHES,
    "least_launches": LEAST_LAUNCHES,
    "warm_replays": WARM_REPLAYS,
    "replays": REPLAYS,
    "least_replays": LEAST_REPLAYS,
    "noisy_percent": NOISY_PERCENT,
    "drift_percent": DRIFT_PERCENT,
}


def chain_predictions() -> list[dict[str, Any]]:
    """Predicted milliseconds of a token's linears, by card and format."""
    return [
        {
            "card": name,
            "format": "fp16" if scheme == "fp16" else format_name(scheme, group_size),
            "chain_ms": predicted_chain_ms(
                LLAVA_OV_7B, card_named(name), scheme=scheme, group_size=group_size
            ),
        }
        for name in PREDICTED
        for scheme, group_size in (("fp16", 0), *FORMATS)
    ]


def chosen_suite(suite: Suite, shapes: tuple[Shape, ...] | None) -> Suite:
    """A suite, with other shapes if any are named."""
    return (
        suite if not shapes else replace(suite, name=f"{suite.name}, chosen shapes", shapes=shapes)
    )
