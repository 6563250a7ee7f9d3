"""Everything that can go wrong cheaply, found before anything expensive starts.

request ── plan ──► Plan: model folder, data, scheme, targets, what is quantized, what it will take
                      └── fingerprint: whatever decides the result, and nothing else
"""

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, Final

from mbq_export import __version__
from mbq_export.bundle import Bundle
from mbq_export.calibrate.data import CalibrationData
from mbq_export.calibrate.methods import METHODS
from mbq_export.channel_scales import Switches
from mbq_export.checkpoint import KEPT
from mbq_export.errors import ResourceError, UsageError
from mbq_export.export.lowerings import LOWERINGS
from mbq_export.families.base import LoadedModel, ModelFamily, TextShape, linear_shapes
from mbq_export.families.locate import ModelSource, family_of, locate, read_config
from mbq_export.native import available_memory
from mbq_export.pipeline.fake_quant import check_fake_quant
from mbq_export.pipeline.levels import Level, engine_level
from mbq_export.pipeline.outside import head_of, head_row, outside_facts, tower_of, tower_row
from mbq_export.pipeline.plugins import EngineForm, engine_form
from mbq_export.pipeline.published import needs_data, published_facts
from mbq_export.pipeline.ratios import ratio_facts, ratios_of
from mbq_export.pipeline.request import (
    BuildRequest,
    check_context,
    check_gate,
    check_runtime,
    data_of,
    scheme_of,
    targets_of,
)
from mbq_export.pipeline.take_over import SWITCHES, decided_by, foreign_of
from mbq_export.pipeline.widths import check_widths, width_facts, width_row
from mbq_export.quantize.foreign import ForeignCheckpoint
from mbq_export.quantize.head import HeadFormat
from mbq_export.reading import sha256_of
from mbq_export.schemes.base import CHANNEL, QuantScheme
from mbq_export.schemes.layouts import LAYOUTS
from mbq_export.state import revision_of
from mbq_export.target import Target
from mbq_export.writing import refuse_existing, refuse_inside

CODE: Final = (
    "schemes", "families", "blocks", "calibrate", "quantize", "export", "checkpoint", "channel_scales", "tensor_file",
)  # fmt: skip
"""Packages whose change would make a resumed build a mixture of two programs."""

LONGEST_DEFAULT_CONTEXT: Final = 4096
# Disk: the checkpoint, and one graph per lowering at up to fp32 size, beside the final bundle's rename.
DISK_FACTOR: Final = 6.0
# Memory: two fp32 copies of the model while the gates compare it with its graphs, and the libraries.
MEMORY_FACTOR: Final = 10.0
LIBRARIES_BYTES: Final = 700 << 20
REFERENCE_LIMIT_WEIGHTS: Final = 300_000_000
"""Above this, ONNX Runtime would unfold the reference graph into too much memory (EXPORT 6.1)."""


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
        form: Form of the decoder for engines, and the plugins it needs.
        fingerprint: Whatever decides the result.
        kept: Bundle whose weights are taken as they are; None for a build from a model.
        foreign: The model as codes of another project, which are taken over; None for a model of numbers.
        ratios: An edited sensitivity report, in place of a measurement; None to measure.
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
    form: EngineForm
    fingerprint: Mapping[str, object]
    kept: Bundle | None = None
    foreign: ForeignCheckpoint | None = None
    ratios: Mapping[str, Any] | None = None

    @property
    def scheme_name(self) -> str:
        """Name of the number format, or of its absence."""
        return KEPT if self.scheme is None else self.scheme.name

    @property
    def max_context(self) -> int:
        """Longest sequence of the graphs."""
        return self.request.max_context or min(self.text.max_positions, LONGEST_DEFAULT_CONTEXT)

    @property
    def group_size(self) -> int:
        """Columns that share a scale, or `CHANNEL`; meaningless for the baseline."""
        return group_size_of(self.request, self.scheme)

    @property
    def head(self) -> HeadFormat | None:
        """Format of the output head; None where it stays as it is."""
        return head_of(self.request, self.text, self.scheme)

    @property
    def tower(self) -> QuantScheme | None:
        """Format of the vision tower; None where it stays as it is."""
        return tower_of(self.request, self.scheme)

    @property
    def lowering(self) -> str | None:
        """Form of the decoder that engines are built from; None if there are none to build."""
        return self.form.lowering

    @property
    def level(self) -> Level:
        """Operators and cache of the decoder that engines are built from.

        Raises:
            UsageError: E2001, E2002, E2012, see `engine_level`.
        """
        return engine_level(self.request.op_level, self.request.kv, targets=self.targets)

    @property
    def quantized_weights(self) -> int:
        """Weights of all decoder linears."""
        return sum(n * k for n, k in linear_shapes(self.text).values()) * self.text.layers

    @property
    def with_qdq(self) -> bool:
        """Whether standard operators can hold the scheme in these groups."""
        try:
            _check_qdq(self)
        except UsageError:
            return False
        return True

    @property
    def with_reference(self) -> bool:
        """Whether the reference graph is small enough to be run."""
        return self.quantized_weights <= REFERENCE_LIMIT_WEIGHTS

    def load(self) -> LoadedModel:
        """Read the model; decoder blocks whose weights are codes stay empty."""
        if self.foreign is not None:
            return self.foreign.load(ignore_extra=self.request.ignore_extra)
        return self.family.load(self.source.folder, ignore_extra=self.request.ignore_extra)

    def table(self) -> list[tuple[str, int, str, str]]:
        """What is quantized, what is kept, and why: module group, count, bits, reason."""
        linears = self.text.layers * len(self.family.linears)
        if self.scheme is None:
            return [("everything", linears, "16", "baseline: --wbits 16")]
        group = self.group_size
        bits = self.scheme.bits_per_weight(group)
        width, form = width_row(self.request, self.scheme, group)
        return [
            (
                "decoder linears",
                linears,
                width,
                f"{form}, {self.switches.method}"
                + (", scales of others" if self.request.import_scales else ""),
            ),
            tower_row(self.tower),
            ("token embedding", 1, "16", "policy: one row per token"),
            head_row(self.head, self.text, block_bits=bits * self.quantized_weights),
            ("norms, biases", linears, "16", "policy: no matrices"),
        ]


def make_plan(request: BuildRequest) -> Plan:
    """Check the request against the model, the data's place, the machine and each other.

    Raises:
        UsageError: E2001, E2002, E2004 to E2007, E2011, E2012, E2018.
        MachineError: E3003 without ONNX Runtime, or if an engine is required and its library is missing, E3014 for a model not here.
        FormatError: E40xx to E42xx for the model's files, E43xx for the data.
        ResourceError: E5002 or E5003 if disk or memory cannot suffice.
    """
    refuse_existing(request.out, record=request.record, force=request.force)
    check_gate(request)
    check_runtime(request)
    source = locate(request.model, models=request.models)
    refuse_inside(request.out, source.folder)
    config = read_config(source.folder)
    family = family_of(config)
    text = family.text_shape(config)
    foreign = foreign_of(request, source, config=config, family=family)
    if foreign is not None:
        request = decided_by(request, foreign)
    scheme = scheme_of(request)
    check_fake_quant(request, scheme, foreign)
    if request.fake_quant:
        request = replace(request, targets=("cpu",))
    if scheme is not None:
        for _, k in linear_shapes(text).values():
            scheme.check_columns(k, group_size_of(request, scheme))
    head_of(request, text, scheme)
    tower_of(request, scheme)
    group_size = group_size_of(request, scheme)
    check_widths(request, scheme, group_size=group_size, family=family, text=text, foreign=foreign)
    check_context(request, text, family.vision_shape(config))
    family.check(
        source.folder,
        ignore_extra=request.ignore_extra,
        weights=None if foreign is None else foreign.described,
    )
    switches = METHODS[request.method].resolve(request.replaced) if foreign is None else SWITCHES
    targets, skipped = targets_of(request)
    plan = Plan(
        request=request,
        source=source,
        family=family,
        config=config,
        text=text,
        scheme=scheme,
        switches=switches,
        data=data_of(request) if needs_data(request, scheme, switches) else None,
        targets=targets,
        skipped_engines=skipped,
        form=engine_form(
            request.lowering,
            targets=targets,
            scheme=scheme,
            group_size=group_size_of(request, scheme),
            named=request.engines.plugin_lib,
            built=[target for target in targets if str(target) not in skipped],
        ),
        fingerprint={},
        foreign=foreign,
        ratios=ratios_of(request, switches, family=family, text=text),
    )
    request.engines.check(plan.max_context, targets)
    request.engines.check_dtype(plan.lowering, scheme)
    if plan.lowering == "qdq" or not plan.with_reference:
        _check_qdq(plan)
    check_room(plan)
    shards = {path.name: sha256_of(path) for path in sorted(source.folder.glob("*.safetensors"))}
    model = {"config": sha256_of(source.folder / "config.json"), "shards": shards}
    return replace(plan, fingerprint=fingerprint(plan, model))


def group_size_of(request: BuildRequest, scheme: QuantScheme | None) -> int:
    """What was asked for, else the scheme's own."""
    if request.group_size is not None:
        return request.group_size
    return CHANNEL if scheme is None else scheme.group_size


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


def _check_qdq(plan: Plan) -> None:
    """Refuse groups that standard operators cannot hold.

    Raises:
        UsageError: E2006.
    """
    if plan.scheme is not None:
        LOWERINGS["qdq"].check_group(plan.scheme, plan.group_size)


def check_room(plan: Plan) -> None:
    """Refuse a build for which the disk or the memory cannot suffice.

    Raises:
        ResourceError: E5002, E5003.
    """
    weights = sum(path.stat().st_size for path in plan.source.folder.glob("*.safetensors"))
    if plan.foreign is not None:
        weights += plan.quantized_weights * 2  # the factors are of files in 16 bits
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


def fingerprint(plan: Plan, model: Mapping[str, object]) -> dict[str, object]:
    """Whatever decides the result.

    Args:
        plan: All but this.
        model: Hashes of its configuration and of its shards.
    """
    request = plan.request
    return {
        "model": model,
        "data": None if plan.data is None else plan.data.sha256,
        "quant": {
            "scheme": plan.scheme_name,
            "group_size": plan.group_size,
            "switches": plan.switches.resolved(),
            **published_facts(request),
            **outside_facts(request),
            **ratio_facts(request),
            **width_facts(request),
        },
        "graphs": {
            "max_context": plan.max_context,
            **({"none": "fake-quant"} if request.fake_quant else {}),
            "targets": [str(target) for target in plan.targets],
            "lowering": plan.lowering,
            "op_level": plan.level.op_level,
            "kv": plan.level.kv,
            "plugins": None if plan.form.library is None else plan.form.library.sha256,
            "engines": request.engines.fingerprint(),
        },
        "seed": request.seed,
        "layouts": {name: layout.version for name, layout in LAYOUTS.members().items()},
        "packages": {**package_versions(), "mbq-export": __version__},
        "code": revision_of(*CODE),
    }
