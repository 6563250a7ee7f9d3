"""The seven stages of a build, each resumable, meeting in artifacts on disk.

    1 plan · 2 calibrate · 3 quantize · 4 export · 5 engine · 6 validate · 7 seal

Work happens in ``<out>.partial``; the bundle grows in its ``bundle`` folder and is published by one rename
after the last gate. A build that was killed goes on at the next block and ends with the same bytes.
"""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from mbq_export import __version__
from mbq_export.bundle import ENGINES, FAKE_QUANT, LOGS, ONNX, REPORTS, WEIGHTS, Bundle, seal
from mbq_export.channel_scales import ChannelScales
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import located
from mbq_export.evaluate.validate import failure, validate_build
from mbq_export.export import ExportRecord, GraphForm, export
from mbq_export.pipeline.calibration import Encoded, channel_scales, room_of, samples_of_scales
from mbq_export.pipeline.continuing import (
    CALIBRATION,
    check_graphs,
    continued_plan,
    origin,
    take,
    taken_folders,
)
from mbq_export.pipeline.engine_dtype import chosen_dtype, known_dtype
from mbq_export.pipeline.engine_options import BF16, FP16
from mbq_export.pipeline.engines import build_engines, engine_facts
from mbq_export.pipeline.fake_quant import REPORT, study_checkpoint, told
from mbq_export.pipeline.plan import Plan, machine_class, make_plan, package_versions
from mbq_export.pipeline.plugins import pack_library
from mbq_export.pipeline.request import BuildRequest
from mbq_export.progress import Progress
from mbq_export.quantize import STAGE, quantize
from mbq_export.quantize.importing import import_checkpoint
from mbq_export.reading import read_json
from mbq_export.report import Report
from mbq_export.state import State, fingerprint_of
from mbq_export.writing import explained, partial_path, publish

STAGED: Final = "bundle"
STAGES: Final = 7


class Listener(Protocol):
    """Who hears about a build: the console, or a test."""

    def progress(self, title: str) -> AbstractContextManager[Progress]:
        """Begin a stage with countable items."""

    def note(self, text: str) -> None:
        """Hear one line."""


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What a build made.

    Attributes:
        bundle: The published folder.
        sha256: Its identity.
        gates: Result of validation, None if it was switched off.
        facts: The manifest's facts without the file list.
        skipped_engines: Reason by target that was not.
        seconds: Wall time by stage; a stage that was resumed is missing.
    """

    bundle: Path
    sha256: str
    gates: Report | None
    facts: dict[str, Any]
    skipped_engines: dict[str, str]
    seconds: dict[str, float]


@dataclass
class _Work:
    """One build under way."""

    plan: Plan
    state: State
    listener: Listener
    log: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def folder(self, name: str) -> Path:
        """Output of a stage, inside the staged bundle."""
        return self.state.stage(f"{STAGED}/{name}")

    def run(self, number: int, name: str, act: Callable[[Progress], None]) -> None:
        """Run a stage unless it is finished."""
        key = f"{STAGED}/{name}"
        if self.state.done(key):
            self.listener.note(f"[{number}/{STAGES}] {name:<11} finished before, kept")
            return
        started = time.monotonic()
        with located(name), self.listener.progress(f"[{number}/{STAGES}] {name}") as progress:
            act(progress)
        self.state.finish(key)
        self.seconds[name] = round(time.monotonic() - started, 2)
        self.listener.note(f"[{number}/{STAGES}] {name:<11} {self.seconds[name]:.1f} s")
        self.event(name, seconds=self.seconds[name])

    def event(self, stage: str, **values: object) -> None:
        """Append a line to the build's log."""
        with explained(self.log), self.log.open("a") as file:
            file.write(json.dumps({"stage": stage, **values}, sort_keys=True) + "\n")


def planned(request: BuildRequest) -> Plan:
    """Check everything that can be checked before the work.

    Raises:
        MbqError: As `make_plan` and `continued_plan`.
    """
    with located("plan"):
        if request.bundle is None:
            return make_plan(request)
        plan = continued_plan(request)
        dtype = known_dtype(plan, request.bundle / CALIBRATION)
        check_graphs(plan, graph_forms(plan, dtype.name))
    return plan


def build(request: BuildRequest, listener: Listener) -> BuildResult:
    """Make a bundle.

    Raises:
        MbqError: Of every kind, with the stage in its ``where``; GateError E1101 if the bundle does not compute
            what its checkpoint says. Nothing is published then, finished work is kept.
    """
    plan = planned(request)
    mixed = ", widths mixed" if plan.request.mixed.asked else ""
    listener.note(
        f"[1/{STAGES}] plan        {plan.request.model} ({plan.source.rule}), {plan.scheme_name}{mixed}"
    )
    if plan.lowering is not None:
        told = plan.level.told(plan.lowering, packed=plan.scheme is not None)
        listener.note(f"      engines     {plan.lowering}, {told}")
    partial = partial_path(request.out)
    with State.open(partial, plan.fingerprint, fresh=request.fresh) as state:
        work = _begin(plan, state, listener)
        if plan.kept is None:
            model = _Lazy(plan)
            work.run(2, CALIBRATION, lambda progress: _calibrate(work, model(), progress))
            work.run(3, WEIGHTS, lambda progress: _quantize(work, model(), progress))
            model.forget()
        else:
            _take(work, plan.kept)
        checkpoint = QuantCheckpoint.open(work.folder(WEIGHTS), verify=False)
        if plan.request.fake_quant:
            listener.note(f"[4/{STAGES}] onnx        none: --fake-quant evaluates the checkpoint")
        else:
            if ONNX not in taken_folders(plan):
                work.run(4, ONNX, lambda progress: _export(work, checkpoint, progress))
            work.run(5, ENGINES, lambda progress: _engines(work, progress))
        staged = state.stage(STAGED)
        facts = _facts(plan, staged, checkpoint)
        gates = (_study if plan.request.fake_quant else _validate)(work, staged, facts)
        sha256 = seal(
            staged,
            {**facts, "gates": _gate_rows(gates), "gate_override": _override(plan)},
            _provenance(work),
        )
        publish(staged, request.out)
        state.discard()
    listener.note(f"[7/{STAGES}] seal        sha256 {sha256[:16]}")
    return BuildResult(
        bundle=request.out,
        sha256=sha256,
        gates=gates,
        facts=facts,
        skipped_engines=dict(plan.skipped_engines),
        seconds=work.seconds,
    )


@dataclass
class _Lazy:
    """The full-precision model with its samples, loaded when the first stage needs it."""

    plan: Plan
    loaded: Encoded | None = None

    def __call__(self) -> Encoded:
        if self.loaded is None:
            self.loaded = Encoded(self.plan, self.plan.load())
        return self.loaded

    def forget(self) -> None:
        """Free its memory."""
        self.loaded = None


def _begin(plan: Plan, state: State, listener: Listener) -> _Work:
    logs = state.stage(f"{STAGED}/{LOGS}")
    with explained(logs):
        logs.mkdir(parents=True, exist_ok=True)
    work = _Work(plan=plan, state=state, listener=listener, log=logs / "build.jsonl")
    work.event("plan", fingerprint=fingerprint_of(plan.fingerprint))
    return work


def _take(work: _Work, kept: Bundle) -> None:
    """Copy what the stages before would have made."""
    for name, number in taken_folders(work.plan).items():
        work.run(number, name, partial(take, kept, name, work.folder(name)))


def _calibrate(work: _Work, encoded: Encoded, progress: Progress) -> None:
    dtype = chosen_dtype(work.plan, encoded.model)
    if dtype.name == BF16:
        work.listener.note(f"      engines     {BF16}: {dtype.reason}")
    note = work.listener.note
    with room_of(work.plan, work.state.folder, note) as room:
        scales = channel_scales(encoded, note, state=work.state, room=room, progress=progress)
    work.event("memory", plan=room.as_json())
    scales.write(work.folder(CALIBRATION))
    dtype.write(work.folder(CALIBRATION))


def _quantize(work: _Work, encoded: Encoded, progress: Progress) -> None:
    plan, model = work.plan, encoded.model
    if plan.foreign is not None:
        staged = work.state.stage(STAGE)
        out = work.folder(WEIGHTS)
        import_checkpoint(plan.foreign, model, out=out, staged=staged, progress=progress)
        return
    scales = ChannelScales.read(work.folder(CALIBRATION))
    quantize(
        model,
        scales,
        scheme=plan.scheme,
        group_size=plan.group_size,
        out=work.folder(WEIGHTS),
        samples=samples_of_scales(encoded, scales),
        mixed=plan.request.mixed,
        head=plan.head,
        tower=plan.tower,
        state=work.state,
        progress=progress,
    )


def graph_forms(plan: Plan, dtype: str = FP16) -> tuple[GraphForm, ...]:
    """Decoder graphs that the targets and the gates need; those for engines in ``dtype``."""
    forms = []
    if plan.with_qdq:
        forms.append(GraphForm(lowering="qdq", target="ort", max_context=plan.max_context))
    if plan.with_reference and plan.scheme is not None:
        forms.append(GraphForm(lowering="reference", target="ort", max_context=plan.max_context))
    if plan.lowering is not None:
        forms.append(
            GraphForm(
                lowering=plan.lowering,
                target="trt",
                dtype=dtype,
                kv=plan.level.kv,
                op_level=plan.level.op_level,
                logits="last",
                max_context=plan.max_context,
            )
        )
    return tuple(forms)


def _export(work: _Work, checkpoint: QuantCheckpoint, progress: Progress) -> None:
    out = work.folder(ONNX)
    if out.exists():
        shutil.rmtree(out)
    dtype = known_dtype(work.plan, work.folder(CALIBRATION))
    dtype.write(work.folder(CALIBRATION))  # a build from a bundle may choose another than that had
    forms = graph_forms(work.plan, dtype.name)
    export(checkpoint, out, family=work.plan.family, forms=forms, progress=progress)


def _engines(work: _Work, progress: Progress) -> None:
    out, onnx = work.folder(ENGINES), work.folder(ONNX)
    if out.exists():
        shutil.rmtree(out)
    with explained(out):
        out.mkdir(parents=True)
    library = work.plan.form.library
    if library is not None:
        pack_library(library, work.state.stage(STAGED))
    record = ExportRecord.read(onnx)
    built = build_engines(
        work.plan, record, onnx=onnx, out=out, logs=work.log.parent, progress=progress
    )
    for target, engines in built.items():
        for name, file in engines.engines.items():
            work.event(
                "engine",
                target=target,
                engine=name,
                seconds=file.seconds,
                peak_rss_bytes=file.peak_rss_bytes,
            )


def _validate(work: _Work, staged: Path, facts: dict[str, Any]) -> Report | None:
    """Compare the staged bundle with its checkpoint; a manifest without gates makes it readable."""
    gate = work.plan.request.gate
    if gate == "off":
        return None
    started = time.monotonic()
    seal(staged, facts, {})
    with located("validate"), work.listener.progress(f"[6/{STAGES}] validate") as progress:
        report = validate_build(Bundle.open(staged), progress=progress)
    work.seconds["validate"] = round(time.monotonic() - started, 2)
    work.listener.note(f"[6/{STAGES}] validate    {work.seconds['validate']:.1f} s")
    with explained(staged):
        (staged / REPORTS).mkdir(exist_ok=True)
    report.write(staged / REPORTS / "validate.json")
    error = failure(report)
    if error is not None and gate == "on":
        with located("validate"):
            raise error
    return report


def _study(work: _Work, staged: Path, facts: dict[str, Any]) -> Report | None:
    """Hold the staged checkpoint against its model, as full precision has it; no gate judges that."""
    del facts
    if work.plan.request.gate == "off":
        return None
    started = time.monotonic()
    checkpoint = QuantCheckpoint.open(work.folder(WEIGHTS), verify=False)
    with located("study"), work.listener.progress(f"[6/{STAGES}] study") as progress:
        report = study_checkpoint(checkpoint, work.plan.load(), progress=progress)
    work.seconds["study"] = round(time.monotonic() - started, 2)
    work.listener.note(f"[6/{STAGES}] study       {told(report)}")
    with explained(staged):
        (staged / REPORTS).mkdir(exist_ok=True)
    report.write(staged / REPORTS / REPORT)
    return report


def _gate_rows(report: Report | None) -> list[dict[str, Any]]:
    return [] if report is None else [check.as_json() for check in report.checks]


def _override(plan: Plan) -> dict[str, str] | None:
    request = plan.request
    return None if request.gate == "on" else {"gate": request.gate, "reason": request.gate_reason}


def _facts(plan: Plan, staged: Path, checkpoint: QuantCheckpoint) -> dict[str, Any]:
    fingerprint = plan.fingerprint
    calib = read_json(staged / CALIBRATION / "calib.json", code="E4314")
    dtype = known_dtype(plan, staged / CALIBRATION)
    return {
        "tool": {"name": "mbq-export", "version": __version__, "packages": package_versions()},
        "plan_hash": fingerprint_of(fingerprint),
        "seed": plan.request.seed,
        "source": {
            "model": plan.source.name,
            "family": plan.family.name,
            "model_type": plan.family.model_type,
            **dict(fingerprint["model"]),  # type: ignore[call-overload]
        },
        "calibration": calib.get("data"),
        "quant": checkpoint.info,
        "limits": {"max_context": plan.max_context, "max_batch": plan.request.engines.max_batch},
        "targets": [str(target) for target in plan.targets],
        "engines": engine_facts(staged / ENGINES),
        "skipped_engines": dict(plan.skipped_engines),
        "lowering": {"engines": plan.form.lowering, "why": plan.form.reason},
        **({} if plan.kept is None else {"from": origin(plan)}),
        **({FAKE_QUANT: True} if plan.request.fake_quant else {}),
        "engine_dtype": None if plan.lowering is None else dtype.facts(),
    }


def _provenance(work: _Work) -> dict[str, Any]:
    return {
        "machine": machine_class(),
        "command": work.plan.request.command,
        "finished_unix": int(time.time()),
        "seconds": work.seconds,
    }
