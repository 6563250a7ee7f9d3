"""Fusing leaves the function as it is, and leaves alone what it may not fuse."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mbq_export.export import GraphForm, decoder, ops
from mbq_export.export.graph import packed_nodes, packed_source
from mbq_export.export.passes.fuse_projections import fuse
from mbq_export.export.profile import OPSET23
from tests.export import decoders
from tests.export.decoders import CALLS


def unfused() -> ir.Model:
    return decoder.decoder_graph(
        decoders.checkpoint(),
        family=decoders.FAMILY,
        form=GraphForm(lowering="reference"),
        profile=OPSET23,
    )


def names(model: ir.Model) -> list[str]:
    return [str(node.name) for node in packed_nodes(model)]


def test_projections_of_one_input_become_one_node() -> None:
    model = unfused()
    assert fuse(model) == []
    assert names(model)[:4] == [
        "layers.0.qkv_proj",
        "layers.0.o_proj",
        "layers.0.gate_up_proj",
        "layers.0.down_proj",
    ]
    assert len(names(model)) == 4 * 2


def test_fused_node_lists_its_sources_in_the_order_of_its_columns() -> None:
    model = unfused()
    fuse(model)
    node = packed_nodes(model)[0]
    block = "model.language_model.layers.0.self_attn"
    assert node.metadata_props[ops.SOURCE] == f"{block}.q_proj,{block}.k_proj,{block}.v_proj"
    assert packed_source(node).row_counts == (128, 64, 64)


def test_fusing_leaves_the_result_as_it_is(tmp_path: Path) -> None:
    form, feeds = GraphForm(lowering="reference"), CALLS[0].feeds(decoders.oracle())
    results = [
        decoders.graph_run(
            decoders.write_decoder(
                decoders.checkpoint(), form, tmp_path / f"{fused}.onnx", fuse=fused
            ),
            feeds,
            form,
        )
        for fused in (False, True)
    ]
    for name, value in results[0].items():
        np.testing.assert_allclose(results[1][name], value, rtol=0, atol=2e-6 * np.abs(value).max())


def test_linears_of_different_formats_stay_apart_with_the_reason() -> None:
    model = unfused()
    node = next(node for node in packed_nodes(model) if node.name == "layers.1.up_proj")
    node.meta["mbq.packed"] = replace(packed_source(node), scheme="w4a16")
    declined = fuse(model)
    assert declined == [
        "layers.1.gate_proj, layers.1.up_proj: the linears have different number formats"
    ]
    assert {"layers.1.gate_proj", "layers.1.up_proj", "layers.0.gate_up_proj"} <= set(names(model))


def test_rows_that_fill_no_tile_stay_apart_with_the_reason() -> None:
    model = unfused()
    node = next(node for node in packed_nodes(model) if node.name == "layers.0.k_proj")
    node.meta["mbq.packed"] = replace(packed_source(node), n=40)
    assert fuse(model)[0] == (
        "layers.0.q_proj, layers.0.k_proj, layers.0.v_proj: "
        "layers.0.k_proj has a number of rows that is no multiple of 16"
    )


def test_a_group_with_some_biases_stays_apart_with_the_reason() -> None:
    model = unfused()
    k_proj = next(node for node in packed_nodes(model) if node.name == "layers.0.k_proj")
    add = k_proj.outputs[0].uses()[0].node
    ir.convenience.replace_all_uses_with(add.outputs[0], k_proj.outputs[0])
    model.graph.remove(add, safe=True)
    assert fuse(model) == [
        "layers.0.q_proj, layers.0.k_proj, layers.0.v_proj: only some of the linears have a bias"
    ]
