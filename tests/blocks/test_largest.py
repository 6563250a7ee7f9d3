"""The largest activation of a sample, against one found by listening to the whole model."""

import math
from pathlib import Path

import pytest
import torch

from mbq_export.blocks.largest import largest_activation
from mbq_export.families.base import LoadedModel
from mbq_export.families.inputs import ModelInputs
from mbq_export.families.llava_onevision import load
from tests.questions import questions, tiny_model
from tests.tiny import Tiny, write_tiny


@pytest.fixture
def own(tmp_path: Path) -> LoadedModel:
    """A model that a test may change."""
    return load(write_tiny(tmp_path / "model", Tiny(tied=False)))


def by_listening(model: LoadedModel, inputs: ModelInputs) -> float:
    """Largest input or output of any linear layer or norm, the whole model at once; behind the blocks, of the last row."""
    sizes, head = [], model.module.get_submodule(model.family.head)
    norm = model.module.get_submodule(model.family.final_norm)

    def listen(layer: object, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = given[0][:, -1:] if layer is head else given[0]
        y = output[:, -1:] if layer in {head, norm} else output
        sizes.extend((float(x.abs().max()), float(y.abs().max())))

    kinds = ("Linear", "Norm", "Conv")
    handles = [
        layer.register_forward_hook(listen)
        for layer in model.module.modules()
        if any(kind in type(layer).__name__ for kind in kinds) and not any(layer.children())
    ]
    with torch.no_grad():
        model.module(**inputs.tensors(), use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return max(sizes)


@pytest.mark.parametrize("seed", [0, 5])
def test_largest_is_that_of_the_whole_model(seed: int) -> None:
    model = tiny_model(Tiny(seed=seed))
    (inputs,) = questions(model, 1)
    found = largest_activation(model, inputs)
    assert math.isclose(found.size, by_listening(model, inputs), rel_tol=1e-4)


@pytest.mark.parametrize(
    ("planted", "place"),
    [
        ("model.language_model.layers.1.mlp.up_proj", "model.language_model.layers.1.mlp."),
        ("lm_head", "lm_head output"),
    ],
)
def test_outlier_is_found_where_it_begins(own: LoadedModel, planted: str, place: str) -> None:
    (inputs,) = questions(own, 1)
    assert largest_activation(own, inputs).size < 3e4
    with torch.no_grad():
        own.module.get_parameter(f"{planted}.weight").mul_(1e6)
    found = largest_activation(own, inputs)
    assert found.size > 3e4
    assert found.place.startswith(place)


def test_outlier_inside_the_vision_side_is_found(own: LoadedModel) -> None:
    """What the next layer divides out again never reaches the decoder."""
    (inputs,) = questions(own, 1)
    projector = own.module.get_submodule("model.multi_modal_projector")
    with torch.no_grad():
        projector.linear_1.weight.mul_(1e7)
        projector.linear_2.weight.mul_(1e-7)
    found = largest_activation(own, inputs)
    assert found.size > 3e4
    assert found.place == "model.multi_modal_projector.linear_1 output"


def test_model_is_left_as_it_was() -> None:
    model = tiny_model()
    (inputs,) = questions(model, 1)

    def hooks() -> list[int]:
        return [len(layer._forward_hooks) for layer in model.module.modules()]

    # transformers leaves hooks of its own on a tower that was asked for hidden states.
    before = hooks()
    largest_activation(model, inputs)
    assert hooks() == before


def test_what_is_not_finite_is_the_largest(own: LoadedModel) -> None:
    (inputs,) = questions(own, 1)
    with torch.no_grad():
        own.module.get_parameter(f"{own.family.final_norm}.weight")[0] = math.nan
    found = largest_activation(own, inputs)
    assert found.size == math.inf
    assert found.place == f"{own.family.final_norm} output"
