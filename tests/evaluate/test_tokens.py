"""Comparing answers: on logits made here, and on a real bundle."""

from dataclasses import replace

import numpy as np
import pytest

from mbq_export.backends.torch import fake_quant_model
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.evaluate.samples import parity_samples
from mbq_export.evaluate.sides import Answer, Oracle, Setup, open_tested, with_answer
from mbq_export.evaluate.tokens import (
    PromptResult,
    collapse_check,
    compare_prompt,
    run_prompts,
    token_checks,
    token_measurements,
)
from mbq_export.evaluate.tolerances import PARITY_FP32
from mbq_export.families.base import PROMPT, VISION
from mbq_export.families.inputs import ModelInputs
from tests.evaluate.bundles import sample_bundle

NOISE = 1e-4


def prompt(*classes: int) -> ModelInputs:
    return ModelInputs(
        input_ids=np.arange(len(classes)),
        pixel_values=np.zeros((0, 3, 2, 2), np.float32),
        image_sizes=np.zeros((0, 2), np.int64),
        tiles_per_image=np.zeros(0, np.int64),
        token_classes=np.array(classes, np.int8),
    )


ASKED = prompt(VISION, PROMPT, PROMPT)
EXPECTED = [4, 2]


def logits(*tokens: int, lead: float = 5.0) -> np.ndarray:
    """Rows whose likeliest tokens are those given, ahead of token 0 by ``lead``."""
    rows = np.zeros((len(tokens), 6))
    rows[np.arange(len(tokens)), tokens] = lead
    return rows


# Five positions; the third (last of the prompt) predicts the first answer token, the fourth the second.
REFERENCE = logits(1, 1, 4, 2, 3)


def result(
    tested: np.ndarray = REFERENCE, answer: Answer | None = None, **changes: object
) -> PromptResult:
    return compare_prompt(
        ASKED,
        sides=(changes.get("reference", REFERENCE), tested),
        forced=with_answer(ASKED, EXPECTED),
        answers=(changes.get("expected", EXPECTED), answer or Answer(ids=EXPECTED, collapsed="")),
        noise=NOISE,
    )


def test_equal_sides_agree_everywhere() -> None:
    found = result()
    assert (found.same, found.ties, found.different, found.free) == (2, 0, 0, "same")
    assert found.errors == {"vision": 0.0, "prompt": 0.0, "answer": 0.0}
    assert found.divergence.tolist() == [0.0, 0.0]
    assert all(check.ok for check in token_checks([found], PARITY_FP32))


def test_only_positions_that_predict_the_answer_are_counted() -> None:
    assert result(logits(2, 2, 4, 2, 1)).different == 0
    assert result(logits(1, 1, 4, 3, 3)).different == 1


def test_a_flip_where_the_reference_has_no_preference_is_a_tie_apart() -> None:
    reference = REFERENCE.copy()
    reference[3, 3] = 5.0 - 1e-5
    tested = reference.copy()
    tested[3, 2] -= 2e-5
    found = result(tested, Answer(ids=[4, 3, 5], collapsed=""), reference=reference)
    assert (found.same, found.ties, found.different) == (1, 1, 0)
    assert found.free == "tie"
    checks = {check.name: check for check in token_checks([found, result()], PARITY_FP32)}
    assert checks["parity.agreement"].ok is True
    assert checks["parity.greedy"].value == 1.0


def test_answers_that_part_for_no_good_reason_differ() -> None:
    found = result(answer=Answer(ids=[4, 3], collapsed=""))
    assert found.free == "different"
    (greedy,) = [c for c in token_checks([found], PARITY_FP32) if c.name == "parity.greedy"]
    assert (greedy.ok, greedy.value) == (False, 0.0)
    assert greedy.why == "1 of 1 answers differ, 0 ties apart"


def test_an_answer_that_stops_early_differs() -> None:
    assert result(answer=Answer(ids=[4], collapsed="")).free == "different"


def test_an_answer_cut_short_by_collapse_is_compared_as_far_as_it_goes() -> None:
    found = result(answer=Answer(ids=[4], collapsed="one token 24 times in a row"))
    assert found.free == "same"
    checks = {check.name: check for check in token_checks([found], PARITY_FP32)}
    assert checks["collapse"].ok is False
    assert checks["collapse"].why == "1 of 1 answers: one token 24 times in a row"


def test_a_collapse_now_and_then_is_tolerated() -> None:
    assert collapse_check(["loops"] + [""] * 9, tier="tokens").ok is True
    assert collapse_check(["loops"] * 2 + [""] * 9, tier="task").ok is False


def test_logits_that_are_not_a_number_fail() -> None:
    broken = REFERENCE.copy()
    broken[0] = np.nan
    checks = token_checks([result(broken)], PARITY_FP32)
    assert {(check.name, check.modality) for check in checks if not check.ok} == {
        ("parity.logits", "vision")
    }


def test_a_modality_without_positions_is_not_measured() -> None:
    found = replace(result(), errors={"prompt": 0.0, "answer": 0.0})
    (missing,) = [check for check in token_checks([found], PARITY_FP32) if check.ok is None]
    assert (missing.name, missing.modality) == ("parity.logits", "vision")


def test_measurements_count_prompts_positions_and_ties() -> None:
    found = {m.name: m.value for m in token_measurements([result(), result()])}
    assert found["tokens/prompts"] == 2
    assert found["tokens/positions"] == 4
    assert found["tokens/top5_overlap"] == 1.0


@pytest.mark.parametrize("setup", [{"lowering": "reference"}, {"backend": "torch"}], ids=str)
def test_real_answers_are_the_same_on_both_sides(setup: dict[str, str]) -> None:
    bundle = sample_bundle()
    oracle = Oracle(fake_quant_model(QuantCheckpoint.open(bundle.checkpoint_folder)))
    samples = parity_samples(None, 4, oracle.model.processor)
    with open_tested(Setup(bundle=bundle, threads=1, **setup), oracle) as side:
        results = run_prompts(oracle, side, samples, new_tokens=32, gates=PARITY_FP32)
    assert [found.free for found in results] == ["same"] * 4
    assert all(check.ok for check in token_checks(results, PARITY_FP32))
    assert len({found.same for found in results}) > 1, "captions and questions, long and short"
