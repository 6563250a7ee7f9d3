"""Blocks one at a time give what the whole model gives."""

import pytest
import torch
from PIL import Image
from torch import Tensor

from mbq_export.blocks.stream import BlockStream
from mbq_export.families.base import LoadedModel
from mbq_export.families.inputs import ModelInputs
from tests.questions import questions, tiny_model
from tests.tiny import Tiny

MODELS = {
    "grouped query": Tiny(),
    "one head per value": Tiny(kv_heads=4, seed=1),
    "own head": Tiny(tied=False, seed=2),
}


def mixed_samples(model: LoadedModel) -> list[ModelInputs]:
    """Pictures of several shapes, two pictures, none, and samples of equal length."""
    wide, square = Image.new("RGB", (150, 40), "red"), Image.new("RGB", (48, 48), "blue")
    return [
        *questions(model, 6),
        model.processor.inputs("how many ?", [wide], "one"),
        model.processor.inputs("how many ?", [square, wide], "two red"),
        model.processor.inputs("how many ?", (), "one"),
    ]


def streamed_logits(model: LoadedModel, inputs: list[ModelInputs], **options: int) -> list[Tensor]:
    stream = BlockStream(model)
    batches = stream.begin(inputs, **options)
    rows = [batch.hidden for batch in batches]
    for index in range(len(stream)):
        with stream.block(index) as block:
            rows = stream.run_all(block, index, list(zip(batches, rows, strict=True)))
    found = {}
    for batch, hidden in zip(batches, rows, strict=True):
        with torch.no_grad():
            logits = stream.logits(hidden)
        found |= dict(zip(batch.samples, logits, strict=True))
    return [found[position] for position in range(len(inputs))]


@torch.no_grad()
def whole_logits(model: LoadedModel, inputs: ModelInputs) -> Tensor:
    return model.module(**inputs.tensors(), use_cache=False).logits[0]


@pytest.mark.parametrize("tiny", MODELS.values(), ids=MODELS)
def test_streamed_logits_are_the_models(tiny: Tiny) -> None:
    model = tiny_model(tiny)
    inputs = mixed_samples(model)
    for found, sample in zip(streamed_logits(model, inputs), inputs, strict=True):
        torch.testing.assert_close(found, whole_logits(model, sample), rtol=1e-5, atol=1e-5)


def test_blocks_read_from_files_are_the_loaded_ones() -> None:
    whole, streamed = tiny_model(), tiny_model(meta_blocks=True)
    inputs = questions(whole, 3)
    assert next(streamed.module.get_submodule(streamed.family.blocks).parameters()).is_meta
    expected = streamed_logits(whole, inputs)
    for found, wanted in zip(streamed_logits(streamed, inputs), expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_block_is_gone_after_use() -> None:
    model = tiny_model(meta_blocks=True)
    with BlockStream(model).block(0) as block:
        assert not any(p.is_meta or p.requires_grad for p in block.parameters())
    assert all(p.is_meta for p in model.module.get_submodule(model.family.blocks).parameters())


def test_changing_a_block_does_not_change_the_model() -> None:
    model = tiny_model()
    stream = BlockStream(model)
    before = model.module.state_dict()["model.language_model.layers.1.mlp.up_proj.weight"].clone()
    with stream.block(1) as block, torch.no_grad():
        block.get_parameter("mlp.up_proj.weight").zero_()
    with stream.block(1) as block:
        assert torch.equal(block.get_parameter("mlp.up_proj.weight"), before)


def test_every_sample_is_in_one_batch_of_its_own_length() -> None:
    model = tiny_model()
    inputs = questions(model, 24)
    batches = BlockStream(model).begin(inputs, batch_tokens=300)
    assert sorted(p for batch in batches for p in batch.samples) == list(range(24))
    for batch in batches:
        assert len(batch.samples) == 1 or batch.classes.numel() <= 300
        for row, position in enumerate(batch.samples):
            assert batch.ids[row].tolist() == inputs[position].input_ids.tolist()
            assert batch.classes[row].tolist() == inputs[position].token_classes.tolist()
    assert max(len(batch.samples) for batch in batches) > 1


def test_the_size_of_batches_does_not_matter() -> None:
    model = tiny_model()
    inputs = questions(model, 8)
    together, alone = streamed_logits(model, inputs), streamed_logits(model, inputs, batch_tokens=1)
    for found, wanted in zip(together, alone, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_model_has_its_blocks_back_after_listening() -> None:
    model = tiny_model()
    before = model.module.get_submodule(model.family.blocks)
    BlockStream(model).begin(questions(model, 1))
    assert model.module.get_submodule(model.family.blocks) is before
