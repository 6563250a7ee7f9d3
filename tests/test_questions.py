"""A test that changes a model which others read is found out, however it wrote."""

import pytest
import torch

from tests.questions import rewritten, tiny_model, touched
from tests.tiny import Tiny

OWN = Tiny(seed=4321)
WEIGHT = "model.language_model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("way", ["in place", "replaced", "frozen", "trained"])
def test_a_model_that_was_touched_is_named_and_forgotten(way: str) -> None:
    model = tiny_model(OWN)
    assert touched() == []
    weight = model.module.get_parameter(WEIGHT)
    name = WEIGHT
    if way == "in place":
        with torch.no_grad():
            weight.mul_(2)
    elif way == "replaced":
        weight.data = weight.detach().clone()
    elif way == "frozen":
        weight.requires_grad_(not weight.requires_grad)
    else:
        model.module.train()
        name = "training"
    assert touched() == [name]
    assert touched() == []
    assert tiny_model(OWN) is not model


def test_bytes_written_past_a_tensor_are_found_too() -> None:
    weight = tiny_model(OWN).module.get_parameter(WEIGHT)
    weight.detach().numpy()[3, 5] += 1
    assert touched() == []
    assert rewritten() == [WEIGHT]
    assert rewritten() == []


def test_reading_changes_nothing() -> None:
    model = tiny_model(OWN)
    with torch.no_grad():
        model.module.get_parameter(WEIGHT).float().mul(2)
    assert touched() == rewritten() == []
