"""Quality: how far the checkpoint's model is from the full-precision one. Says nothing about graphs.

full precision ─────► logits ─┐
                              ├── cosine, norm ratio, agreement, KL ──► quality.*
checkpoint (torch) ─► logits ─┘

Logits and not hidden states: at 3 bits the stream turns in directions that the head does not read (on the sample
model to a cosine of 0.95 at prompts, while every answer stays the same).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mbq_export.evaluate.comparison import TIER, StreamComparison, stream_checks
from mbq_export.evaluate.metrics import divergences
from mbq_export.evaluate.sides import answer_rows, prompt_of
from mbq_export.export.ops import LOGITS
from mbq_export.report import Check

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mbq_export.evaluate.sides import Oracle
    from mbq_export.evaluate.tolerances import Gates
    from mbq_export.families.inputs import ModelInputs


def quality_checks(
    full: Oracle, quantized: Oracle, samples: Sequence[ModelInputs], gates: Gates
) -> list[Check]:
    """Compare two models on teacher-forced samples.

    Args:
        full: The full-precision model.
        quantized: The checkpoint's.
        samples: With answers.
        gates: One of `tolerances.QUALITY`.

    Returns:
        Checks named ``quality.*``: logits per modality, agreement and mean KL at the answers' positions.
    """
    comparison = StreamComparison(full.model.text.layers)
    nats, same = [], []
    for sample in samples:
        reference, found = full.values(sample)[LOGITS], quantized.values(sample)[LOGITS]
        # The last token ends the sample: nothing was ever trained to follow it.
        comparison.add({LOGITS: reference[:-1]}, {LOGITS: found[:-1]}, sample.token_classes[:-1])
        a, b = (answer_rows(side, prompt_of(sample)) for side in (reference, found))
        nats.append(divergences(a, b))
        same.append(a.argmax(-1) == b.argmax(-1))
    agreement = float(np.concatenate(same).mean())
    divergence = float(np.concatenate(nats).mean())
    return [
        *stream_checks(comparison.errors(), gates, prefix="quality"),
        Check(
            name="quality.agreement",
            tier=TIER,
            ok=agreement >= gates.agreement,
            value=agreement,
            threshold=gates.agreement,
            modality="answer",
        ),
        Check(
            name="quality.kl",
            tier=TIER,
            ok=divergence <= gates.divergence_mean,
            value=divergence,
            threshold=gates.divergence_mean,
            modality="answer",
        ),
    ]
