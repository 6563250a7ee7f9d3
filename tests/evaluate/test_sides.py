"""Both sides do what users and transformers do, and what they are handed is cut in the right places."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mbq_export.backends.torch import fake_quant_model
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import FormatError, UsageError
from mbq_export.evaluate.samples import parity_samples
from mbq_export.evaluate.sides import (
    Oracle,
    Setup,
    answer_rows,
    open_tested,
    prompt_of,
    with_answer,
)
from mbq_export.evaluate.taps import linear_values, stream_values
from mbq_export.families.base import ANSWER, LINEARS, PROMPT
from mbq_export.families.inputs import ModelInputs
from tests.evaluate.bundles import tiny_bundle


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(fake_quant_model(QuantCheckpoint.open(tiny_bundle().checkpoint_folder)))


@pytest.fixture(scope="module")
def sample(oracle: Oracle) -> ModelInputs:
    return parity_samples(None, 1, oracle.model.processor)[0]


def test_prompt_ends_where_the_answer_begins(sample: ModelInputs) -> None:
    prompt = prompt_of(sample)
    answer = sample.input_ids[len(prompt.input_ids) :]
    assert len(answer) > 2
    assert ANSWER not in prompt.token_classes
    again = with_answer(prompt, answer.tolist())
    np.testing.assert_array_equal(again.input_ids, sample.input_ids)
    np.testing.assert_array_equal(again.token_classes, sample.token_classes)


def test_earlier_answers_stay_in_the_prompt(sample: ModelInputs) -> None:
    classes = sample.token_classes.copy()
    classes[:3] = ANSWER
    assert len(prompt_of(replace(sample, token_classes=classes)).input_ids) == len(
        prompt_of(sample).input_ids
    )


def test_answer_rows_predict_the_answer(sample: ModelInputs) -> None:
    prompt = prompt_of(sample)
    following = np.append(sample.input_ids[1:], -1)
    np.testing.assert_array_equal(
        answer_rows(following[:, None], prompt)[:, 0], sample.input_ids[len(prompt.input_ids) :]
    )


def test_oracle_is_transformers_itself(oracle: Oracle, sample: ModelInputs) -> None:
    with torch.no_grad():
        expected = oracle.model.module(**sample.tensors()).logits[0].numpy()
    np.testing.assert_array_equal(oracle.values(sample)["logits"], expected)


def test_oracle_answers_token_by_token_what_its_logits_say(
    oracle: Oracle, sample: ModelInputs
) -> None:
    prompt = prompt_of(sample)
    ids: list[int] = []
    while len(ids) < 6 and not set(ids) & oracle.model.processor.eos_ids:
        logits = oracle.values(with_answer(prompt, ids))["logits"]
        ids.append(int(logits[-1].argmax()))
    assert oracle.greedy(prompt, new_tokens=6) == ids


NAMES = (*linear_values(1, LINEARS), *stream_values(2))


@pytest.mark.parametrize(
    "setup",
    [{"lowering": "qdq"}, {"lowering": "reference"}, {"backend": "torch"}],
    ids=["qdq", "reference", "torch"],
)
def test_tapped_side_gives_the_same_values_under_the_same_names(
    oracle: Oracle, sample: ModelInputs, setup: dict[str, str]
) -> None:
    expected = oracle.values(sample, ("inputs_embeds", *NAMES))
    with open_tested(Setup(bundle=tiny_bundle(), threads=1, **setup), oracle, NAMES) as side:
        found = side.values(sample)
        again = side.values(sample)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
        np.testing.assert_array_equal(again[name], found[name])


def test_side_without_taps_is_the_session_that_users_open(
    oracle: Oracle, sample: ModelInputs
) -> None:
    setup = Setup(bundle=tiny_bundle(), threads=1)
    with open_tested(setup, oracle) as side, setup.open() as session:
        assert list(side.values(sample)) == ["logits"]
        np.testing.assert_array_equal(side.values(sample)["logits"], session.teacher_forced(sample))


def test_setups_are_named_as_reports_show_them() -> None:
    assert Setup(bundle=tiny_bundle()).name == "ort:qdq"
    assert Setup(bundle=tiny_bundle(), backend="torch").name == "torch"


def test_unknown_lowering_lists_what_the_bundle_has(oracle: Oracle) -> None:
    with (
        pytest.raises(UsageError, match="fancy") as caught,
        open_tested(Setup(bundle=tiny_bundle(), lowering="fancy"), oracle),
    ):
        pass
    assert "decoder_model_merged_qdq_ort.onnx" in caught.value.why


def test_graphs_of_plugins_run_in_engines_only(oracle: Oracle) -> None:
    with (
        pytest.raises(UsageError) as caught,
        open_tested(Setup(bundle=tiny_bundle(), lowering="plugin"), oracle),
    ):
        pass
    assert "in engines of TensorRT only" in caught.value.why


def test_value_that_no_graph_has_is_refused(oracle: Oracle) -> None:
    with (
        pytest.raises(FormatError, match=r"layers\.9\.hidden"),
        open_tested(Setup(bundle=tiny_bundle()), oracle, ("layers.9.hidden",)),
    ):
        pass


def test_text_only_prompt_runs_on_both_sides(oracle: Oracle) -> None:
    inputs = oracle.model.processor.inputs("how many objects are there ?", answer="3")
    assert set(inputs.token_classes) == {PROMPT, ANSWER}
    with open_tested(Setup(bundle=tiny_bundle(), threads=1), oracle) as side:
        found = side.values(inputs)["logits"]
    np.testing.assert_allclose(found, oracle.values(inputs)["logits"], rtol=1e-3, atol=1e-4)
