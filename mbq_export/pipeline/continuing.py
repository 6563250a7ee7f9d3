"""A build that begins with a finished bundle: engines for another device, without calibrating or rounding again.

    bundle ── every hash ──► weights/ calibration/ [onnx/] copied ──► [export] ──► engines ──► checks ──► seal
                             --stages engine.. takes the graphs too, --stages export.. writes them anew

The bundle decides what the weights are and where they came from; the request decides what is built from them.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from mbq_export.bundle import ONNX, WEIGHTS, Bundle
from mbq_export.channel_scales import ChannelScales
from mbq_export.checkpoint import KEPT, QuantCheckpoint
from mbq_export.errors import FormatError, UsageError
from mbq_export.export.record import ExportRecord, GraphForm
from mbq_export.families.locate import ModelSource, family_of, read_config
from mbq_export.pipeline.lowering import AUTO
from mbq_export.pipeline.plan import Plan, check_room, fingerprint
from mbq_export.pipeline.plugins import engine_form
from mbq_export.pipeline.request import (
    BuildRequest,
    check_context,
    check_gate,
    check_runtime,
    targets_of,
)
from mbq_export.progress import Progress
from mbq_export.reading import sha256_of
from mbq_export.schemes import schemes_named
from mbq_export.writing import explained, refuse_existing, refuse_inside

CALIBRATION: Final = "calibration"
EXPORT: Final = "export"
ENGINE: Final = "engine"
STARTS: Final = (EXPORT, ENGINE)
RULE: Final = "bundle"
"""How the model was found."""
TRT: Final = "trt"


def first_stage(text: str) -> str:
    """Read ``--stages``: where to begin; a bundle is sealed complete, so it always goes on to the end.

    Raises:
        UsageError: E2001.
    """
    first, dots, last = text.partition("..")
    if first in STARTS and dots and not last:
        return first
    raise UsageError(
        "E2001",
        f"Unknown stages {text!r}.",
        why=f"a bundle can be gone on from at: {', '.join(f'{each}..' for each in STARTS)}",
        fix=f"--stages {ENGINE}..",
    )


def continued_plan(request: BuildRequest) -> Plan:
    """Check a request against the bundle that it begins with, the machine and each other.

    Raises:
        UsageError: E2001, E2002, E2006, E2008, E2009, E2011, E2012.
        FormatError: E4601, E4602, E4604, E4605 for a bundle that is damaged or none.
        MachineError: E3001, E3003, E3005 if the engines cannot be built here.
        IncompatibleError: E7003, E7004, E7005, E7008.
        ResourceError: E5002, E5003.
    """
    folder = request.bundle or Path()
    refuse_existing(request.out, record=request.record, force=request.force)
    refuse_inside(request.out, folder)
    check_gate(request)
    check_runtime(request)
    bundle = Bundle.open(folder, verify=True)
    if not bundle.has_graphs:
        raise UsageError(
            "E2006",
            f"{bundle.name} holds a checkpoint and a study of it, no graphs.",
            why="it was built with --fake-quant",
            fix="mbq-export build --model MODEL, without --fake-quant",
        )
    checkpoint = QuantCheckpoint.open(bundle.checkpoint_folder, verify=False)
    config = read_config(bundle.checkpoint_folder)
    family = family_of(config)
    text = family.text_shape(config)
    check_context(request, text, family.vision_shape(config))
    name = checkpoint.scheme_name
    # Formats that can be mixed have the same forms: the first stands for all.
    scheme = None if name == KEPT else schemes_named(name)[0]
    request = _decided_by(request, bundle, group_size=checkpoint.group_size)
    targets, skipped = targets_of(request)
    if not targets:
        raise UsageError(
            "E2002",
            "There is no engine to build.",
            why=f"{bundle.name} runs on ONNX Runtime as it is, and no target wants an engine",
            fix="--target orin:trt, --target rtx4090:rtx, ...",
        )
    form = engine_form(
        request.lowering,
        targets=targets,
        scheme=scheme,
        group_size=checkpoint.group_size,
        named=request.engines.plugin_lib,
        built=targets,
    )
    plan = Plan(
        request=request,
        source=ModelSource(
            folder=bundle.checkpoint_folder, name=bundle.manifest["source"]["model"], rule=RULE
        ),
        family=family,
        config=config,
        text=text,
        scheme=scheme,
        switches=ChannelScales.read(bundle.root / CALIBRATION).switches,
        data=None,
        targets=targets,
        skipped_engines=skipped,
        form=form,
        fingerprint={},
        kept=bundle,
    )
    request.engines.check(plan.max_context, targets)
    request.engines.check_dtype(plan.lowering, scheme)
    check_room(plan)
    model = {name: bundle.manifest["source"][name] for name in ("config", "shards")}
    return replace(plan, fingerprint={**fingerprint(plan, model), "from": origin(plan)})


def origin(plan: Plan) -> Mapping[str, str] | None:
    """What a manifest says of the bundle that a build began with; None if it began with a model."""
    if plan.kept is None:
        return None
    return {"bundle": plan.kept.sha256, "stages": f"{plan.request.first}.."}


def take(bundle: Bundle, name: str, out: Path, progress: Progress) -> None:
    """Copy one folder of a bundle, comparing every hash on the way.

    Raises:
        FormatError: E4602 if a file changed since the bundle was opened.
    """
    if out.exists():
        shutil.rmtree(out)
    records = [each for each in bundle.manifest["files"] if each["path"].startswith(f"{name}/")]
    for index, record in enumerate(records, 1):
        copy = out / record["path"].removeprefix(f"{name}/")
        with explained(out):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.root / record["path"], copy)
        if sha256_of(copy) != record["sha256"]:
            raise FormatError(
                "E4602",
                f"{record['path']} changed while it was copied.",
                why="its SHA-256 is not that of the manifest",
                fix="copy the bundle again",
            )
        progress(index, len(records), record["path"])


def taken_folders(plan: Plan) -> dict[str, int]:
    """Folders that are copied from a bundle, and the number of the stage that would make each; none from a model."""
    if plan.kept is None:
        return {}
    folders = {CALIBRATION: 2, WEIGHTS: 3}
    return {**folders, ONNX: 4} if plan.request.first == ENGINE else folders


def check_graphs(plan: Plan, wanted: Sequence[GraphForm]) -> None:
    """Refuse a bundle whose graphs are not those that the engines would be built from.

    Raises:
        UsageError: E2002.
    """
    if plan.kept is None or plan.request.first != ENGINE:
        return
    found = _forms(plan.kept)
    missing = [form for form in wanted if form.target == TRT and form not in found]
    if missing:
        names = ", ".join(_described(form) for form in found if form.target == TRT)
        raise UsageError(
            "E2002",
            f"{plan.kept.name} has no graph {_described(missing[0])}, which "
            f"{', '.join(map(str, plan.targets))} would be built from.",
            why=f"its graphs for TensorRT: {names or 'none'}",
            fix=(f"--stages {EXPORT}.. writes it from the weights of the bundle",),
        )


def _decided_by(request: BuildRequest, bundle: Bundle, *, group_size: int) -> BuildRequest:
    """Replace what the bundle decides; engines are what such a build is for, so they are required."""
    limit: int = bundle.manifest["limits"]["max_context"]
    lowering = request.lowering
    if request.first == ENGINE:
        there = {form.lowering for form in _forms(bundle) if form.target == TRT}
        lowering = there.pop() if lowering == AUTO and len(there) == 1 else lowering
    return replace(
        request,
        model=bundle.manifest["source"]["model"],
        seed=bundle.manifest["seed"],
        group_size=group_size,
        max_context=request.max_context or limit,
        lowering=lowering,
        require_engine=True,
    )


def _forms(bundle: Bundle) -> list[GraphForm]:
    return [graph.form for graph in ExportRecord.read(bundle.onnx).graphs if graph.form is not None]


def _described(form: GraphForm) -> str:
    fields: dict[str, Any] = {
        "cache": form.kv, "context": form.max_context, "operators": form.op_level,
    }  # fmt: skip
    told = ", ".join(f"{name} {value}" for name, value in fields.items())
    return f"{form.file_name} ({told})"
