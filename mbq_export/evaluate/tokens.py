"""The tokens tier: would people read the same answers?

    teacher forced    both sides read the reference's answer: one early flip cannot spoil the rest
    free              both sides read their own: the same tokens, no loops, no silence

A tie, where the reference itself hardly prefers its token, is counted apart and is no mismatch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mbq_export.evaluate.comparison import MODALITIES, NO_POSITIONS
from mbq_export.evaluate.metrics import (
    agreement,
    divergences,
    margins,
    relative_errors,
    top_overlap,
)
from mbq_export.evaluate.sides import answer_rows, prompt_of, with_answer
from mbq_export.evaluate.tolerances import COLLAPSED_SHARE, NOISE_OF_MARGIN
from mbq_export.export.ops import LOGITS
from mbq_export.families.base import TOKEN_CLASSES
from mbq_export.progress import Progress, silent
from mbq_export.report import Check, Measurement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mbq_export.evaluate.metrics import Array, Rows
    from mbq_export.evaluate.sides import Answer, Oracle, Tested
    from mbq_export.evaluate.tolerances import Gates
    from mbq_export.families.inputs import ModelInputs

TIER = "tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptResult:
    """What one prompt showed.

    Attributes:
        same: Positions of the reference's answer where both sides prefer the same token.
        ties: Positions where they differ and the reference has no preference to speak of.
        different: Positions where they differ otherwise.
        divergence: (A,) KL at the answer's positions, in nats.
        overlap: (A,) share of the five likeliest tokens in common.
        errors: Modality -> largest relative error of the logits.
        free: ``same``, ``tie`` (they part where the reference has no preference) or ``different``.
        collapsed: What is wrong with the tested answer, or an empty string.
    """

    same: int
    ties: int
    different: int
    divergence: Rows
    overlap: Rows
    errors: dict[str, float]
    free: str
    collapsed: str


def run_prompts(
    oracle: Oracle,
    tested: Tested,
    samples: Sequence[ModelInputs],
    *,
    new_tokens: int,
    gates: Gates,
    progress: Progress = silent,
) -> list[PromptResult]:
    """Ask both sides every prompt.

    Args:
        oracle: Reference.
        tested: Tested side, not tapped.
        samples: Prompts; teacher-forced answers behind them are left out.
        new_tokens: Longest answer.
        gates: ``relative_error`` tells the noise that makes a tie.
        progress: Called after each prompt.
    """
    results = []
    for index, sample in enumerate(samples):
        prompt = prompt_of(sample)
        expected = oracle.greedy(prompt, new_tokens=new_tokens)
        forced = with_answer(prompt, expected)
        results.append(
            compare_prompt(
                prompt,
                sides=(oracle.values(forced)[LOGITS], tested.values(forced)[LOGITS]),
                forced=forced,
                answers=(expected, tested.greedy(prompt, new_tokens=new_tokens)),
                noise=gates.relative_error or 0.0,
            )
        )
        progress(index + 1, len(samples), f"prompt {index + 1}")
    return results


def compare_prompt(
    prompt: ModelInputs,
    *,
    sides: tuple[Array, Array],
    forced: ModelInputs,
    answers: tuple[Sequence[int], Answer],
    noise: float,
) -> PromptResult:
    """Compare what two sides made of one prompt.

    Args:
        prompt: Without an answer.
        sides: (T, V) logits of reference and tested, both having read the reference's answer.
        forced: The prompt with that answer.
        answers: Free answers of reference and tested.
        noise: Relative error of a position's logits that the gates allow.
    """
    reference, found = (answer_rows(logits, prompt) for logits in sides)
    allowed = NOISE_OF_MARGIN * noise * np.linalg.norm(reference.astype(np.float64), axis=-1)
    words = agreement(reference, found, noise=allowed)
    errors = relative_errors(*sides)
    by_modality = {
        TOKEN_CLASSES[kind]: float(errors[forced.token_classes == kind].max())
        for kind in MODALITIES
        if (forced.token_classes == kind).any()
    }
    expected, answer = answers
    return PromptResult(
        same=words.same,
        ties=words.ties,
        different=words.different,
        divergence=divergences(reference, found),
        overlap=top_overlap(reference, found, k=min(5, reference.shape[-1])),
        errors=by_modality,
        free=_free(expected, answer, margins(reference) <= allowed),
        collapsed=answer.collapsed,
    )


def _free(expected: Sequence[int], answer: Answer, tied: np.ndarray) -> str:
    """Compare free answers; a tested one that collapsed was cut short, so as far as it goes."""
    own = answer.ids
    wanted = list(expected[: len(own)]) if answer.collapsed else list(expected)
    if own == wanted:
        return "same"
    parting = next(
        (i for i, (a, b) in enumerate(zip(wanted, own, strict=False)) if a != b),
        min(len(wanted), len(own)),
    )
    return "tie" if parting < len(tied) and tied[parting] else "different"


def token_checks(results: Sequence[PromptResult], gates: Gates) -> list[Check]:
    """Gate a run of prompts."""
    same, ties, different = (
        sum(getattr(result, name) for result in results) for name in ("same", "ties", "different")
    )
    nats = np.concatenate([result.divergence for result in results])
    free = [result.free for result in results]
    counted = len(free) - free.count("tie")
    return [
        _gate(
            "parity.agreement",
            same / (same + different) if same + different else 1.0,
            least=gates.agreement,
            why=f"{different} positions differ, {ties} ties apart",
        ),
        _gate(
            "parity.greedy",
            free.count("same") / counted if counted else 1.0,
            least=gates.agreement,
            why=f"{free.count('different')} of {len(free)} answers differ, {free.count('tie')} ties apart",
        ),
        _gate(
            "parity.kl",
            float(nats.mean()),
            most=gates.divergence_mean,
            why=f"the largest of any position is {nats.max():.2g}",
        ),
        collapse_check([result.collapsed for result in results], tier=TIER),
        *_logit_checks(results, gates),
    ]


def collapse_check(collapsed: Sequence[str], *, tier: str) -> Check:
    """Gate the share of answers that are empty or loop.

    Args:
        collapsed: Per answer what is wrong with it, or an empty string; at least one.
        tier: Tier of the check.
    """
    bad = [what for what in collapsed if what]
    check = _gate(
        "collapse",
        len(bad) / len(collapsed),
        most=COLLAPSED_SHARE,
        why=f"{len(bad)} of {len(collapsed)} answers: {'; '.join(sorted(set(bad))[:3])}",
    )
    return replace(check, tier=tier)


def _logit_checks(results: Sequence[PromptResult], gates: Gates) -> list[Check]:
    if gates.relative_error is None:
        return []
    checks = []
    for kind in MODALITIES:
        modality = TOKEN_CLASSES[kind]
        errors = [result.errors[modality] for result in results if modality in result.errors]
        if errors:
            worst = float(np.max(errors))
            checks.append(
                _gate("parity.logits", worst, most=gates.relative_error, modality=modality)
            )
        else:
            checks.append(
                Check(
                    name="parity.logits",
                    tier=TIER,
                    ok=None,
                    threshold=gates.relative_error,
                    modality=modality,
                    why=NO_POSITIONS,
                )
            )
    return checks


def _gate(
    name: str,
    value: float,
    *,
    least: float | None = None,
    most: float | None = None,
    why: str = "",
    modality: str = "",
) -> Check:
    """Gate a number from below or from above. NaN fails."""
    ok = value >= least if least is not None else most is not None and value <= most
    return Check(
        name=name,
        tier=TIER,
        ok=bool(ok),
        value=value,
        threshold=most if least is None else least,
        modality=modality,
        why="" if ok else why,
    )


def token_measurements(results: Sequence[PromptResult]) -> list[Measurement]:
    """Numbers beside the gates."""
    nats = np.concatenate([result.divergence for result in results])
    overlap = np.concatenate([result.overlap for result in results])
    shares = {
        "tokens/prompts": len(results),
        "tokens/positions": len(nats),
        "tokens/ties": sum(result.ties for result in results),
        "tokens/kl_mean": float(nats.mean()),
        "tokens/kl_max": float(nats.max()),
        "tokens/top5_overlap": float(overlap.mean()),
        "tokens/logits_error": float(max(max(result.errors.values()) for result in results)),
    }
    return [
        Measurement(name=name, value=value)
        if np.isfinite(value)
        else Measurement(name=name, value=None, why=f"the result is {value}")
        for name, value in shares.items()
    ]
