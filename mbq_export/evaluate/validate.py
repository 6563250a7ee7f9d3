"""Is a bundle what it says it is: tiers of checks, from hashes to answers.

    structure   schema, hashes, paths, ONNX rules, licence                    needs nothing
    numeric     every linear, every layer, logits: graph against torch oracle needs a backend
    tokens      teacher-forced agreement, free greedy answers, collapse       needs a backend
    task        exact match on questions, with an honest interval             needs data

Parity (does the graph compute what the codes say) and quality (how far are the codes from full precision)
stay apart: their checks are named ``parity.*`` and ``quality.*`` and fail with E1101 and E1201.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from mbq_export.backends import BACKENDS
from mbq_export.backends.torch import fake_quant_model
from mbq_export.checkpoint import KEPT, QuantCheckpoint
from mbq_export.errors import GateError, UsageError, located
from mbq_export.evaluate.cache_rounding import BITS as CACHE_BITS
from mbq_export.evaluate.cache_rounding import cache_checks
from mbq_export.evaluate.comparison import NO_POSITIONS
from mbq_export.evaluate.fidelity import quality_checks
from mbq_export.evaluate.integrity import check_structure
from mbq_export.evaluate.lmms import Tasks, find_tasks
from mbq_export.evaluate.numeric import run_numeric
from mbq_export.evaluate.samples import parity_samples
from mbq_export.evaluate.sides import Oracle, Setup, open_tested
from mbq_export.evaluate.task_tier import run_tasks
from mbq_export.evaluate.tokens import run_prompts, token_checks, token_measurements
from mbq_export.evaluate.tolerances import (
    BUILD_PROMPTS,
    PARITY,
    PARITY_ROUNDED,
    QUALITY,
    REFERENCE_PROMPTS,
)
from mbq_export.native import CALL_SECONDS
from mbq_export.progress import Progress, silent
from mbq_export.report import Check, Measurement, Report, shown
from mbq_export.runtime import default_lowering, lowerings_of
from mbq_export.runtime.host import engine_dtype, engine_folder
from mbq_export.schemes import schemes_named

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from mbq_export.bundle import Bundle
    from mbq_export.evaluate.tolerances import Gates
    from mbq_export.families.inputs import ModelInputs

logger = logging.getLogger(__name__)

TIERS: Final = ("structure", "numeric", "tokens", "task")
DEFAULT_TIERS: Final = TIERS[:3]
REFERENCE: Final = "reference"
GRAPH_DTYPES: Final = ("fp32", "fp16")
"""Types that ONNX Runtime computes graphs in; an engine has its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What to check, and on what.

    Attributes:
        tiers: Some of `TIERS`, run in that order.
        backend: Name of a backend.
        lowering: Form of the decoder graph; the torch backend has none and ignores it.
        dtype: Type of its activations, ``fp32`` or ``fp16``; decides the gates of parity, but for engines.
        samples: Teacher-forced samples of the numeric tier.
        prompts: Prompts of the tokens tier; None takes as many as ``samples``.
        new_tokens: Longest free answer.
        data: Calibration-style manifest for numeric and tokens, task file for task; None takes generated
            pictures that no calibration or training has seen.
        full_precision: Model folder for the quality checks; None leaves them out.
        kv_bits: 8 adds to the numeric tier what a cache of 8 bits would cost answers; 16 leaves that out.
        questions: Most questions of the task tier, or of each of its ``tasks``.
        tasks: Tasks of lmms-eval for the task tier, instead of questions.
        task_folder: Folder of their task files; None takes those that lmms-eval brings.
        threads: CPU threads of the tested backend; 0 takes all.
        engine_timeout_s: Limit of one call of an engine.
        tensors: Folder for the tensors at the first bad place; None writes none.
    """

    tiers: tuple[str, ...] = DEFAULT_TIERS
    backend: str = "ort"
    lowering: str = "qdq"
    dtype: str = "fp32"
    samples: int = 8
    prompts: int | None = None
    new_tokens: int = 32
    data: Path | None = None
    full_precision: Path | None = None
    kv_bits: int = 16
    questions: int = 500
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    threads: int = 0
    engine_timeout_s: float = CALL_SECONDS
    tensors: Path | None = None


def validate(
    bundle: Bundle, validation: Validation | None = None, *, progress: Progress = silent
) -> Report:
    """Run tiers of checks.

    ``Report.details`` holds ``tiers`` (per tier: pass, gates) and ``first_bad`` (layer, op, modality, ...; None
    if there is none), as the command-line reference shows them. A failed check is a result, not an error.

    Args:
        bundle: What to check.
        validation: How; the defaults are those of the command.
        progress: Called between samples, over all tiers.

    Raises:
        UsageError: E2001 for an unknown tier, dtype, backend, lowering or task.
        MachineError: E3003 if the backend is not here, E3007 if lmms-eval is not.
    """
    chosen = validation or Validation()
    _check_known(chosen)
    BACKENDS[chosen.backend]  # refuses an unknown name before any work
    named = find_tasks(chosen.tasks, chosen.task_folder) if chosen.tasks else None
    run = _Run(bundle=bundle, validation=chosen, named=named, progress=progress)
    for tier in TIERS:
        if tier in chosen.tiers:
            with located(tier):
                getattr(run, tier)()
    return run.report()


def validate_build(bundle: Bundle, *, progress: Progress = silent) -> Report:
    """Run the gates that ``build`` ends with: all default tiers on ONNX Runtime, in every lowering it has.

    `tolerances.BUILD_PROMPTS` prompts on ``qdq``, or on ``reference`` where that is all there is; else `tolerances.REFERENCE_PROMPTS` on ``reference``, whose checks
    are in tiers ``numeric@reference`` and ``tokens@reference``.
    """
    shipped = default_lowering(bundle)
    main = validate(bundle, Validation(prompts=BUILD_PROMPTS, lowering=shipped), progress=progress)
    if REFERENCE not in lowerings_of(bundle) or shipped == REFERENCE:
        return main
    second = validate(
        bundle,
        Validation(tiers=DEFAULT_TIERS[1:], lowering=REFERENCE, prompts=REFERENCE_PROMPTS),
        progress=progress,
    )
    return _joined(main, second, REFERENCE)


def failure(report: Report) -> GateError | None:
    """Return the error that a failed report stands for, naming the first bad layer; None if it passed.

    E1101 for parity, E1102 if a norm ratio is off, E1103 for results that are not finite, E1105 for collapsed
    output, E1201 for quality.
    """
    failed = [check for check in report.checks if check.ok is False]
    if not failed:
        return None
    first = failed[0]
    bad = report.details.get("first_bad")
    place = _place(bad) if bad else first.place
    limit = f", limit {shown(first.threshold)}" if first.threshold is not None else ""
    others = f"; {len(failed)} of {len(report.checks)} checks failed" if len(failed) > 1 else ""
    return GateError(
        _code(first),
        f"{first.tier} {first.name} is {shown(first.value)}{limit}"
        + (f" at {place}" if place else "")
        + others
        + ".",
        why=" ".join(filter(None, [first.why, bad["hint"] if bad else ""])),
        fix=_fixes(first),
        context={"failed": [check.name for check in failed], "first_bad": bad},
    )


@dataclass(kw_only=True)
class _Run:
    """One validation under way."""

    bundle: Bundle
    validation: Validation
    progress: Progress
    named: Tasks | None = None
    checks: list[Check] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    warnings: list[dict[str, str]] = field(default_factory=list)

    @cached_property
    def checkpoint(self) -> QuantCheckpoint:
        return QuantCheckpoint.open(self.bundle.checkpoint_folder, verify=False)

    @cached_property
    def oracle(self) -> Oracle:
        return Oracle(fake_quant_model(self.checkpoint))

    @property
    def setup(self) -> Setup:
        chosen = self.validation
        return Setup(
            bundle=self.bundle,
            backend=chosen.backend,
            lowering=chosen.lowering,
            dtype=chosen.dtype,
            threads=chosen.threads,
            engine_timeout_s=chosen.engine_timeout_s,
        )

    @property
    def gates(self) -> Gates:
        records = self.checkpoint.records.values()
        rounded = any(record.scheme.rounds_activations for record in records)
        return (PARITY_ROUNDED if rounded else PARITY)[self.dtype]

    @property
    def dtype(self) -> str:
        """Type of the tested activations: engines have their own, whatever graph is asked for."""
        chosen = self.validation
        if not BACKENDS[chosen.backend].isolated:
            return chosen.dtype
        return engine_dtype(engine_folder(self.bundle, chosen.backend))

    def structure(self) -> None:
        """Check every file, without running anything."""
        checks, warnings = check_structure(self.bundle, progress=self.progress)
        self.checks += checks
        self.warnings += warnings

    def numeric(self) -> None:
        """Compare linears and layers."""
        chosen = self.validation
        samples = parity_samples(chosen.data, chosen.samples, self.oracle.model.processor)
        found = run_numeric(
            self.setup,
            self.oracle,
            samples,
            gates=self.gates,
            tensors=chosen.tensors,
            progress=self.progress,
        )
        self.checks += found.checks
        self.details |= {
            "first_bad": found.first_bad and found.first_bad.as_json(),
            "layers": found.as_json(),
        }
        if chosen.kv_bits == CACHE_BITS:
            self.checks += cache_checks(self.oracle.model, samples)
        if chosen.full_precision is not None:
            self.checks += self.quality(chosen.full_precision, samples)

    def quality(self, folder: Path, samples: Sequence[ModelInputs]) -> list[Check]:
        """Compare the checkpoint's model with the full-precision one, by the gates of its narrowest codes."""
        scheme = self.checkpoint.scheme_name
        if scheme == KEPT:
            return []
        model = self.oracle.model.family.load(folder)
        narrowest = schemes_named(scheme)[0]
        return quality_checks(Oracle(model), self.oracle, samples, QUALITY[narrowest.weight_bits])

    def tokens(self) -> None:
        """Compare answers."""
        chosen = self.validation
        samples = parity_samples(
            chosen.data, chosen.prompts or chosen.samples, self.oracle.model.processor
        )
        with open_tested(self.setup, self.oracle) as side:
            results = run_prompts(
                self.oracle,
                side,
                samples,
                new_tokens=chosen.new_tokens,
                gates=self.gates,
                progress=self.progress,
            )
        self.checks += token_checks(results, self.gates)
        self.measurements += token_measurements(results)

    def task(self) -> None:
        """Ask questions."""
        found = run_tasks(self.setup, self.validation, self.named, progress=self.progress)
        self.checks += found.checks
        self.measurements += found.measurements
        self.details |= found.details

    def report(self) -> Report:
        """Put everything into one report."""
        missing = sorted({check.modality for check in self.checks if check.why == NO_POSITIONS})
        warnings = self.warnings + [
            {"code": "MBQ-W1104", "text": f"{modality} was not measured: it has no positions"}
            for modality in missing
        ]
        for warning in warnings:
            logger.warning("%s: %s", warning["code"], warning["text"])
        return Report(
            kind="validate",
            checks=tuple(self.checks),
            measurements=tuple(self.measurements),
            context={
                "bundle": self.bundle.name,
                "sha256": self.bundle.sha256,
                "backend": self.validation.backend,
                "lowering": self.validation.lowering,
                "dtype": self.validation.dtype,
            },
            details={
                "first_bad": None,
                **self.details,
                "tiers": by_tier(self.checks),
                "warnings": warnings,
            },
        )


def by_tier(checks: Iterable[Check]) -> dict[str, Any]:
    """Group checks: per tier whether every one passed, and the gates. One that was not run has not passed."""
    tiers: dict[str, list[Check]] = {}
    for check in checks:
        tiers.setdefault(check.tier, []).append(check)
    return {
        tier: {"pass": all(check.ok for check in own), "gates": [c.as_json() for c in own]}
        for tier, own in tiers.items()
    }


def _joined(main: Report, second: Report, name: str) -> Report:
    """Put the checks of another lowering behind the main ones, their tiers named after it."""
    checks = (*main.checks, *(replace(c, tier=f"{c.tier}@{name}") for c in second.checks))
    measured = (replace(m, name=f"{name}/{m.name}") for m in second.measurements)
    first_bad = main.details["first_bad"] or second.details["first_bad"]
    return replace(
        main,
        checks=checks,
        measurements=(*main.measurements, *measured),
        details={
            **main.details,
            "first_bad": first_bad,
            "tiers": by_tier(checks),
            "warnings": [*main.details["warnings"], *second.details["warnings"]],
        },
    )


def _check_known(validation: Validation) -> None:
    """Refuse names that mean nothing; backend and lowering are looked up where they are opened."""
    for what, names, known in (
        ("tier", validation.tiers, TIERS),
        ("dtype", (validation.dtype,), GRAPH_DTYPES),
    ):
        for name in names:
            if name not in known:
                raise UsageError(
                    "E2001",
                    f"Unknown {what} {name!r}.",
                    why=f"known: {', '.join(known)}",
                    fix=f"use {known[0]}",
                )


def _code(check: Check) -> str:
    if check.value is not None and not math.isfinite(check.value):
        return "E1103"
    if check.name.startswith("quality"):
        return "E1201"
    return {"parity.norm_ratio": "E1102", "collapse": "E1105"}.get(check.name, "E1101")


def _place(bad: dict[str, Any]) -> str:
    layer = "" if bad["layer"] is None else f"layer {bad['layer']} "
    column = "" if bad["column"] is None else f" column {bad['column']}"
    return f"{layer}{bad['op']}{column}, {bad['modality']} positions"


def _fixes(check: Check) -> tuple[str, ...]:
    if check.name.startswith("quality") or check.name == "collapse":
        return ("use more bits, a smaller --group-size, or calibration data like the deployment's",)
    return (
        "mbq-export validate BUNDLE -o DIR keeps the tensors at the first bad place",
        "export the model again; build --gate warn publishes it all the same",
    )
