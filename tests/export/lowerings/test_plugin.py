"""Graphs for plugins hold the checkpoint's weights in tiles, and compute what the reference graph computes."""

import json
import re
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mbq_export.errors import UsageError
from mbq_export.evaluate.tolerances import BLOCK_FP16, PARITY_ROUNDED_FP16
from mbq_export.export import GraphForm, Limits, check_graph, ops, tiled_weights
from mbq_export.export.graph import Emitter, packed_node, packed_nodes
from mbq_export.export.lowerings import LOWERINGS
from mbq_export.export.lowerings.plugin import LOWERING
from mbq_export.export.packed_contract import attributes_of
from mbq_export.export.profile import OPSET23, OPSET24
from mbq_export.export.save import save_graph
from mbq_export.export.tiled_weights import tiles_tensor
from mbq_export.export.untiled import check_same_weights, plugin_weights
from mbq_export.export.weights import PackedSource, plain_tensor
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL, PackedWeight
from tests.export import decoders
from tests.export.decoders import CALLS
from tests.export.one_linear import (
    Shelf,
    one_node,
    packed,
    random_packed,
    random_symmetric,
    relative_error,
    source_of,
)
from tests.export.plugin_twin import write_twin
from tests.export.test_weights import written

RNG = np.random.default_rng(31)
PLUGIN = GraphForm(lowering="plugin", target="trt", dtype="fp16", kv="static", max_context=32)
TRT = Limits(target="trt", allowed=OPSET24.ops)


@dataclass(frozen=True)
class Case:
    """A weight of some scheme and what its node must say."""

    name: str
    scheme: str
    n: int
    k: int
    group_size: int
    shapes: dict[str, list[int]]

    @property
    def weight(self) -> PackedWeight:
        sizes = {"n": self.n, "k": self.k, "group_size": self.group_size}
        if self.scheme == "w4a8":
            return random_symmetric(RNG, **sizes)
        return random_packed(RNG, bits=SCHEMES[self.scheme].weight_bits, **sizes)


CASES = (
    Case("w3 whole tiles", "w3a16", 32, 256, 128,
         {"qweight": [2, 2, 192], "scales": [2, 2, 8, 2], "zeros": [2, 2, 2]}),
    Case("w3 rows and columns that end inside a tile", "w3a16", 24, 192, 64,
         {"qweight": [2, 2, 192], "scales": [2, 4, 8, 2], "zeros": [2, 4, 2]}),
    Case("w4 in groups of 32", "w4a16", 16, 160, 32,
         {"qweight": [1, 2, 256], "scales": [1, 8, 8, 2], "zeros": [1, 8, 2]}),
    Case("w4a8 per channel", "w4a8", 40, 136, CHANNEL,
         {"qweight": [3, 2, 256], "scales": [48]}),
    Case("w4a8 in groups", "w4a8", 16, 256, 128,
         {"qweight": [1, 2, 256], "scales": [1, 2, 8, 2]}),
)  # fmt: skip


def write(model: ir.Model, folder: Path) -> Path:
    path = folder / "plugin.onnx"
    save_graph(model, path)
    return path


def one_plugin(case: Case, weight: PackedWeight, *, dtype: str = "fp16") -> ir.Model:
    return one_node(weight, lowering="plugin", target="trt", dtype=dtype, scheme=case.scheme)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_node_names_its_sizes_and_reads_whole_tiles(
    case: Case, dtype: str, tmp_path: Path
) -> None:
    path = write(one_plugin(case, case.weight, dtype=dtype), tmp_path)
    model = check_graph(path, TRT)
    (node,), op = model.graph.node, ops.OPS[case.scheme]
    assert attributes_of(node) == {
        "N": case.n, "K": case.k, "group_size": case.group_size, "bits": op.bits,
        "signed_codes": int(op.symmetric), "layout": op.tiles, "layout_version": 1,
        "has_bias": 0, "epilogue": 0, "act_bits": op.act_bits, "row_order": 0,
        "plugin_namespace": "mbq", "plugin_version": "1",
    }  # fmt: skip
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    assert shapes == {f"linear.{port}_tiles": dims for port, dims in case.shapes.items()}
    assert (node.name, node.op_type, node.domain) == ("linear", op.name, "mbq")
    y = model.graph.output[0].type.tensor_type
    assert (
        y.elem_type == {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[dtype]
    )
    assert y.shape.dim[-1].dim_value == case.n, "padding stays inside the constants"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_tiles_of_a_file_are_the_weight(case: Case, tmp_path: Path) -> None:
    weight = case.weight
    ((_, found),) = plugin_weights(write(one_plugin(case, weight), tmp_path))
    np.testing.assert_array_equal(found.words, weight.words)
    np.testing.assert_array_equal(found.scales, weight.scales)
    assert found.scales.dtype == weight.scales.dtype
    if weight.zeros is not None:
        np.testing.assert_array_equal(found.zeros, weight.zeros)  # type: ignore[arg-type]


def test_four_bit_codes_without_zero_points_get_the_middle(tmp_path: Path) -> None:
    weight = packed(RNG.integers(0, 16, (16, 128)), bits=4, group_size=128, zeros=None)
    model = one_node(weight, lowering="plugin", target="trt", dtype="fp16")
    ((_, found),) = plugin_weights(write(model, tmp_path))
    assert found.zeros is not None
    assert found.zeros.tolist() == [[8]] * 16


def test_stacked_linears_of_any_block_size_are_the_tiles_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = {
        name: random_packed(RNG, n=n, k=128, bits=3, group_size=128)
        for name, n in (("a", 48), ("b", 16))
    }
    sources = [PackedSource.of(Shelf(parts), name) for name in parts]  # type: ignore[arg-type]
    stacked = sources[0].stacked(sources[1])
    whole = replace(
        parts["a"],
        **{
            field: np.concatenate([getattr(part, field) for part in parts.values()])
            for field in ("words", "scales", "zeros")
        },
    )
    wanted = written(tiles_tensor("q", source_of(whole)))
    monkeypatch.setattr(tiled_weights, "ROWS_AT_ONCE", 32)
    assert written(tiles_tensor("q", stacked)) == wanted


def test_tiles_are_made_some_rows_at_a_time() -> None:
    """Twelve bytes per weight of `ROWS_AT_ONCE` rows, whatever the number of rows."""
    weight = packed(np.zeros((8192, 512)), bits=3, group_size=128)
    tensor = tiles_tensor("q", source_of(weight))
    tracemalloc.start()
    written(tensor)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole = 8192 * 512
    assert peak < 16 * 1024 * 512 + 3 * tensor.nbytes < 12 * whole


def test_a_bias_becomes_the_last_input(tmp_path: Path) -> None:
    g = Emitter(profile=OPSET23, dtype="fp16")
    weight = random_packed(RNG, n=16, k=128, bits=3, group_size=128)
    x, rows = g.input("x", [1, "rows", 128]), g.value("linear.rows", [1, "rows", 16])
    g.append(packed_node(g.constant, x, name="linear", source=source_of(weight), out=rows))
    bias = plain_tensor("linear.bias", lambda: np.arange(16.0), shape=(16,), dtype=g.dtype)
    y = g.op("Add", [rows, g.constant(bias)], g.value("y", [1, "rows", 16]), name="linear.add_bias")
    model = g.model("biased", [y])
    LOWERING.lower(model, "trt")
    (node,) = check_graph(write(model, tmp_path), TRT).graph.node
    assert (node.input[-1], node.output[0], attributes_of(node)["has_bias"]) == (
        "linear.bias",
        "y",
        1,
    )


def test_an_addition_that_others_read_around_stays() -> None:
    """The sum without the bias is read elsewhere, so it must still exist."""
    g = Emitter(profile=OPSET23, dtype="fp16")
    weight = random_packed(RNG, n=16, k=128, bits=3, group_size=128)
    x, rows = g.input("x", [1, "rows", 128]), g.value("linear.rows", [1, "rows", 16])
    g.append(packed_node(g.constant, x, name="linear", source=source_of(weight), out=rows))
    bias = g.constant(plain_tensor("b", lambda: np.ones(16), shape=(16,), dtype=g.dtype))
    y = g.op("Add", [rows, bias], g.value("y", [1, "rows", 16]), name="linear.add_bias")
    z = g.op("Sigmoid", [rows], g.value("z", [1, "rows", 16]))
    model = g.model("shared", [y, z])
    LOWERING.lower(model, "trt")
    assert [node.op_type for node in model.graph] == ["W3Linear", "Add", "Sigmoid"]


@pytest.fixture(
    scope="module",
    params=[("w3a16", 64), ("w4a16", 32), ("w4a8", CHANNEL), ("w4a8", 128)],
    ids=str,
)
def scheme(request: pytest.FixtureRequest) -> tuple[str, int]:
    return request.param  # type: ignore[no-any-return]


def test_a_decoder_holds_four_plugins_per_block_and_names_them(
    scheme: tuple[str, int], tmp_path: Path
) -> None:
    path = decoders.write_decoder(decoders.checkpoint(*scheme), PLUGIN, tmp_path / "g.onnx")
    model = check_graph(path, TRT)
    op = ops.OPS[scheme[0]].name
    layers = decoders.oracle(*scheme).text.layers
    roles = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    names = [f"layers.{layer}.{role}" for layer in range(layers) for role in roles]
    plugins = [node for node in model.graph.node if node.domain == ops.DOMAIN]
    assert [node.name for node in plugins] == names
    assert {node.op_type for node in plugins} == {op}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["mbq.plugin_layers"]) == {op: names}
    assert not model.functions
    assert not any("bias" in node.name for node in model.graph.node), "every bias is inside"
    following = {
        node.input[0]: node.op_type for node in model.graph.node if node.op_type == "Split"
    }
    assert set(following) == {
        node.output[0] for node in plugins if "qkv" in node.name or "gate" in node.name
    }


def test_twenty_eight_blocks_would_be_112_plugins() -> None:
    """FORMATS 10: four nodes per block, counted in the graph of fewer blocks."""
    source = decoders.checkpoint("w3a16", 64)
    model = decoders.decoder.decoder_graph(
        source, family=decoders.FAMILY, form=PLUGIN, profile=OPSET24
    )
    unfused = len(packed_nodes(model))
    decoders.PASSES["fuse_projections"].run(model)
    layers = decoders.oracle("w3a16", 64).text.layers
    assert (unfused * 28 // layers, len(packed_nodes(model)) * 28 // layers) == (196, 112)


def test_parts_that_end_inside_a_tile_stay_apart(tmp_path: Path) -> None:
    weights = {
        name: random_packed(RNG, n=n, k=128, bits=3, group_size=128)
        for name, n in (("q", 16), ("k", 8))
    }
    g = Emitter(profile=OPSET23, dtype="fp16")
    x = g.input("x", [1, "rows", 128])
    outs = []
    for name, weight in weights.items():
        out = g.value(f"{name}.out", [1, "rows", weight.n])
        g.append(packed_node(g.constant, x, name=name, source=source_of(weight, name), out=out))
        outs.append(out)
    model = g.model("parts", outs)
    (reason,) = decoders.PASSES["fuse_projections"].run(model)
    LOWERING.lower(model, "trt")
    assert reason == "q, k: k has a number of rows that is no multiple of 16"
    found = {node.name: weight.n for node, weight in plugin_weights(write(model, tmp_path))}
    assert found == {"q": 16, "k": 8}


def test_the_reference_function_on_the_tiles_gives_the_reference_graphs_numbers(
    scheme: tuple[str, int], tmp_path: Path
) -> None:
    """Both run the same bodies on ONNX Runtime, so whatever differs would be a constant or a connection."""
    source = decoders.checkpoint(*scheme)
    plugin = decoders.write_decoder(source, PLUGIN, tmp_path / "plugin.onnx")
    twin = write_twin(plugin, tmp_path / "twin.onnx")
    form = replace(PLUGIN, lowering="reference")
    reference = decoders.write_decoder(source, form, tmp_path / "reference.onnx")
    model = decoders.oracle(*scheme)
    for call in CALLS:
        feeds = call.feeds(model)
        found = decoders.graph_run(twin, feeds, form)
        for name, wanted in decoders.graph_run(reference, feeds, form).items():
            np.testing.assert_array_equal(found[name], wanted, err_msg=name)
        torch = decoders.torch_run(model, feeds)[ops.LOGITS]
        mask = feeds[ops.ATTENTION_MASK].numpy()
        rows = (decoders.compared(ops.LOGITS, each, mask) for each in (found[ops.LOGITS], torch))
        rounded = SCHEMES[scheme[0]].rounds_activations
        limit = PARITY_ROUNDED_FP16.relative_error if rounded else BLOCK_FP16
        assert limit is not None
        assert relative_error(*rows) <= limit


def test_the_twin_shows_a_plugin_that_reads_other_weights(tmp_path: Path) -> None:
    """The comparison above must be able to fail: one flipped bit of one tile."""
    source = decoders.checkpoint("w3a16", 64)
    plugin = decoders.write_decoder(source, PLUGIN, tmp_path / "plugin.onnx")
    model = decoders.oracle("w3a16", 64)
    feeds = CALLS[0].feeds(model)
    form = replace(PLUGIN, lowering="reference")
    before = decoders.graph_run(write_twin(plugin, tmp_path / "a.onnx"), feeds, form)[ops.LOGITS]
    flip(plugin, "layers.0.down_proj.qweight_tiles")
    after = decoders.graph_run(write_twin(plugin, tmp_path / "b.onnx"), feeds, form)[ops.LOGITS]
    assert not np.array_equal(before, after)


def flip(path: Path, name: str) -> None:
    """Flip the lowest bit of an external constant's first byte."""
    model = onnx.load(path, load_external_data=False)
    tensor = next(each for each in model.graph.initializer if each.name == name)
    offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
    with path.with_name(f"{path.name}_data").open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_weights_are_compared_with_the_checkpoint_part_by_part(
    scheme: tuple[str, int], tmp_path: Path
) -> None:
    source = decoders.checkpoint(*scheme)
    path = decoders.write_decoder(source, PLUGIN, tmp_path / "g.onnx")
    assert check_same_weights(path, source) == len(source.linears)
    flip(path, "layers.1.gate_up_proj.qweight_tiles")
    with pytest.raises(
        Exception, match=r"other codes than model\.language_model\.layers\.1\.mlp\.gate_proj"
    ) as caught:
        check_same_weights(path, source)
    assert caught.value.code == "E4415"  # type: ignore[attr-defined]
    assert caught.value.where == ["g.onnx", "layers.1.gate_up_proj"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_both_caches_and_types_pass_every_check_of_ours(dtype: str, tmp_path: Path) -> None:
    for kv in ("concat", "static"):
        form = replace(PLUGIN, dtype=dtype, kv=kv)
        path = decoders.write_decoder(decoders.checkpoint(), form, tmp_path / f"{kv}.onnx")
        model = check_graph(path, TRT)
        types = {tensor.data_type for tensor in model.graph.initializer if "_tiles" in tensor.name}
        assert types == {onnx.TensorProto.INT32, onnx.TensorProto.FLOAT16}


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = [
        decoders.write_decoder(decoders.checkpoint(), PLUGIN, tmp_path / name / "g.onnx")
        for name in ("a", "b")
        if not (tmp_path / name).mkdir()  # type: ignore[func-returns-value]
    ]
    for suffix in ("", "_data"):
        first, second = (path.with_name(f"g.onnx{suffix}").read_bytes() for path in paths)
        assert first == second


def test_columns_that_kernels_cannot_read_are_refused_with_the_node() -> None:
    weight = replace(random_symmetric(RNG, n=16, k=128), k=124)
    with pytest.raises(UsageError, match="124 columns") as caught:
        one_node(weight, lowering="plugin", target="trt", dtype="fp16", scheme="w4a8")
    assert (caught.value.code, caught.value.where) == ("E2004", ["linear"])


def test_onnx_runtime_and_schemes_without_an_operator_are_refused_with_the_reason() -> None:
    for name in ops.PLUGINS:
        assert LOWERING.supports(SCHEMES[name], "trt") is None
        assert (
            LOWERING.supports(SCHEMES[name], "ort") == "ONNX Runtime has no plugins, only TensorRT"
        )
    w2a16 = replace(SCHEMES["w3a16"], name="w2a16", weight_bits=2)
    assert LOWERING.supports(w2a16, "trt") == "there is no mbq operator for w2a16"
    for name in ops.OPS.keys() - ops.PLUGINS:
        reason = f"there is no plugin for {name}, whose engines are built from the qdq lowering"
        assert LOWERING.supports(SCHEMES[name], "trt") == reason


def test_the_form_is_16_bits_wide_and_its_file_is_named_after_no_runtime() -> None:
    assert LOWERING.dtypes == ("fp16", "bf16")
    assert PLUGIN.file_name == "decoder_model_merged_plugin_fp16.onnx"
    assert replace(PLUGIN, dtype="bf16").file_name == "decoder_model_merged_plugin_bf16.onnx"
    assert set(LOWERINGS.members()) == {"plugin", "qdq", "reference"}


def test_plugin_layers_are_sorted_by_operator_and_keep_the_order_of_the_graph() -> None:
    nodes = [("W4A16Linear", "z"), ("W3Linear", "b"), ("W3Linear", "a")]
    assert list(ops.plugin_layers(nodes).items()) == [
        ("W3Linear", ["b", "a"]),
        ("W4A16Linear", ["z"]),
    ]
    assert ops.plugin_layers([]) == {}


def test_names_of_plugins_are_no_operators_of_onnx() -> None:
    """A plugin of such a name would be used only with a flag that other versions lack."""
    for op in ops.OPS.values():
        assert not onnx.defs.has(op.name)
        assert re.fullmatch(r"W\dA?\d*Linear", op.name)
