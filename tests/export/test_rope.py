"""Rotary tables and the operator that uses them, against the formula and against transformers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from mbq_export.backends.ort import open_graph
from mbq_export.errors import FormatError
from mbq_export.evaluate.tolerances import OP_FP32
from mbq_export.export.graph import INT64, Emitter
from mbq_export.export.profile import OPSET20, OPSET23, OpProfile
from mbq_export.export.rope import Rotary, angles
from mbq_export.export.save import save_graph
from tests.export import decoders
from tests.export.one_linear import relative_error

SHAPE = decoders.FAMILY.text_shape(decoders.checkpoint().config)


def test_angles_are_position_times_frequency() -> None:
    table = angles(replace(SHAPE, head_dim=4, rope_theta=100.0), 3)
    np.testing.assert_allclose(table, [[0, 0], [1, 0.1], [2, 0.2]])


@pytest.mark.parametrize("level", [OPSET20, OPSET23], ids=lambda level: level.name)
def test_rotation_is_that_of_transformers(level: OpProfile, tmp_path: Path) -> None:
    g = Emitter(profile=level, dtype="fp32")
    x = g.input("x", ["b", 4, "t", SHAPE.head_dim])
    ids = g.input("ids", ["b", "t"], dtype=INT64)
    rotary = Rotary(g, SHAPE, positions=64, ids=ids)
    save_graph(g.model("rotary", [rotary.rotate(x, "q")]), tmp_path / "g.onnx")

    heads = torch.randn(2, 4, 5, SHAPE.head_dim, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([[0, 1, 2, 3, 4], [9, 30, 31, 62, 63]])
    language = decoders.oracle().module.get_submodule("model.language_model")
    cos, sin = language.rotary_emb(heads, places)
    wanted, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    with open_graph(tmp_path / "g.onnx", threads=1) as engine:
        found = engine.run({"x": heads.numpy(), "ids": places.numpy()})["q.out"]
    assert relative_error(found, wanted.numpy()) <= OP_FP32


def test_positions_of_another_kind_are_refused() -> None:
    g = Emitter(profile=OPSET23, dtype="fp32")
    ids = g.input("ids", ["b", "t"], dtype=INT64)
    with pytest.raises(FormatError, match="Positions of kind 'mrope' cannot be exported"):
        Rotary(g, replace(SHAPE, rope="mrope"), positions=8, ids=ids)
