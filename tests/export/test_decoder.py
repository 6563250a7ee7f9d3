"""The written decoder against the torch decoder of the same checkpoint: rungs 2 and 3 of the parity ladder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from mbq_export.backends.ort import open_graph
from mbq_export.errors import FormatError
from mbq_export.evaluate.taps import tapped_graph, torch_values
from mbq_export.evaluate.tolerances import BLOCK_FP16, BLOCK_FP32, LOWERING_FP32
from mbq_export.export import GraphForm, decoder, ops
from mbq_export.export.profile import OPSET23
from tests.export import decoders
from tests.export.decoders import CALLS, Call
from tests.export.one_linear import relative_error

REFERENCE = GraphForm(lowering="reference")
QDQ = GraphForm()
STATIC = GraphForm(kv="static", max_context=32)
HALF = GraphForm(dtype="fp16")
TRT = GraphForm(target="trt", dtype="fp16", kv="static", max_context=32)
SCHEMES = (("w3a16", 64), ("w3a16", 128), ("w4a16", 32), (None, 64))


def worst_error(
    path: Path, form: GraphForm, scheme: tuple[str | None, int], calls: tuple[Call, ...] = CALLS
) -> float:
    """Largest relative error of logits and cache, pads left out."""
    model, worst = decoders.oracle(*scheme), 0.0
    for call in calls:
        feeds = call.feeds(model)
        wanted = decoders.torch_run(model, feeds)
        found = decoders.graph_run(path, feeds, form)
        assert found[ops.LOGITS].dtype == np.float32
        mask = feeds[ops.ATTENTION_MASK].numpy()
        for name, value in wanted.items():
            rows = (decoders.compared(name, each, mask) for each in (found[name], value))
            worst = max(worst, relative_error(*rows))
    return worst


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_qdq_graph_computes_what_torch_computes(
    scheme: tuple[str | None, int], tmp_path: Path
) -> None:
    path = decoders.write_decoder(decoders.checkpoint(*scheme), QDQ, tmp_path / "g.onnx")
    assert worst_error(path, QDQ, scheme) <= BLOCK_FP32


@pytest.mark.parametrize("scheme", [("w3a16", 64), ("w4a16", 32)], ids=str)
@pytest.mark.parametrize("fuse", [True, False])
def test_reference_graph_computes_what_torch_computes(
    scheme: tuple[str, int], tmp_path: Path, *, fuse: bool
) -> None:
    path = decoders.write_decoder(
        decoders.checkpoint(*scheme), REFERENCE, tmp_path / "g.onnx", fuse=fuse
    )
    assert worst_error(path, REFERENCE, scheme) <= BLOCK_FP32


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_static_cache_computes_what_the_growing_one_computes(
    scheme: tuple[str | None, int], tmp_path: Path
) -> None:
    path = decoders.write_decoder(decoders.checkpoint(*scheme), STATIC, tmp_path / "g.onnx")
    assert worst_error(path, STATIC, scheme) <= BLOCK_FP32


@pytest.mark.parametrize("form", [HALF, TRT], ids=["qdq_ort", "qdq_trt"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_fp16_graph_stays_within_its_rounding(
    form: GraphForm, scheme: tuple[str | None, int], tmp_path: Path
) -> None:
    path = decoders.write_decoder(decoders.checkpoint(*scheme), form, tmp_path / "g.onnx")
    assert worst_error(path, form, scheme) <= BLOCK_FP16


@pytest.mark.parametrize("scheme", [("w3a16", 64), ("w4a16", 64)], ids=str)
def test_lowerings_agree(scheme: tuple[str, int], tmp_path: Path) -> None:
    call, model = CALLS[0], decoders.oracle(*scheme)
    feeds = call.feeds(model)
    logits = []
    for form in (REFERENCE, QDQ):
        path = decoders.write_decoder(decoders.checkpoint(*scheme), form, tmp_path / form.file_name)
        logits.append(decoders.graph_run(path, feeds, form)[ops.LOGITS])
    assert relative_error(logits[0], logits[1]) <= LOWERING_FP32


def test_last_position_is_all_that_the_short_form_returns(tmp_path: Path) -> None:
    call, model = CALLS[1], decoders.oracle()
    feeds = call.feeds(model)
    last = GraphForm(logits="last")
    every = decoders.write_decoder(decoders.checkpoint(), QDQ, tmp_path / "all.onnx")
    short = decoders.write_decoder(decoders.checkpoint(), last, tmp_path / "last.onnx")
    found = decoders.graph_run(short, feeds, last)[ops.LOGITS]
    wanted = decoders.graph_run(every, feeds, QDQ)[ops.LOGITS][:, -1:]
    assert found.shape == wanted.shape
    assert relative_error(found, wanted) <= LOWERING_FP32


def test_a_pad_never_makes_anything_infinite(tmp_path: Path) -> None:
    feeds = Call(batch=2, tokens=6, past=0, pads=5).feeds(decoders.oracle())
    path = decoders.write_decoder(decoders.checkpoint(), QDQ, tmp_path / "g.onnx")
    for name, value in decoders.graph_run(path, feeds, QDQ).items():
        assert np.isfinite(value).all(), name


def test_pads_do_not_change_the_row_beside_them(tmp_path: Path) -> None:
    model = decoders.oracle()
    path = decoders.write_decoder(decoders.checkpoint(), QDQ, tmp_path / "g.onnx")
    feeds = Call(batch=2, tokens=6, past=0, pads=4).feeds(model)
    alone = {name: value[:1, 4:] if value.ndim == 3 else value[:1] for name, value in feeds.items()}
    alone |= {name: feeds[name][:1, 4:] for name in (ops.ATTENTION_MASK, ops.POSITION_IDS)}
    padded = decoders.graph_run(path, feeds, QDQ)[ops.LOGITS][:1, 4:]
    assert relative_error(padded, decoders.graph_run(path, alone, QDQ)[ops.LOGITS]) <= BLOCK_FP32


def test_ports_are_those_of_the_contract(tmp_path: Path) -> None:
    for form in (QDQ, STATIC):
        path = decoders.write_decoder(decoders.checkpoint(), form, tmp_path / f"{form.kv}.onnx")
        graph = onnx.load(path, load_external_data=False).graph
        static = form.kv == "static"
        assert tuple(port.name for port in graph.input) == ops.decoder_inputs(2, static=static)
        assert tuple(port.name for port in graph.output) == ops.decoder_outputs(2)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("lowering", ["reference", "qdq"])
def test_values_that_tools_tap_have_their_names(
    lowering: str, tmp_path: Path, *, fuse: bool
) -> None:
    form = GraphForm(lowering=lowering)
    path = decoders.write_decoder(decoders.checkpoint(), form, tmp_path / "g.onnx", fuse=fuse)
    graph = onnx.load(path, load_external_data=False).graph
    values = {name for node in graph.node for name in node.output}
    roles = [path.rpartition(".")[2] for path in decoders.FAMILY.linears]
    for layer in range(2):
        assert {ops.linear_output(layer, role) for role in roles} <= values
        assert {ops.linear_input(layer, role) for role in roles} <= values
        assert ops.hidden_value(layer) in values
    assert "norm.out" in values


def test_tapped_values_are_those_of_torch(tmp_path: Path) -> None:
    """One linear per place in a block, fused ones by their columns; bias included."""
    model = decoders.oracle()
    names = [ops.linear_output(1, role) for role in ("q_proj", "v_proj", "o_proj", "up_proj")]
    names += [
        ops.linear_input(1, "down_proj"),
        ops.hidden_value(0),
        ops.hidden_value(1),
        "norm.out",
    ]
    path = decoders.write_decoder(decoders.checkpoint(), QDQ, tmp_path / "g.onnx")
    feeds = Call(batch=1, tokens=6, past=0).feeds(model)
    with torch_values(model.module, model.family, names) as wanted:
        decoders.torch_run(model, feeds)
    with open_graph(path, threads=1, proto=tapped_graph(path, names)) as engine:
        found = engine.run({name: value.numpy() for name, value in feeds.items()})
    for name in names:
        assert relative_error(found[name][0], wanted[name]) <= BLOCK_FP32, name


def test_fused_block_has_as_many_nodes_as_the_template() -> None:
    model = decoder.decoder_graph(
        decoders.checkpoint(), family=decoders.FAMILY, form=REFERENCE, profile=OPSET23
    )
    names = [str(node.name) for node in model.graph if str(node.name).startswith("layers.1.")]
    assert len(names) == 30  # 7 linears, 3 biases, 2 norms, 6 for heads, 2 rotations, 10 others


@pytest.mark.parametrize(("name", "value"), [("activation", "gelu"), ("qk_norm", True)])
def test_decoder_of_another_kind_is_refused(name: str, value: object) -> None:
    shape = decoders.FAMILY.text_shape
    other = replace(
        decoders.FAMILY, text_shape=lambda config: replace(shape(config), **{name: value})
    )
    with pytest.raises(FormatError, match=f"A decoder with {name} = {value!r} cannot be exported"):
        decoder.decoder_graph(decoders.checkpoint(), family=other, form=QDQ, profile=OPSET23)
