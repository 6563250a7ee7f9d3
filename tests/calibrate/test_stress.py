"""Outlier channels appear, and nothing that the model says changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from mbq_export.calibrate.shapes import CalibrationMix, calibration_samples, evaluation_scenes
from mbq_export.calibrate.shapes_drawing import Dice
from mbq_export.calibrate.stress import Stress, apply_stress, channel_means, choose_factors
from mbq_export.errors import FormatError
from mbq_export.evaluate.packed import (
    IGNORED,
    accuracy,
    answer_logits,
    answer_scenes,
    encoder,
    pixels_from_images,
    vision_states,
)
from mbq_export.families.inputs import ModelInputs
from mbq_export.schemes.affine import dequantize, quantize
from mbq_export.schemes.w3a16 import SCHEME
from samples.tiny_vlm.inputs import HandMade

WEIGHTS = Path(__file__).parents[2] / "samples" / "tiny_vlm" / "weights"


@pytest.fixture(scope="module")
def processor() -> HandMade:
    return HandMade(WEIGHTS)


@pytest.fixture(scope="module")
def inputs(processor: HandMade) -> list[ModelInputs]:
    samples = calibration_samples(24, seed=1, mix=CalibrationMix.CAPTIONS)
    return [processor.inputs(s.prompt, s.image, s.answer) for s in samples]


def load() -> Any:
    return AutoModelForImageTextToText.from_pretrained(WEIGHTS, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def stressed(inputs: list[ModelInputs]) -> Any:
    model = load()
    apply_stress(model, inputs)
    return model


@torch.no_grad()
def log_probabilities(model: Any, processor: HandMade) -> Tensor:
    scenes = list(evaluation_scenes(40, seed=3))
    pixels = pixels_from_images(np.stack([scene.image for scene in scenes]))
    questions = [scene.questions for scene in scenes]
    encode = encoder(processor.tokenizer)
    logits, rows = answer_logits(model, questions, vision_states(model, pixels), encode)
    return logits[rows.labels != IGNORED].log_softmax(-1)


def test_a_stressed_model_says_the_same(stressed: Any, processor: HandMade) -> None:
    plain, harder = (log_probabilities(model, processor) for model in (load(), stressed))
    divergence = (plain.exp() * (plain - harder)).sum(-1)
    assert divergence.abs().max() < 1e-6
    assert (plain.argmax(-1) == harder.argmax(-1)).all()


def test_channels_spread_at_least_twentyfold_wider(inputs: list[ModelInputs]) -> None:
    places = apply_stress(load(), inputs)
    assert [(p.block, p.unit) for p in places[:3]] == [(0, "qkv"), (0, "gate_up"), (0, "down")]
    assert len(places) == 15
    for place in places:
        if place.unit != "down":  # Gated products have outliers of their own.
            assert place.outlier_ratio_before < 4
        assert place.outlier_ratio_after > 10 * place.outlier_ratio_before
        assert place.outlier_ratio_after > 50


def test_measured_activations_grow_by_the_factors(inputs: list[ModelInputs]) -> None:
    model = load()
    layers = list(model.get_submodule("model.language_model.layers"))
    before = channel_means(model, layers, inputs[:4])
    places = apply_stress(model, inputs)
    after = channel_means(model, layers, inputs[:4])
    for place in places:
        for old, new in zip(
            before[place.block, place.unit], after[place.block, place.unit], strict=True
        ):
            torch.testing.assert_close(
                new, old * torch.from_numpy(place.factors), rtol=1e-3, atol=1e-5
            )


def test_embeddings_stay_tied(stressed: Any) -> None:
    assert stressed.lm_head.weight is stressed.model.language_model.embed_tokens.weight
    assert (stressed.lm_head.weight == load().lm_head.weight).all()


def test_the_same_seed_distorts_the_same_way(inputs: list[ModelInputs], stressed: Any) -> None:
    again = load()
    apply_stress(again, inputs)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, stressed.get_parameter(name)), name


def test_rounding_to_three_bits_costs_more_on_the_stressed_model(
    inputs: list[ModelInputs], processor: HandMade
) -> None:
    lost = {}
    for name in ("plain", "stressed"):
        model = load()
        if name == "stressed":
            apply_stress(model, inputs)
        scenes = list(evaluation_scenes(60, seed=3))
        encode = encoder(processor.tokenizer)
        before = accuracy(answer_scenes(model, scenes, encode), draws=1).exact_match
        for layer in model.model.language_model.layers:
            for linear in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
                codes = quantize(linear.weight.data, scheme=SCHEME, group_size=128)
                linear.weight.data = dequantize(codes)
        lost[name] = before - accuracy(answer_scenes(model, scenes, encode), draws=1).exact_match
    assert lost["plain"] < 0.02
    assert lost["stressed"] > 0.03


def test_factors_go_to_the_channels_that_lean_most() -> None:
    lean = torch.tensor([1.0, 9.0, 1.1, 0.1, 1.2, 1.0, 0.9, 1.0, 1.0, 1.0])
    factors = choose_factors(lean, Stress(share=0.1, spread=0.0), Dice(0))
    assert factors.tolist() == [1, 40, 1, 8, 1, 1, 1, 1, 1, 1]


def test_means_tell_vision_from_text(inputs: list[ModelInputs]) -> None:
    model = load()
    layers = list(model.get_submodule("model.language_model.layers"))
    sample = inputs[0]
    caught: list[Tensor] = []
    handle = layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _module, args: caught.append(args[0][0])
    )
    with torch.no_grad():
        model(**sample.tensors())
    handle.remove()
    vision, text = channel_means(model, layers, [sample])[0, "down"]
    torch.testing.assert_close(vision, caught[0][:78].abs().mean(0))
    torch.testing.assert_close(text, caught[0][78:].abs().mean(0))


def test_half_precision_is_refused(inputs: list[ModelInputs]) -> None:
    with pytest.raises(FormatError, match=r"Cannot stress a model in float16\."):
        apply_stress(load().half(), inputs)
