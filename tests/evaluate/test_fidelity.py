"""Quality of real codes, and of a model that is none any more."""

import copy
from dataclasses import replace

import pytest
import torch

from mbq_export.backends.torch import fake_quant_model
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.evaluate.fidelity import quality_checks
from mbq_export.evaluate.samples import parity_samples
from mbq_export.evaluate.sides import Oracle
from mbq_export.evaluate.tolerances import QUALITY_W3, QUALITY_W4
from mbq_export.families.inputs import ModelInputs
from tests.evaluate.bundles import sample_bundle
from tests.questions import sample_model


@pytest.fixture(scope="module")
def full() -> Oracle:
    return Oracle(sample_model())


@pytest.fixture(scope="module")
def samples(full: Oracle) -> list[ModelInputs]:
    return parity_samples(None, 6, full.model.processor)


def test_three_bit_codes_of_the_sample_model_are_good_enough(
    full: Oracle, samples: list[ModelInputs]
) -> None:
    quantized = Oracle(fake_quant_model(QuantCheckpoint.open(sample_bundle().checkpoint_folder)))
    checks = quality_checks(full, quantized, samples, QUALITY_W3)
    assert {check.name for check in checks} == {
        "quality.cosine",
        "quality.norm_ratio",
        "quality.agreement",
        "quality.kl",
    }
    assert all(check.ok for check in checks)
    assert all(0 < check.value < 1 for check in checks if check.name == "quality.kl")


def test_a_model_is_at_no_distance_from_itself(full: Oracle, samples: list[ModelInputs]) -> None:
    checks = quality_checks(full, full, samples, QUALITY_W4)
    found = {check.name: check.value for check in checks}
    assert found["quality.cosine"] == pytest.approx(1.0)
    assert (found["quality.agreement"], found["quality.kl"]) == (1.0, 0.0)


def test_a_ruined_model_fails_agreement_and_divergence(
    full: Oracle, samples: list[ModelInputs]
) -> None:
    module = copy.deepcopy(full.model.module)
    with torch.no_grad():
        for parameter in module.get_submodule("model.language_model.layers.1").parameters():
            parameter.mul_(-2)
    ruined = Oracle(replace(full.model, module=module))
    failed = {
        check.name for check in quality_checks(full, ruined, samples, QUALITY_W3) if not check.ok
    }
    assert {"quality.agreement", "quality.kl"} <= failed
