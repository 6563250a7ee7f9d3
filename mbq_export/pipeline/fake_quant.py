"""Builds that only evaluate: a checkpoint and a study of it, no graphs and no engines (``--fake-quant``).

    calibrate ── quantize ── study: full precision and checkpoint, both in torch, on held-out questions ── seal

For number formats that nothing else computes, and for a first look at those that have kernels
(docs/decisions/0018-formats-for-evaluation-only.md).
"""

from typing import Final

from mbq_export.backends.torch import fake_quant_model
from mbq_export.bundle import MANIFEST
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import UsageError
from mbq_export.evaluate.sides import Oracle
from mbq_export.evaluate.study import STUDY_QUESTIONS, study
from mbq_export.families.base import LoadedModel
from mbq_export.pipeline.engine_options import EngineOptions
from mbq_export.pipeline.request import BuildRequest
from mbq_export.progress import Progress
from mbq_export.quantize.foreign import ForeignCheckpoint
from mbq_export.report import Report
from mbq_export.schemes.base import QuantScheme
from mbq_export.target import AUTO

OPTION: Final = "--fake-quant"
WITHOUT_ENGINES: Final = (AUTO, "cpu")
"""Targets that may be named, because they ask for no engine."""
REPORT: Final = "study.json"


def check_fake_quant(
    request: BuildRequest, scheme: QuantScheme | None, foreign: ForeignCheckpoint | None = None
) -> None:
    """Refuse a format for evaluation only where graphs are wanted, and an evaluation that wants engines.

    Args:
        request: Calibrations and checkpoints alone promise no graphs: they may be of any format.
        scheme: What it asks for.
        foreign: Codes of another project, if the model is that.

    Raises:
        UsageError: E2006, E2002.
    """
    if not request.fake_quant:
        if scheme is not None and request.record == MANIFEST:
            scheme.check_deployable(fix=f"{OPTION} makes a checkpoint and a study of it")
        return
    engines = [f"--target {name}" for name in request.targets if name not in WITHOUT_ENGINES]
    engines += [f"--lowering {request.lowering}"] if request.lowering != AUTO else []
    engines += ["--require-engine"] if request.require_engine else []
    engines += ["--kv"] if request.kv is not None else []
    engines += ["--op-level"] if request.op_level != AUTO else []
    engines += ["--max-context"] if request.max_context is not None else []
    engines += ["options of engines"] if request.engines != EngineOptions() else []
    reasons = {
        "--wbits 16": ("nothing is rounded", scheme is None),
        "codes of others": ("they have no full precision to be held against", foreign is not None),
        **dict.fromkeys(engines, ("it writes no graphs, and engines are built from graphs", True)),
    }  # fmt: skip
    for what, (why, is_so) in reasons.items():
        if is_so:
            raise UsageError(
                "E2002", f"{OPTION} does not go with {what}.", why=why, fix=f"leave out {OPTION}"
            )


def study_checkpoint(
    checkpoint: QuantCheckpoint, full_precision: LoadedModel, *, progress: Progress
) -> Report:
    """Hold a checkpoint's model against the model that it was made from.

    Raises:
        GateError: E1103 if logits of one of them are not finite.
    """
    return study(
        Oracle(full_precision),
        Oracle(fake_quant_model(checkpoint)),
        name=checkpoint.scheme_name,
        questions=STUDY_QUESTIONS,
        progress=progress,
    )


def told(report: Report) -> str:
    """The figures of a study in one line."""
    full, quantized = (
        report[f"{one}/exact_match"].value for one in ("full_precision", "quantized")
    )
    return (
        f"exact match {quantized:.1f} %, full precision {full:.1f} %; "
        f"KL to it {report['kl/answer'].value:.2g} nats at answers"
    )
