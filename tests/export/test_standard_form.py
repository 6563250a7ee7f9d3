"""One linear in the form that fits it: a head of codes in every graph, beside plugins and as one of them."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest

from mbq_export.backends.torch import fake_quant_model
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import UsageError
from mbq_export.evaluate.tolerances import BLOCK_FP16, BLOCK_FP32
from mbq_export.export import GraphForm, check_forms, export, ops
from mbq_export.export.untiled import check_same_weights
from mbq_export.families.base import LoadedModel
from tests.export import decoders
from tests.export.decoders import CALLS, FAMILY
from tests.export.one_linear import relative_error
from tests.export.plugin_twin import write_twin
from tests.questions import tiny_model
from tests.tiny import tiny_checkpoint

TRT = GraphForm(target="trt", dtype="fp16", kv="static", logits="last", max_context=256)
PLUGIN = replace(TRT, lowering="plugin")
FORMS = {
    "qdq": (GraphForm(), BLOCK_FP32),
    "reference": (GraphForm(lowering="reference"), BLOCK_FP32),
    "static": (GraphForm(kv="static", max_context=32), BLOCK_FP32),
    "qdq_trt": (GraphForm(target="trt", dtype="fp16", kv="static", max_context=32), BLOCK_FP16),
}
HEADS = (4, 8)


@cache
def checkpoint(bits: int) -> QuantCheckpoint:
    folder = TemporaryDirectory(prefix="head-")
    _KEPT.append(folder)
    return tiny_checkpoint(Path(folder.name) / "c", tiny_model(), head_bits=bits)


@cache
def oracle(bits: int) -> LoadedModel:
    return fake_quant_model(checkpoint(bits))


@pytest.mark.parametrize("bits", HEADS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name == "static" else name for name in FORMS],
)
def test_logits_are_those_of_the_codes(tmp_path: Path, bits: int, name: str) -> None:
    form, limit = FORMS[name]
    path = decoders.write_decoder(checkpoint(bits), form, tmp_path / "g.onnx")
    model, worst, blind = oracle(bits), 0.0, 1.0
    for call in CALLS[:3]:
        feeds = call.feeds(model)
        found = decoders.graph_run(path, feeds, form)[ops.LOGITS]
        mask = feeds[ops.ATTENTION_MASK].numpy()
        wanted, whole = (
            decoders.compared(ops.LOGITS, decoders.torch_run(each, feeds)[ops.LOGITS], mask)
            for each in (model, decoders.oracle())
        )
        found = decoders.compared(ops.LOGITS, found, mask)
        worst = max(worst, relative_error(found, wanted))
        blind = min(blind, relative_error(found, whole))
    assert worst <= limit < blind or bits == 8


@cache
def exported(bits: int) -> Path:
    folder = TemporaryDirectory(prefix="head-")
    _KEPT.append(folder)
    out = Path(folder.name) / "onnx"
    export(checkpoint(bits), out, family=FAMILY, forms=(PLUGIN,))
    return out


def test_a_head_of_4_bits_is_one_more_plugin() -> None:
    record = json.loads((exported(4) / "mbq_export.json").read_text())
    graph = next(each for each in record["graphs"] if each["plugin_layers"])
    assert graph["plugin_layers"]["W4A16Linear"] == ["lm_head"]
    assert len(graph["plugin_layers"]["W3Linear"]) == 4 * 2
    assert graph["layouts"] == {"w3t": 1, "w4t": 1}
    head = graph["linears"][-1]
    assert (head["node"], head["scheme"], head["group_size"]) == ("lm_head", "w4a16", 128)
    path = exported(4) / PLUGIN.file_name
    assert check_same_weights(path, checkpoint(4)) == 7 * 2 + 1


def test_a_head_of_8_bits_stands_beside_the_plugins() -> None:
    record = json.loads((exported(8) / "mbq_export.json").read_text())
    graph = next(each for each in record["graphs"] if each["plugin_layers"])
    assert graph["plugin_layers"].keys() == {"W3Linear"}
    head = graph["linears"][-1]
    assert (head["node"], head["scheme"], head["group_size"]) == ("lm_head", "w8a16", 0)
    model = onnx.load(exported(8) / PLUGIN.file_name)
    node = next(node for node in model.graph.node if node.name == "lm_head")
    made = {name: each for each in model.graph.node for name in each.output}
    cast = made[node.input[1]]
    weight = made[cast.input[0]]
    constants = {each.name: each for each in model.graph.initializer}
    assert (node.op_type, cast.op_type, weight.op_type) == ("MatMul", "Cast", "DequantizeLinear")
    codes = onnx.numpy_helper.to_array(constants[weight.input[0]])
    assert codes.dtype == np.int8
    assert codes.shape == (128, 64)
    assert check_same_weights(exported(8) / PLUGIN.file_name, checkpoint(8)) == 7 * 2


def test_the_plugin_graph_answers_as_its_reference(tmp_path: Path) -> None:
    twin = write_twin(exported(4) / PLUGIN.file_name, tmp_path / "twin.onnx")
    form = replace(TRT, lowering="reference")
    plain = decoders.write_decoder(checkpoint(4), form, tmp_path / "plain.onnx")
    for call in CALLS[:2]:
        feeds = call.feeds(oracle(4))
        found, wanted = (decoders.graph_run(path, feeds, form, slots=256) for path in (twin, plain))
        np.testing.assert_array_equal(found[ops.LOGITS], wanted[ops.LOGITS])


def test_the_embedding_graph_keeps_the_table() -> None:
    graph = onnx.load(exported(4) / "embed_tokens_fp16.onnx").graph
    (table,) = (onnx.numpy_helper.to_array(each) for each in graph.initializer)
    wanted = tiny_model().module.get_submodule(FAMILY.embed).get_parameter("weight").numpy()
    assert np.array_equal(table, wanted.astype(np.float16))


def test_a_type_that_the_head_alone_forbids_is_refused(tmp_path: Path) -> None:
    """Channels of w4a8 are written in bf16, groups of a 4-bit head are not."""
    form = replace(TRT, dtype="bf16")
    plain, headed = (
        tiny_checkpoint(
            tmp_path / str(bits), tiny_model(), scheme="w4a8", group_size=0, head_bits=bits
        )
        for bits in (16, 4)
    )
    check_forms(plain, (form,), longest=512)
    with pytest.raises(UsageError, match="Lowering qdq is not written in bf16"):
        check_forms(headed, (form,), longest=512)


_KEPT: list[TemporaryDirectory[str]] = []
