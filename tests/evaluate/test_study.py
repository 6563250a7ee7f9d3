"""A study asks both models the same questions, and its figures are those of the models' own answers."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from mbq_export.calibrate.data import encode, generated_samples
from mbq_export.calibrate.shapes import evaluation_questions
from mbq_export.errors import GateError
from mbq_export.evaluate.sides import Oracle, prompt_of
from mbq_export.evaluate.study import FULL, STUDY_SEED, study
from mbq_export.families.base import ANSWER, LoadedModel
from mbq_export.report import Report
from tests.questions import sample_model

QUESTIONS = 4


def changed(model: LoadedModel, factor: float) -> LoadedModel:
    """The model with another output weight in its first block."""
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        module.get_parameter(f"{model.family.blocks}.0.mlp.down_proj.weight").mul_(factor)
    return replace(model, module=module)


@pytest.fixture(scope="module")
def report() -> Report:
    model = sample_model()
    return study(Oracle(model), Oracle(changed(model, 0.2)), name="damaged", questions=QUESTIONS)


def test_a_model_is_as_right_as_its_own_greedy_answers(report: Report) -> None:
    oracle = Oracle(sample_model())
    examples = evaluation_questions(QUESTIONS, seed=STUDY_SEED)[:QUESTIONS]
    right = []
    for sample in encode(generated_samples(examples), oracle.model.processor):
        prompt = prompt_of(sample)
        wanted = sample.input_ids[sample.token_classes == ANSWER].tolist()
        right.append(oracle.greedy(prompt, new_tokens=len(wanted)) == wanted)
    assert report.details["models"][FULL]["accuracy"]["value"] == np.mean(right)
    assert report["full_precision/exact_match"].value == pytest.approx(100 * np.mean(right))


def test_full_precision_is_at_no_distance_from_itself_and_a_damaged_model_is(
    report: Report,
) -> None:
    own, damaged = (report.details["models"][name]["kl"] for name in (FULL, "damaged"))
    for modality in ("answer", "vision", "prompt"):
        assert own[modality]["mean"]["value"] == 0
        assert own[modality]["same_top_token"] == 1
        assert damaged[modality]["mean"]["value"] > 0
        assert damaged[modality]["positions"] == own[modality]["positions"] > 0
        assert report[f"kl/{modality}"].value == damaged[modality]["mean"]["value"]
    assert report.details["comparison"]["kl"]["value"] == damaged["answer"]["mean"]["value"]


def test_every_position_but_the_last_belongs_to_one_modality(report: Report) -> None:
    examples = evaluation_questions(QUESTIONS, seed=STUDY_SEED)[:QUESTIONS]
    samples = encode(generated_samples(examples), sample_model().processor)
    kl = report.details["models"]["damaged"]["kl"]
    positions = sum(len(sample.input_ids) - 1 for sample in samples)
    assert sum(found["positions"] for found in kl.values()) == positions


def test_logits_that_are_no_numbers_are_named(report: Report) -> None:
    del report
    model = sample_model()
    broken = Oracle(changed(model, float("nan")))
    with pytest.raises(GateError, match="logits of w4a4 are not finite") as caught:
        study(Oracle(model), broken, name="w4a4", questions=1)
    assert caught.value.code == "E1103"


def test_the_report_says_what_was_asked_and_judges_nothing(report: Report) -> None:
    assert report.schema == "mbq-export/study@1"
    assert report.context == {"format": "damaged", "questions": QUESTIONS}
    assert (report.checks, report.passed) == ((), True)
