"""What the user asked for, and what each option means once it is checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from mbq_export.backends import BACKENDS
from mbq_export.backends._trt_preflight import AHEAD_OF_TIME, check_device
from mbq_export.backends.ort import check_packages, installed_packages
from mbq_export.bundle import MANIFEST
from mbq_export.calibrate.data import CalibrationData, read_manifest
from mbq_export.errors import MachineError, UsageError
from mbq_export.families.base import TextShape, VisionShape
from mbq_export.families.locate import SHIPPED
from mbq_export.native import local_gpu
from mbq_export.pipeline.engine_options import EngineOptions
from mbq_export.pipeline.levels import check_version
from mbq_export.quantize.widths import MixedBits
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import QuantScheme
from mbq_export.target import AUTO, SERVED, Target

DEFAULT_DATA: Final = "builtin:shapes"
DEFAULT_BITS: Final = 3
UNQUANTIZED_BITS: Final = 16


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What the user asked for, options as typed.

    Attributes:
        model: Folder or alias.
        out: Bundle folder to make.
        weight_bits: 3, 4, or 16 for the unquantized baseline; None is 3, or what the scheme says.
        scheme: Says the same as ``weight_bits``, or None.
        mixed: Widths of single units, or a budget that decides them.
        lm_head_bits: 16 keeps the output head, 8 or 4 make it codes of its own.
        vision_bits: 16 keeps the vision tower, 8 rounds its weights and activations.
        group_size: Columns that share a scale, 0 for one scale per output channel; None takes the scheme's own.
        method: Name of a preset.
        replaced: Switches of the preset that the user set.
        data: Calibration manifest, or None for the default of the shipped model.
        import_scales: Published channel scales that replace the search, or None.
        sensitivity: An edited report that replaces the measured ratios, or None.
        samples: Calibration samples.
        max_ram: Bytes that calibration may take; None is what the machine has left.
        targets: Devices, for example ``rtx4090:rtx``.
        lowering: Form of the decoder that engines are built from: ``plugin``, ``qdq`` or ``auto``.
        engines: How they are built.
        op_level: Operators that graphs for engines may use, or ``auto`` for what all targets read.
        kv: Cache of the decoder for engines: ``static``, ``concat``, or None for the better one of what targets read.
        max_context: Longest sequence of the graphs; None takes the model's own limit, at most 4096.
        seed: Every random choice.
        text_only_ok: Accept calibration data without pictures.
        skip_bad: Unreadable samples to tolerate.
        models: Folder of local models, searched for aliases and hub ids.
        ignore_extra: Regular expressions of stored tensors that belong to no part of the model.
        record: File that says that existing output is of the kind to be made.
        force: Replace existing output of that kind.
        fresh: Start again instead of resuming.
        gate: ``on``, ``warn`` or ``off``.
        gate_reason: Why the gate is not ``on``; lands in the manifest.
        require_engine: A target whose engine cannot be built here is an error.
        engine_timeout_s: Limit for one engine.
        bundle: Finished bundle to go on from, instead of a model.
        first: Stage to go on at then: ``export`` or ``engine``.
        command: The command line, for provenance and the resume hint.
        fake_quant: Make a checkpoint and a study of it alone: no graphs, no engines.
        takes_codes: Accept a model that another project quantized, and take its codes over as they are.
    """

    model: str
    out: Path
    weight_bits: int | None = None
    scheme: str | None = None
    mixed: MixedBits = field(default_factory=MixedBits)
    lm_head_bits: int = 16
    vision_bits: int = 16
    group_size: int | None = None
    method: str = "mbq"
    replaced: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    import_scales: Path | None = None
    sensitivity: Path | None = None
    samples: int = 128
    max_ram: int | None = None
    targets: tuple[str, ...] = ("auto",)
    lowering: str = "auto"
    engines: EngineOptions = field(default_factory=EngineOptions)
    op_level: str = "auto"
    kv: str | None = None
    max_context: int | None = None
    seed: int = 0
    text_only_ok: bool = False
    skip_bad: int = 0
    models: Path | None = None
    ignore_extra: tuple[str, ...] = ()
    record: str = MANIFEST
    force: bool = False
    fresh: bool = False
    gate: str = "on"
    gate_reason: str = ""
    require_engine: bool = False
    engine_timeout_s: float = 3600.0
    bundle: Path | None = None
    first: str = "engine"
    command: str = ""
    fake_quant: bool = False
    takes_codes: bool = False


def scheme_of(request: BuildRequest) -> QuantScheme | None:
    """Return the scheme that the width and the name agree on; None for the unquantized baseline.

    Raises:
        UsageError: E2001, E2002, E2005.
    """
    by_bits = {
        scheme.weight_bits: scheme
        for scheme in SCHEMES.members().values()
        if scheme.act_bits == UNQUANTIZED_BITS
    }
    named = None if request.scheme is None else SCHEMES[request.scheme]
    if named is not None and request.weight_bits not in {None, named.weight_bits}:
        raise UsageError(
            "E2002",
            f"--scheme {named.name} and --wbits {request.weight_bits} contradict each other.",
            why=f"{named.name} has {named.weight_bits} bits",
            fix=f"--scheme {named.name}",
        )
    if named is not None:
        return named
    bits = DEFAULT_BITS if request.weight_bits is None else request.weight_bits
    if bits == UNQUANTIZED_BITS:
        return None
    if bits not in by_bits:
        raise UsageError(
            "E2005",
            f"--wbits {bits} is not a width of any scheme.",
            why=f"known: {', '.join(map(str, sorted(by_bits)))}, and {UNQUANTIZED_BITS} for the baseline",
            fix=("--wbits 3", "--wbits 4"),
        )
    return by_bits[bits]


def check_gate(request: BuildRequest) -> None:
    """Refuse an unknown gate, and one that is not on without a reason.

    Raises:
        UsageError: E2001, E2002.
    """
    if request.gate not in {"on", "warn", "off"}:
        raise UsageError(
            "E2001", f"Unknown gate {request.gate!r}.", why="known: on, warn, off", fix="--gate on"
        )
    if request.gate != "on" and not request.gate_reason:
        raise UsageError(
            "E2002",
            f"--gate {request.gate} has no reason.",
            why="a bundle whose checks were overridden says why, in its manifest and every report",
            fix='--gate-reason "..."',
        )


def check_runtime(request: BuildRequest) -> None:
    """Refuse a build whose gates could not run.

    Raises:
        MachineError: E3003 without ONNX Runtime, E3008 with two of them.
    """
    if request.record == MANIFEST and request.gate != "off" and not request.fake_quant:
        check_packages(installed_packages())


def check_context(request: BuildRequest, text: TextShape, vision: VisionShape) -> None:
    """Refuse a context beyond the model's positions, or too short for a picture and one more token.

    Raises:
        UsageError: E2009.
    """
    if request.max_context is None:
        return
    if request.max_context <= vision.tokens_per_tile:
        raise UsageError(
            "E2009",
            f"A context of {request.max_context} tokens holds no picture.",
            why=f"the smallest has {vision.tokens_per_tile} tokens, and the prompt comes on top",
            fix=("leave out --max-context", f"--max-context {text.max_positions}"),
        )
    if request.max_context > text.max_positions:
        raise UsageError(
            "E2009",
            f"A context of {request.max_context} tokens is longer than the model's {text.max_positions}.",
            why="its positions were never trained beyond that",
            fix=f"--max-context {text.max_positions}",
        )


def data_of(request: BuildRequest) -> CalibrationData:
    """Choose the calibration samples and check their pictures.

    Raises:
        UsageError: E2018 if there is no default for this model.
        FormatError: E43xx for the data.
    """
    name = request.data
    replaced = request.replaced
    looks = (
        replaced.get("rounding") == "gptq"
        or replaced.get("clip", "none") != "none"
        or replaced.get("search_scope") == "block"
    )
    tower = request.vision_bits != UNQUANTIZED_BITS
    asking = f"--vision-bits {request.vision_bits}" if tower else f"--method {request.method}"
    blind = request.method == "rtn" and not (looks or tower or request.mixed.chooses)
    if name is None and (request.model == SHIPPED or blind):
        name = DEFAULT_DATA
    if name is None:
        raise UsageError(
            "E2018",
            f"{asking} needs calibration data for {request.model}.",
            why="scales and roundings are chosen on pictures and answers like those of the deployment",
            fix=("--data calib.jsonl", f"--data {DEFAULT_DATA} (a smoke test, not for real use)"),
        )
    return read_manifest(
        name,
        samples=request.samples,
        seed=request.seed,
        text_only_ok=request.text_only_ok,
        skip_bad=request.skip_bad,
    )


def targets_of(request: BuildRequest) -> tuple[tuple[Target, ...], dict[str, str]]:
    """Return the devices to build for, and the reason for each that this machine cannot build for.

    Raises:
        UsageError: E2001, E2012.
        MachineError: E3003 if an engine is required, or can only be built on its device; E3001 for such a one on a
            machine without a GPU.
    """
    targets, skipped = [], {}
    for text in request.targets:
        target = _local_target() if text == AUTO else Target.parse(text)
        if target.flavour == "cpu":
            continue
        backend = BACKENDS[target.flavour]
        available = backend.available()
        if available.ok:
            targets.append(_known_version(target, available.version))
            check_device(target.flavour, target, local_gpu())
            continue
        targets.append(target)
        if request.require_engine or target.flavour not in AHEAD_OF_TIME:
            raise MachineError(
                "E3003",
                f"No engine for {target} can be built here.",
                why=f"found {available.found}, needed {available.needed}",
                fix=available.fix,
            )
        skipped[str(target)] = f"{available.found}; {available.fix}"
    return tuple(targets), skipped


def _local_target() -> Target:
    """This machine's GPU, if engines can be built ahead of time for it; else ``cpu``, which needs no engine."""
    gpu = local_gpu()
    return Target.parse("cpu" if gpu is None or gpu.sm not in SERVED["rtx"] else f"sm{gpu.sm}:rtx")


def _known_version(target: Target, version: str) -> Target:
    """The target with the version that is installed, whose operators a graph may use.

    Raises:
        UsageError: E2012 if it is older than any that graphs are written for.
    """
    numbers = [int(part) for part in version.split(".")[:2] if part.isdecimal()]
    if len(numbers) == 2:
        target = replace(target, version=(numbers[0], numbers[1]))
    check_version(target, version)
    return target
