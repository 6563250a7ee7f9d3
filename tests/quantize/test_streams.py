"""Two streams start alike and go through their own blocks."""

import pytest
import torch

from mbq_export.backends.torch import fake_quant_model
from mbq_export.blocks.stream import BlockStream
from mbq_export.families.llava_onevision import load
from mbq_export.quantize.streams import Streams, with_codes
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.affine import quantize
from tests.questions import questions, tiny_model
from tests.tiny import tiny_checkpoint

LINEAR = "mlp.up_proj"
OUTPUT_RELATIVE = 1e-5
"""Integer sums scaled once, against float32 products of the same numbers."""


def test_both_streams_begin_with_the_embedded_samples() -> None:
    model = tiny_model()
    stream, inputs = BlockStream(model), questions(model, 4)
    rows = Streams.begin(stream, inputs, exact=True, moved=True)
    for batch, (found, before), (_, after) in zip(
        stream.begin(inputs), rows.before, rows.after, strict=True
    ):
        assert torch.equal(before, batch.hidden)
        assert torch.equal(after, batch.hidden)
        assert found.hidden.numel() == 0, "rows are held once, not in the batch too"


def test_streams_go_through_their_own_blocks() -> None:
    model = tiny_model()
    stream = BlockStream(model)
    rows = Streams.begin(stream, questions(model, 3), exact=True, moved=True)
    with stream.block(0) as block, stream.block(1) as other:
        exact = stream.run_all(block, 0, rows.before)
        moved = stream.run_all(other, 0, rows.before)
        rows.advance(stream, 0, folded=block, rounded=other)
    for (_, before), (_, after), one, two in zip(
        rows.before, rows.after, exact, moved, strict=True
    ):
        assert torch.equal(before, one)
        assert torch.equal(after, two)
        assert not torch.equal(one, two)


def test_where_no_rows_are_kept_apart_both_streams_are_one() -> None:
    model = tiny_model()
    rows = Streams.begin(BlockStream(model), questions(model, 2), exact=True, moved=False)
    for (_, before), (_, after) in zip(rows.before, rows.after, strict=True):
        assert before is after


def test_a_half_precision_model_streams_in_float32() -> None:
    model = load(tiny_model().folder, dtype="bfloat16")
    stream = BlockStream(model)
    rows = Streams.begin(stream, questions(model, 2), exact=True, moved=False)
    with stream.block(0) as block:
        for output in stream.run_all(block.float(), 0, rows.before):
            assert output.dtype == torch.float32


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_a_linear_with_codes_computes_what_the_checkpoint_computes(
    scheme: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = tiny_model()
    group = 64 if scheme == "w3a16" else 0
    folder = tmp_path_factory.mktemp("c") / "c"
    checkpoint = tiny_checkpoint(folder, model, scheme=scheme, group_size=group)
    folded = tiny_checkpoint(folder.parent / "f", model, scheme=None)
    oracle = fake_quant_model(checkpoint).module.get_submodule(model.family.linear_path(0, LINEAR))
    block = fake_quant_model(folded).module.get_submodule(f"{model.family.blocks}.0")
    weight = block.get_parameter(f"{LINEAR}.weight").detach()
    codes = quantize(weight, scheme=SCHEMES[scheme], group_size=group)
    before = weight.clone()
    rounded = with_codes(block, {LINEAR: codes}, scheme=SCHEMES[scheme])
    x = torch.randn(7, weight.shape[1], generator=torch.Generator().manual_seed(0))
    found, wanted = rounded.get_submodule(LINEAR)(x), oracle(x)
    assert float((found - wanted).norm() / wanted.norm()) < OUTPUT_RELATIVE
    assert torch.equal(block.get_parameter(f"{LINEAR}.weight"), before)
