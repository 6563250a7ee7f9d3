"""Held-out errors are those of the objective, and small differences decide nothing."""

import numpy as np
import pytest
import torch

from mbq_export.blocks.loss import ClassWeights
from mbq_export.blocks.stream import BlockStream
from mbq_export.errors import GateError
from mbq_export.quantize.held_out import clearly_better, losses
from mbq_export.quantize.streams import Streams
from tests.questions import questions, tiny_model
from tests.reference.published import balanced_mae

ERROR_RELATIVE = 1e-5
"""Float32 outputs of one block."""


def test_losses_are_the_objective_of_each_sample() -> None:
    model = tiny_model()
    stream, inputs = BlockStream(model), questions(model, 5)
    rows = Streams.begin(stream, inputs, exact=True, moved=True)
    with stream.block(0) as block, stream.block(1) as other:
        wanted = stream.run_all(block, 0, rows.before)
        found = losses(
            stream, other, 0, after=rows.after, wanted=wanted, weights=ClassWeights(vision=0.25)
        )
        outputs = stream.run_all(other, 0, rows.before)
    by_sample = {}
    for batch, target, output in zip(rows.batches, wanted, outputs, strict=True):
        for place, sample in enumerate(batch.samples):
            classes = torch.from_numpy(inputs[sample].token_classes)
            by_sample[sample] = balanced_mae(
                target[place] - output[place], classes == 2, classes == 3, 0.25
            )
    order = [sample for batch in rows.batches for sample in batch.samples]
    assert sorted(order) == list(range(5))
    np.testing.assert_allclose(found, [by_sample[s] for s in order], rtol=ERROR_RELATIVE)


def test_the_block_itself_has_no_loss() -> None:
    model = tiny_model()
    stream = BlockStream(model)
    rows = Streams.begin(stream, questions(model, 2), exact=True, moved=True)
    with stream.block(0) as block:
        wanted = stream.run_all(block, 0, rows.before)
        assert not losses(stream, block, 0, after=rows.after, wanted=wanted, weights=None).any()


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = tiny_model()
    stream = BlockStream(model)
    rows = Streams.begin(stream, questions(model, 2), exact=True, moved=True)
    with stream.block(0) as block:
        wanted = [torch.full_like(hidden, float("nan")) for _, hidden in rows.before]
        with pytest.raises(GateError, match="held-out error of 2 samples is not finite") as caught:
            losses(stream, block, 0, after=rows.after, wanted=wanted, weights=None)
    assert caught.value.code == "E1103"


@pytest.mark.parametrize(
    ("second", "first", "better"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], False),
        ([0.9, 1.9, 2.9], [1.0, 2.0, 3.0], True),
        ([0.8, 2.0, 2.9], [1.0, 2.0, 3.0], True),
        # Mean -0.07, standard error 0.15.
        ([0.7, 2.2, 2.9], [1.0, 2.0, 3.0], False),
        ([1.1, 2.1, 3.1], [1.0, 2.0, 3.0], False),
        ([0.5], [1.0], False),
    ],
)
def test_only_a_difference_beyond_its_standard_error_counts(
    second: list[float], first: list[float], better: bool
) -> None:
    assert clearly_better(np.array(second), np.array(first)) is better
