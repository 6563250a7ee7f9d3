"""Everything that can go wrong cheaply, found before anything expensive starts.

request ── plan ──► Plan: model folder, data, scheme, targets, what is quantized, what it will take
                      └── fingerprint: whatever decides the result, and nothing else
"""

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from mbq_export import __version__
from mbq_export.backends import BACKENDS
from mbq_export.calibrate.data import CalibrationData, read_manifest
from mbq_export.calibrate.methods import METHODS
from mbq_export.channel_scales import Switches
from mbq_export.checkpoint import KEPT
from mbq_export.errors import MachineError, ResourceError, UsageError
from mbq_export.families.base import ModelFamily, TextShape
from mbq_export.families.locate import SHIPPED, ModelSource, family_of, locate, read_config
from mbq_export.native import available_memory, local_gpu
from mbq_export.reading import sha256_of
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import QuantScheme, groups_of
from mbq_export.schemes.layouts import LAYOUTS
from mbq_export.state import revision_of
from mbq_export.target import AUTO, SERVED, Target
from mbq_export.writing import refuse_existing

CODE: Final = (
    "schemes", "families", "blocks", "calibrate", "quantize", "export", "checkpoint", "channel_scales", "tensor_file",
)  # fmt: skip
"""Packages whose change would make a resumed build a mixture of two programs."""

DEFAULT_DATA: Final = "builtin:shapes"
DEFAULT_BITS: Final = 3
UNQUANTIZED_BITS: Final = 16
LONGEST_DEFAULT_CONTEXT: Final = 4096
HALF_BYTES: Final = 2
# Disk: the checkpoint, and one graph per lowering at up to fp32 size, beside the final bundle's rename.
DISK_FACTOR: Final = 6.0
# Memory: two fp32 copies of the model while the gates compare it with its graphs, and the libraries.
MEMORY_FACTOR: Final = 10.0
LIBRARIES_BYTES: Final = 700 << 20
REFERENCE_LIMIT_WEIGHTS: Final = 300_000_000
"""Above this, ONNX Runtime would unfold the reference graph into too much memory (EXPORT 6.1)."""


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What the user asked for, options as typed.

    Attributes:
        model: Folder or alias.
        out: Bundle folder to make.
        weight_bits: 3, 4, or 16 for the unquantized baseline; None is 3, or what the scheme says.
        scheme: Says the same as ``weight_bits``, or None.
        group_size: Columns that share a scale.
        method: Name of a preset.
        replaced: Switches of the preset that the user set.
        data: Calibration manifest, or None for the default of the shipped model.
        samples: Calibration samples.
        targets: Devices, for example ``rtx4090:rtx``.
        max_context: Longest sequence of the graphs; None takes the model's own limit, at most 4096.
        seed: Every random choice.
        text_only_ok: Accept calibration data without pictures.
        skip_bad: Unreadable samples to tolerate.
        models: Folder of local models, searched for aliases and hub ids.
        force: Replace an existing bundle.
        fresh: Start again instead of resuming.
        gate: ``on``, ``warn`` or ``off``.
        gate_reason: Why the gate is not ``on``; lands in the manifest.
        require_engine: A target whose engine cannot be built here is an error.
        engine_timeout_s: Limit for one engine.
        command: The command line, for provenance and the resume hint.
    """

    model: str
    out: Path
    weight_bits: int | None = None
    scheme: str | None = None
    group_size: int = 128
    method: str = "mbq"
    replaced: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    samples: int = 128
    targets: tuple[str, ...] = ("auto",)
    max_context: int | None = None
    seed: int = 0
    text_only_ok: bool = False
    skip_bad: int = 0
    models: Path | None = None
    force: bool = False
    fresh: bool = False
    gate: str = "on"
    gate_reason: str = ""
    require_engine: bool = False
    engine_timeout_s: float = 3600.0
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be done, every value decided.

    Attributes:
        request: What it came from.
        source: Where the model lies.
        family: Its kind.
        config: Its config.json.
        text: Decoder sizes.
        scheme: Number format; None for the unquantized baseline.
        switches: Resolved switches.
        data: Chosen calibration samples, their pictures checked; None for the unquantized baseline.
        targets: Devices to build engines for, without ``cpu``.
        skipped_engines: Reason by target, where this machine cannot build.
        fingerprint: Whatever decides the result.
    """

    request: BuildRequest
    source: ModelSource
    family: ModelFamily
    config: Mapping[str, Any]
    text: TextShape
    scheme: QuantScheme | None
    switches: Switches
    data: CalibrationData | None
    targets: tuple[Target, ...]
    skipped_engines: Mapping[str, str]
    fingerprint: Mapping[str, object]

    @property
    def scheme_name(self) -> str:
        """Name of the number format, or of its absence."""
        return KEPT if self.scheme is None else self.scheme.name

    @property
    def max_context(self) -> int:
        """Longest sequence of the graphs."""
        return self.request.max_context or min(self.text.max_positions, LONGEST_DEFAULT_CONTEXT)

    @property
    def quantized_weights(self) -> int:
        """Weights of all decoder linears."""
        return sum(n * k for n, k in linear_shapes(self.text).values()) * self.text.layers

    @property
    def with_reference(self) -> bool:
        """Whether the reference graph is small enough to be run."""
        return self.quantized_weights <= REFERENCE_LIMIT_WEIGHTS

    def table(self) -> list[tuple[str, int, str, str]]:
        """What is quantized, what is kept, and why: module group, count, bits, reason."""
        linears = self.text.layers * len(self.family.linears)
        if self.scheme is None:
            return [("everything", linears, "16", "baseline: --wbits 16")]
        group = self.request.group_size
        bits = f"{self.scheme.bits_per_weight(group):.3f}"
        return [
            (
                "decoder linears",
                linears,
                bits,
                f"{self.scheme.name} g{group}, {self.switches.method}",
            ),
            ("vision tower, projector", 1, "16", "policy: small, and sensitive"),
            ("token embedding, head", 2, "16", "policy: read once per token, or tied"),
            ("norms, biases", linears, "16", "policy: no matrices"),
        ]


def make_plan(request: BuildRequest) -> Plan:
    """Check the request against the model, the data's place, the machine and each other.

    Raises:
        UsageError: E2001, E2002, E2004, E2005, E2011, E2012.
        MachineError: E3003 if an engine is required and its library is missing, E3014 for a model not here.
        FormatError: E40xx for the model's config.
        ResourceError: E5002 or E5003 if disk or memory cannot suffice.
    """
    refuse_existing(request.out, force=request.force)
    scheme = _scheme(request)
    _check_gate(request)
    source = locate(request.model, models=request.models)
    config = read_config(source.folder)
    family = family_of(config)
    text = family.text_shape(config)
    if scheme is not None:
        for _, k in linear_shapes(text).values():
            groups_of(k, request.group_size)
    _check_context(request, text)
    switches = METHODS[request.method].resolve(request.replaced)
    targets, skipped = _targets(request)
    plan = Plan(
        request=request,
        source=source,
        family=family,
        config=config,
        text=text,
        scheme=scheme,
        switches=switches,
        data=_data(request) if scheme is not None else None,
        targets=targets,
        skipped_engines=skipped,
        fingerprint={},
    )
    _check_room(plan)
    return Plan(**{**_fields(plan), "fingerprint": _fingerprint(plan)})


def linear_shapes(text: TextShape) -> dict[str, tuple[int, int]]:
    """(N, K) of the seven linears of a block."""
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    return {
        "self_attn.q_proj": (queries, text.hidden),
        "self_attn.k_proj": (keys, text.hidden),
        "self_attn.v_proj": (keys, text.hidden),
        "self_attn.o_proj": (text.hidden, queries),
        "mlp.gate_proj": (text.intermediate, text.hidden),
        "mlp.up_proj": (text.intermediate, text.hidden),
        "mlp.down_proj": (text.hidden, text.intermediate),
    }


def machine_class() -> dict[str, object]:
    """What kind of machine this is, without naming it."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages whose arithmetic or files end up in a bundle."""
    names = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy", "safetensors")
    return {name: metadata.version(name) for name in names}


def _fields(plan: Plan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in Plan.__dataclass_fields__}


def _scheme(request: BuildRequest) -> QuantScheme | None:
    by_bits = {scheme.weight_bits: scheme for scheme in SCHEMES.members().values()}
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


def _check_gate(request: BuildRequest) -> None:
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


def _check_context(request: BuildRequest, text: TextShape) -> None:
    if request.max_context is not None and request.max_context > text.max_positions:
        raise UsageError(
            "E2009",
            f"A context of {request.max_context} tokens is longer than the model's {text.max_positions}.",
            why="its positions were never trained beyond that",
            fix=f"--max-context {text.max_positions}",
        )


def _data(request: BuildRequest) -> CalibrationData:
    name = request.data
    if name is None and (request.model == SHIPPED or request.method == "rtn"):
        name = DEFAULT_DATA
    if name is None:
        raise UsageError(
            "E2017",
            f"--method {request.method} needs calibration data for {request.model}.",
            why="scales are searched on pictures and answers like those of the deployment",
            fix=("--data calib.jsonl", f"--data {DEFAULT_DATA} (a smoke test, not for real use)"),
        )
    return read_manifest(
        name,
        samples=request.samples,
        seed=request.seed,
        text_only_ok=request.text_only_ok,
        skip_bad=request.skip_bad,
    )


def _targets(request: BuildRequest) -> tuple[tuple[Target, ...], dict[str, str]]:
    targets, skipped = [], {}
    for text in request.targets:
        target = _local_target() if text == AUTO else Target.parse(text)
        if target.flavour == "cpu":
            continue
        targets.append(target)
        reason = _cannot_build(target)
        if not reason:
            continue
        if request.require_engine:
            raise MachineError(
                "E3003", f"No engine for {target} can be built here.", why=reason[0], fix=reason[1]
            )
        skipped[str(target)] = f"{reason[0]}: {reason[1]}"
    return tuple(targets), skipped


def _local_target() -> Target:
    """This machine's GPU, if engines can be built ahead of time for it; else ``cpu``, which needs no engine."""
    gpu = local_gpu()
    return Target.parse("cpu" if gpu is None or gpu.sm not in SERVED["rtx"] else f"sm{gpu.sm}:rtx")


def _cannot_build(target: Target) -> tuple[str, str] | None:
    backend = BACKENDS.members().get(target.flavour)
    if backend is None or backend.build is None:
        return (
            f"engines of flavour {target.flavour} are finished on the device",
            "--target DEVICE:rtx",
        )
    available = backend.available()
    return (
        None
        if available.ok
        else (f"found {available.found}, needed {available.needed}", available.fix)
    )


def _check_room(plan: Plan) -> None:
    weights = sum(path.stat().st_size for path in plan.source.folder.glob("*.safetensors"))
    place = plan.request.out.absolute().parent
    while not place.exists():
        place = place.parent
    free, needed = shutil.disk_usage(place).free, int(weights * DISK_FACTOR)
    if needed > free:
        raise ResourceError(
            "E5002",
            f"The build needs about {needed >> 20} MiB of disk, {free >> 20} MiB are free at {place}.",
            why="checkpoint and graphs are written beside each other",
            fix="free space, or choose another -o",
        )
    memory, wanted = available_memory(), int(weights * MEMORY_FACTOR) + LIBRARIES_BYTES
    if wanted > memory:
        raise ResourceError(
            "E5003",
            f"The build needs about {wanted >> 20} MiB of memory, {memory >> 20} MiB are free.",
            why="the gates compare the full-precision oracle with its graphs",
            fix="use a machine with more memory",
        )


def _fingerprint(plan: Plan) -> dict[str, object]:
    request = plan.request
    shards = {
        path.name: sha256_of(path) for path in sorted(plan.source.folder.glob("*.safetensors"))
    }
    return {
        "model": {"config": sha256_of(plan.source.folder / "config.json"), "shards": shards},
        "data": None if plan.data is None else plan.data.sha256,
        "quant": {
            "scheme": plan.scheme_name,
            "group_size": request.group_size,
            "switches": plan.switches.resolved(),
        },
        "graphs": {
            "max_context": plan.max_context,
            "targets": [str(target) for target in plan.targets],
        },
        "seed": request.seed,
        "layouts": {name: layout.version for name, layout in LAYOUTS.members().items()},
        "packages": {**package_versions(), "mbq-export": __version__},
        "code": revision_of(*CODE),
    }
