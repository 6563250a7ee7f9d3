"""Image features land at the image tokens, as in transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mbq_export.errors import FormatError
from mbq_export.families.llava_onevision import FAMILY, load, vision_module
from mbq_export.runtime.preprocess import HostMerge, open_pictures, replace_rows
from mbq_export.tensor_file import BFLOAT16
from tests.families.random_models import picture, write_model


def test_rows_are_replaced_in_order_and_the_rest_is_kept() -> None:
    embeds = np.arange(8, dtype=np.float16).reshape(4, 2)
    merged = replace_rows(
        embeds, np.array([5, 2, 7, 2]), 2, np.array([[-1, -2], [-3, -4]], np.float32)
    )
    assert merged.tolist() == [[0, 1], [-1, -2], [4, 5], [-3, -4]]
    assert merged.dtype == np.float16
    assert embeds[1].tolist() == [2, 3]


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_unequal_counts_are_refused_with_both(rows: int) -> None:
    with pytest.raises(FormatError, match=f"2 image tokens meet {rows} rows") as caught:
        replace_rows(np.zeros((3, 1)), np.array([2, 2, 0]), 2, np.zeros((rows, 1)))
    assert caught.value.code == "E4204"


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[(48, 48)], [(100, 30)], [(30, 40), (64, 20)], []])
def test_merged_rows_give_the_logits_of_transformers(
    tmp_path: Path, sizes: list[tuple[int, int]]
) -> None:
    model = load(write_model(tmp_path / "m"))
    inputs = model.processor.inputs("is there a star ?", [picture(*size) for size in sizes])
    embeds = model.module.get_submodule(FAMILY.embed)(torch.from_numpy(inputs.input_ids)).numpy()
    features = np.zeros((0, model.vision.tokens_per_tile, model.text.hidden), np.float32)
    if sizes:
        features = vision_module(model)(torch.from_numpy(inputs.pixel_values)).numpy()
    merge = HostMerge(
        family=FAMILY,
        config=model.config,
        newline=model.module.get_parameter(FAMILY.newline).numpy(),
        image_token_id=model.image_token_id,
    )
    merged = torch.from_numpy(merge(embeds, features, inputs))[None]
    found = model.module(inputs_embeds=merged).logits
    expected = model.module(**inputs.tensors()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_bfloat16_features_are_merged_like_the_numbers_they_are(tmp_path: Path) -> None:
    """A picture of several tiles that is shrunk: the arithmetic is that of fp32, the result in the embeddings' type."""
    model = load(write_model(tmp_path / "m"))
    inputs = model.processor.inputs("is there a star ?", [picture(64, 20)])
    draws = np.random.default_rng(3)
    shape = (len(inputs.pixel_values), model.vision.tokens_per_tile, model.text.hidden)
    features = draws.normal(size=shape).astype(BFLOAT16)
    embeds = draws.normal(size=(len(inputs.input_ids), model.text.hidden)).astype(BFLOAT16)
    merge = HostMerge(
        family=FAMILY,
        config=model.config,
        newline=model.module.get_parameter(FAMILY.newline).detach().numpy(),
        image_token_id=model.image_token_id,
    )
    merged = merge(embeds, features, inputs)
    expected = merge(embeds.astype(np.float32), features.astype(np.float32), inputs)
    assert merged.dtype == BFLOAT16
    assert (merged == expected.astype(BFLOAT16)).all()
    assert (merged != embeds).any()


def test_pictures_are_opened_upright_and_rgb(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (4, 2)).save(tmp_path / "x.jpg", exif=exif)
    (found,) = open_pictures([tmp_path / "x.jpg"])
    assert (found.mode, found.size) == ("RGB", (2, 4))
    with pytest.raises(FormatError, match=r"no file 'y\.jpg'"):
        open_pictures([tmp_path / "y.jpg"])
