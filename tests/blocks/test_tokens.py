"""Token classes as masks, and input rows with image features in their places."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mbq_export.blocks.tokens import class_mask, count_classes, embed
from mbq_export.errors import FormatError
from mbq_export.families.base import ANSWER, PAD, PROMPT, VISION, LoadedModel
from mbq_export.families.inputs import ModelInputs
from tests.questions import questions, tiny_model


def rows_of(model: LoadedModel, inputs: ModelInputs) -> Tensor:
    return embed(model, inputs, vision=model.family.vision_module(model))


def test_a_mask_has_one_row_per_class() -> None:
    mask = class_mask(torch.tensor([VISION, PAD, ANSWER, VISION, PROMPT], dtype=torch.int8))
    assert mask[VISION].tolist() == [1, 0, 0, 1, 0]
    assert mask[PAD].tolist() == [0, 1, 0, 0, 0]
    assert mask.sum(0).tolist() == [1, 1, 1, 1, 1]


def test_counts_leave_padding_out() -> None:
    sample = questions(tiny_model(), 1)[0]
    classes = np.array([PAD, PROMPT, VISION, VISION, ANSWER], np.int8)
    found = count_classes([replace(sample, token_classes=classes)] * 2)
    assert found == {"prompt": 2, "vision": 4, "answer": 2}


def test_rows_are_what_the_model_gives_its_decoder() -> None:
    model = tiny_model()
    sample = questions(model, 1)[0]
    seen = {}
    handle = model.module.get_submodule("model.language_model").register_forward_pre_hook(
        lambda _module, _args, named: seen.update(named), with_kwargs=True
    )
    with torch.no_grad():
        model.module(**sample.tensors(), use_cache=False)
    handle.remove()
    torch.testing.assert_close(rows_of(model, sample), seen["inputs_embeds"][0])


def test_rows_of_text_alone_are_its_embeddings() -> None:
    model = tiny_model()
    sample = model.processor.inputs("how many ?", (), "one")
    table = model.module.get_submodule(model.family.embed).weight
    assert torch.equal(rows_of(model, sample), table[torch.from_numpy(sample.input_ids)])


def test_image_tokens_without_features_are_refused() -> None:
    model = tiny_model()
    sample = questions(model, 1)[0]
    classes = sample.token_classes.copy()
    classes[-1] = VISION
    with pytest.raises(
        FormatError, match="79 image tokens meet 78 rows of image features"
    ) as caught:
        rows_of(model, replace(sample, token_classes=classes))
    assert caught.value.code == "E4204"
