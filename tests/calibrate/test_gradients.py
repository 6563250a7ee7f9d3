"""Gradients taken block by block are those of the whole model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mbq_export.blocks.memory import MemoryPlan
from mbq_export.blocks.room import Room
from mbq_export.blocks.stream import BlockStream
from mbq_export.blocks.tokens import embed
from mbq_export.calibrate.gradients import Gradients, measure
from mbq_export.errors import FormatError, GateError
from mbq_export.families.base import ANSWER, LINEARS, PAD, PROMPT, VISION, LoadedModel
from mbq_export.families.inputs import ModelInputs
from mbq_export.families.llava_onevision import load
from tests.questions import questions, sample_model, tiny_model
from tests.tiny import Tiny

AGREE = 1e-5  # relative, float32: the same sums in another order


def streamed(model: LoadedModel, inputs: list[ModelInputs], **options: int) -> Gradients:
    stream = BlockStream(model)
    return measure(stream, stream.begin(inputs, **options), linears=LINEARS)


def whole(model: LoadedModel, inputs: list[ModelInputs]) -> tuple[NDArray, NDArray, list[float]]:
    """Run one sample at a time through the whole model, one backward pass each."""
    blocks = model.module.get_submodule(model.family.blocks)
    shape = (len(blocks), len(LINEARS), 4, len(inputs))
    absolute, square, losses = np.full(shape, np.nan), np.full(shape, np.nan), []
    for position, sample in enumerate(inputs):
        seen: dict[tuple[int, int], Tensor] = {}
        handles = [
            block.get_submodule(name).register_forward_hook(
                lambda _m, _i, output, at=(layer, place), seen=seen: seen.update({at: output})
            )
            for layer, block in enumerate(blocks)
            for place, name in enumerate(LINEARS)
        ]
        rows = embed(model, sample, vision=model.family.vision_module(model)).requires_grad_()
        decoder = model.module.get_submodule("model.language_model")
        last = decoder(inputs_embeds=rows[None], use_cache=False).last_hidden_state
        logits = model.module.get_submodule(model.family.head)(last)[0]
        classes = torch.from_numpy(sample.token_classes)
        ids = torch.from_numpy(sample.input_ids)
        predicted = torch.nonzero(classes[1:] == ANSWER)[:, 0]
        loss = nn.functional.cross_entropy(logits[predicted], ids[1:][predicted])
        found = torch.autograd.grad(loss, list(seen.values()))
        losses.append(loss.item())
        for (layer, place), gradient in zip(seen, found, strict=True):
            for kind in (PROMPT, VISION, ANSWER):
                part = gradient[0][classes == kind].double()
                if len(part):
                    absolute[layer, place, kind, position] = part.abs().mean()
                    square[layer, place, kind, position] = part.square().mean()
        for handle in handles:
            handle.remove()
    return absolute, square, losses


def with_text(model: LoadedModel, count: int) -> list[ModelInputs]:
    return [*questions(model, count), model.processor.inputs("how many ?", (), "one")]


@pytest.mark.parametrize("model", [tiny_model, sample_model], ids=["tiny", "sample"])
def test_streamed_gradients_are_those_of_the_whole_model(model) -> None:
    model = model()
    inputs = with_text(model, 6)
    found = streamed(model, inputs)
    absolute, square, losses = whole(model, inputs)
    np.testing.assert_allclose(found.losses, losses, rtol=AGREE)
    for kind in (PROMPT, VISION, ANSWER):
        scale = np.nanmax(absolute[:, :, kind], axis=-1, keepdims=True)
        difference = np.abs(found.mean_abs[:, :, kind] - absolute[:, :, kind])
        assert np.nanmax(difference / np.maximum(scale, 1e-30)) <= AGREE
        np.testing.assert_array_equal(
            np.isnan(found.mean_abs[:, :, kind]), np.isnan(absolute[:, :, kind])
        )
    np.testing.assert_allclose(found.mean_square, square, rtol=1e-4, atol=1e-25)


def test_batches_give_what_single_samples_give() -> None:
    model = tiny_model()
    inputs = with_text(model, 10)
    together, alone = streamed(model, inputs), streamed(model, inputs, batch_tokens=1)
    np.testing.assert_allclose(together.mean_abs, alone.mean_abs, rtol=1e-4, atol=1e-12)


def test_vision_has_no_gradient_in_the_last_layer_but_in_keys_and_values() -> None:
    model = sample_model()
    last = streamed(model, questions(model, 4)).mean_abs[-1, :, VISION]
    for place, name in enumerate(LINEARS):
        if name in {"self_attn.k_proj", "self_attn.v_proj"}:
            assert (last[place] > 0).all()
        else:
            assert (last[place] == 0).all(), name


def test_a_class_that_a_sample_lacks_is_not_a_number() -> None:
    model = tiny_model()
    found = streamed(model, with_text(model, 2)).mean_abs
    assert np.isnan(found[:, :, VISION, 2]).all()
    assert not np.isnan(found[:, :, VISION, :2]).any()
    assert np.isnan(found[:, :, PAD]).all()


def test_a_sample_without_an_answer_is_refused() -> None:
    model = tiny_model()
    inputs = questions(model, 2)
    asked = np.where(inputs[0].token_classes == ANSWER, PROMPT, inputs[0].token_classes)
    inputs.append(replace(inputs[0], token_classes=asked.astype(np.int8)))
    with pytest.raises(FormatError, match="Sample 2 has no answer tokens") as caught:
        streamed(model, inputs)
    assert caught.value.code == "E4309"


def test_a_loss_that_is_not_finite_names_the_sample() -> None:
    model = tiny_model()
    stream = BlockStream(model)
    inputs = questions(model, 3)
    batches = stream.begin(inputs, batch_tokens=1)
    at = next(batch for batch in batches if batch.samples == (1,))
    at.hidden[0, 5] = float("inf")
    with pytest.raises(GateError, match="Sample 1: loss is not finite") as caught:
        measure(stream, batches, linears=LINEARS)
    assert caught.value.code == "E1103"
    assert caught.value.why == "computed in float32"


def test_half_precision_loses_no_small_gradient() -> None:
    """Unscaled, gradients below 6e-8 would be 0 in float16."""
    exact = sample_model()
    half = load(exact.folder, dtype="float16")
    found, wanted = (streamed(m, questions(m, 2)).mean_abs[..., 1:, :] for m in (half, exact))
    assert (wanted[:-1] < 6e-8).any()
    np.testing.assert_array_equal(found > 0, wanted > 0)
    assert np.nanmedian(np.abs(found - wanted) / np.maximum(wanted, 1e-12)) < 0.05


def test_progress_counts_blocks_forwards_and_backwards() -> None:
    model = tiny_model()
    stream = BlockStream(model)
    heard: list[tuple[int, int]] = []
    measure(
        stream,
        stream.begin(questions(model, 1)),
        linears=LINEARS,
        progress=lambda done, total, _note: heard.append((done, total)),
    )
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_gradients_with_rows_on_disk_are_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_model(Tiny(layers=4))
    inputs = questions(model, 5)
    wanted = streamed(model, inputs)
    with Room(tmp_path, limit=0) as room:
        room.settle(MemoryPlan(now=1, rows=1, gradients=1, search=0))
        stream = BlockStream(model, room)
        found = measure(stream, stream.begin(inputs), linears=LINEARS)
        assert not list(tmp_path.rglob("*.rows"))
    for name in ("mean_abs", "mean_square", "losses"):
        assert getattr(found, name).tobytes() == getattr(wanted, name).tobytes()
