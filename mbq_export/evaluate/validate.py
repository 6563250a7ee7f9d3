"""Is a bundle what it says it is: tiers of checks, from hashes to answers.

    structure   schema, hashes, paths, ONNX rules, licence                    needs nothing
    numeric     every linear, every layer, logits: graph against torch oracle needs a backend
    tokens      teacher-forced agreement, free greedy answers, collapse       needs a backend
    task        exact match on questions, with an honest interval             needs data

Parity (does the graph compute what the codes say) and quality (how far are the codes from full precision)
stay apart: their checks are named ``parity.*`` and ``quality.*`` and fail with E1101 and E1201.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mbq_export.bundle import Bundle
from mbq_export.errors import GateError
from mbq_export.progress import Progress, silent
from mbq_export.report import Report

TIERS: Final = ("structure", "numeric", "tokens", "task")
DEFAULT_TIERS: Final = TIERS[:3]


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What to check, and on what.

    Attributes:
        tiers: Some of `TIERS`, run in that order.
        backend: Name of a backend.
        lowering: Form of the decoder graph; the torch backend has none and ignores it.
        samples: Teacher-forced samples of the numeric tier.
        prompts: Prompts of the tokens tier; None takes as many as ``samples``.
        new_tokens: Longest free answer.
        data: Calibration-style manifest for numeric and tokens, task file for task; None takes generated
            pictures that no calibration or training has seen.
        full_precision: Model folder for the quality checks; None leaves them out.
        questions: Most questions of the task tier.
        threads: CPU threads of the tested backend; 0 takes all.
        tensors: Folder for the tensors at the first bad place; None writes none.
    """

    tiers: tuple[str, ...] = DEFAULT_TIERS
    backend: str = "ort"
    lowering: str = "qdq"
    samples: int = 8
    prompts: int | None = None
    new_tokens: int = 32
    data: Path | None = None
    full_precision: Path | None = None
    questions: int = 500
    threads: int = 0
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
        UsageError: E2001 for an unknown tier, backend or lowering.
        MachineError: E3003 if the backend is not here.
    """
    raise NotImplementedError


def validate_build(bundle: Bundle, *, progress: Progress = silent) -> Report:
    """Run the gates that ``build`` ends with: all default tiers on ONNX Runtime, in every lowering it has.

    `tolerances.BUILD_PROMPTS` prompts on ``qdq``, `tolerances.REFERENCE_PROMPTS` on ``reference``, whose checks
    are in tiers ``numeric@reference`` and ``tokens@reference``.
    """
    raise NotImplementedError


def failure(report: Report) -> GateError | None:
    """Return the error that a failed report stands for, naming the first bad layer; None if it passed.

    E1101 for parity, E1102 if a norm ratio is off, E1105 for collapsed output, E1201 for quality.
    """
    raise NotImplementedError
