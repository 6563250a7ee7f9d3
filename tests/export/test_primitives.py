"""Decoders of the lower op levels: the same numbers, from operators that the level's oldest parser documents.

First what is spelled out, against the formulas in numpy; then whole decoders, against torch and the highest level.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from mbq_export.backends.ort import open_graph
from mbq_export.errors import FormatError
from mbq_export.evaluate.tolerances import BLOCK_FP16, BLOCK_FP32, LOWERING_FP32, OP_FP16, OP_FP32
from mbq_export.export import GraphForm, Limits, check_graph, export, ops
from mbq_export.export.graph import BOOL, Emitter
from mbq_export.export.parser_ops import read_by
from mbq_export.export.primitives import spelled_attention, spelled_norm, visible_by_group
from mbq_export.export.profile import OPSET20, OPSET23, OPSET23_ATTENTION, OpProfile, profile_for
from mbq_export.export.save import save_graph
from tests.export import decoders
from tests.export.decoders import CALLS, Call
from tests.export.one_linear import relative_error
from tests.export.plugin_twin import write_twin
from tests.export.test_decoder import worst_error

WIDE_HEADS = replace(
    decoders.FAMILY.text_shape(decoders.checkpoint().config), heads=6, kv_heads=2, head_dim=8
)
TOLERANCES = {"fp32": OP_FP32, "fp16": OP_FP16}


def computed(
    g: Emitter, out: ir.Value, path: Path, **feeds: NDArray[np.generic]
) -> NDArray[np.generic]:
    save_graph(g.model("one", [out]), path)
    with open_graph(path, threads=1) as engine:
        return engine.run(feeds)[str(out.name)]


def drawn(*shape: int, dtype: str, seed: int, size: float = 1.0) -> NDArray[np.floating]:
    wide = np.random.default_rng(seed).standard_normal(shape) * size
    return wide.astype(np.float16 if dtype == "fp16" else np.float32)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 3e3])
def test_norm_is_its_formula_and_does_not_overflow(dtype: str, size: float, tmp_path: Path) -> None:
    """Squares of 3e3 are beyond fp16, so they must not be computed in it."""
    g = Emitter(profile=OPSET20, dtype=dtype)
    x, weight = drawn(2, 5, 16, dtype=dtype, seed=0, size=size), drawn(16, dtype=dtype, seed=1)
    value = g.input("x", ["b", "t", 16])
    scale = g.input("w", [16])
    out = spelled_norm(g, value, scale, g.value("y", ["b", "t", 16]), name="norm", epsilon=1e-6)
    found = computed(g, out, tmp_path / "g.onnx", x=x, w=weight)
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * weight
    assert relative_error(found, wanted) <= TOLERANCES[dtype]


def attention(q: NDArray, k: NDArray, v: NDArray, visible: NDArray) -> NDArray[np.float64]:
    """The formula, head by head: (B, T, Hkv, R, D)."""
    batch, heads, tokens, width = q.shape
    each = heads // k.shape[1]
    found = np.zeros((batch, tokens, k.shape[1], each, width))
    for b in range(batch):
        for h in range(heads):
            scores = q[b, h].astype(np.float64) @ k[b, h // each].T / np.sqrt(width)
            scores[~visible[b, 0]] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            found[b, :, h // each, h % each] = weights @ v[b, h // each]
    return found


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_attention_is_its_formula_for_grouped_heads(dtype: str, tmp_path: Path) -> None:
    g = Emitter(profile=OPSET20, dtype=dtype)
    q = drawn(2, 6, 3, 8, dtype=dtype, seed=2, size=3.0)
    k, v = (drawn(2, 2, 7, 8, dtype=dtype, seed=seed) for seed in (3, 4))
    visible = np.random.default_rng(5).random((2, 1, 3, 7)) < 0.5
    visible[..., 0] = True
    mask = g.input("visible", [ops.BATCH, 1, ops.SEQUENCE, ops.TOTAL], dtype=BOOL)
    inputs = [g.input("q", [ops.BATCH, 6, ops.SEQUENCE, 8])]
    inputs += [g.input(name, [ops.BATCH, 2, ops.TOTAL, 8]) for name in "kv"]
    by_group = visible_by_group(g, mask)
    out = spelled_attention(g, "a", WIDE_HEADS, qkv=tuple(inputs), visible=by_group)
    found = computed(g, out, tmp_path / "g.onnx", q=q, k=k, v=v, visible=visible)
    assert relative_error(found, attention(q, k, v, visible)) <= TOLERANCES[dtype]


LEVELS = (OPSET20, OPSET23_ATTENTION)
"""Below the one that all other tests write."""
SCHEMES = (("w3a16", 64), ("w4a16", 32), (None, 64))
PACKED = ("w3a16", 64)


def form_of(level: OpProfile, **fields: object) -> GraphForm:
    return replace(GraphForm(op_level=level.name, max_context=32), **fields)  # type: ignore[arg-type]


@pytest.fixture(params=LEVELS, ids=lambda level: level.name)
def level(request: pytest.FixtureRequest) -> OpProfile:
    found: OpProfile = request.param
    return found


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_standard_operators_compute_what_torch_computes(
    level: OpProfile, scheme: tuple[str | None, int], tmp_path: Path
) -> None:
    """Prefill and decode over a cache, batches with pads, grouped queries, biases of q, k and v."""
    form = form_of(level)
    path = decoders.write_decoder(decoders.checkpoint(*scheme), form, tmp_path / "g.onnx")
    assert worst_error(path, form, scheme) <= BLOCK_FP32


@pytest.mark.parametrize("target", ["ort", "trt"])
def test_half_precision_stays_within_its_rounding(
    level: OpProfile, target: str, tmp_path: Path
) -> None:
    form = form_of(level, target=target, dtype="fp16")
    path = decoders.write_decoder(decoders.checkpoint(*PACKED), form, tmp_path / "g.onnx")
    assert worst_error(path, form, PACKED) <= BLOCK_FP16


def test_levels_agree_with_the_highest(level: OpProfile, tmp_path: Path) -> None:
    model = decoders.oracle(*PACKED)
    forms = form_of(level, lowering="reference"), form_of(OPSET23, lowering="reference")
    paths = [
        decoders.write_decoder(decoders.checkpoint(*PACKED), form, tmp_path / f"{index}.onnx")
        for index, form in enumerate(forms)
    ]
    for call in CALLS:
        feeds = call.feeds(model)
        low, high = (
            decoders.graph_run(path, feeds, form) for path, form in zip(paths, forms, strict=True)
        )
        mask = feeds[ops.ATTENTION_MASK].numpy()
        for name in high:
            rows = [decoders.compared(name, each[name], mask) for each in (low, high)]
            assert relative_error(*rows) <= LOWERING_FP32, (str(call), name)


def test_plugins_sit_in_the_same_graph(level: OpProfile, tmp_path: Path) -> None:
    """Each plugin replaced by the reference function on its own tiles gives the reference graph's numbers."""
    source = decoders.checkpoint(*PACKED)
    form = form_of(level, lowering="plugin", target="trt", dtype="fp16")
    plain = replace(form, lowering="reference")
    plugin = decoders.write_decoder(source, form, tmp_path / "plugin.onnx")
    twin = write_twin(plugin, tmp_path / "twin.onnx")
    reference = decoders.write_decoder(source, plain, tmp_path / "reference.onnx")
    for call in CALLS:
        feeds = call.feeds(decoders.oracle(*PACKED))
        found = decoders.graph_run(twin, feeds, plain)
        for name, wanted in decoders.graph_run(reference, feeds, plain).items():
            np.testing.assert_array_equal(found[name], wanted, err_msg=name)


FORMS = [
    *((scheme, "qdq") for scheme in (*SCHEMES, ("w4a8", 0))),
    *((scheme, "plugin") for scheme in (("w3a16", 64), ("w4a16", 32), ("w4a8", 0))),
]


@pytest.mark.parametrize(("scheme", "lowering"), FORMS, ids=str)
def test_every_node_is_one_that_the_levels_first_parser_documents(
    level: OpProfile, scheme: tuple[str | None, int], lowering: str, tmp_path: Path
) -> None:
    form = form_of(level, lowering=lowering, target="trt", dtype="fp16", logits="last")
    profile = profile_for(form, packed=scheme[0] is not None)
    source = decoders.checkpoint(*scheme)
    model = decoders.decoder.decoder_graph(
        source, family=decoders.FAMILY, form=form, profile=profile
    )
    decoders.PASSES["fuse_projections"].run(model)
    decoders.LOWERINGS[lowering].lower(model, "trt")
    path = tmp_path / "g.onnx"
    decoders.save_graph(model, path)
    graph = check_graph(path, Limits(target="trt", allowed=profile.ops)).graph
    standard = {node.op_type for node in graph.node if node.domain != ops.DOMAIN}
    assert standard <= read_by(profile.first)
    assert ("Attention" in standard) == (level is OPSET23_ATTENTION)


def test_only_blocks_of_codes_go_beyond_opset_20() -> None:
    """The list of 10.0 ends at opset 20; 4-bit constants in blocks came with 21."""
    for lowering, packed, wanted in (
        ("plugin", True, 20),
        ("qdq", False, 20),
        ("qdq", True, 21),
        ("reference", True, 20),
    ):
        form = form_of(OPSET20, lowering=lowering)
        assert profile_for(form, packed=packed).opset == wanted


def test_no_pad_makes_anything_infinite(level: OpProfile, tmp_path: Path) -> None:
    feeds = Call(batch=2, tokens=6, past=0, pads=5).feeds(decoders.oracle())
    for dtype in ("fp32", "fp16"):
        form = form_of(level, dtype=dtype)
        path = decoders.write_decoder(decoders.checkpoint(), form, tmp_path / f"{dtype}.onnx")
        for name, value in decoders.graph_run(path, feeds, form).items():
            assert np.isfinite(value).all(), name


def test_cache_that_begins_with_a_hidden_slot_gives_the_same_logits(
    level: OpProfile, tmp_path: Path
) -> None:
    """An engine's past is never empty: it begins with one position that nobody sees, and grows call by call."""
    model = decoders.oracle()
    path = decoders.write_decoder(decoders.checkpoint(), form_of(level), tmp_path / "g.onnx")
    whole = Call(batch=1, tokens=7, past=0).feeds(model)
    wanted = decoders.torch_run(model, whole)[ops.LOGITS]
    names = ops.decoder_inputs(model.text.layers, static=False)[3:]
    shape = (1, model.text.kv_heads, 1, model.text.head_dim)
    cache = {name: torch.full(shape, 9.0) for name in names}
    found = []
    for start, end in ((0, 4), (4, 5), (5, 7)):
        mask = torch.ones(1, 1 + end, dtype=torch.int64)
        mask[:, 0] = 0
        feeds = {
            ops.INPUTS_EMBEDS: whole[ops.INPUTS_EMBEDS][:, start:end],
            ops.ATTENTION_MASK: mask,
            ops.POSITION_IDS: torch.arange(start, end)[None],
        }
        outputs = decoders.graph_run(path, {**feeds, **cache}, form_of(level))
        found.append(outputs[ops.LOGITS])
        cache = {
            name: torch.from_numpy(outputs[name.replace("past_key_values", "present")])
            for name in names
        }
    assert relative_error(np.concatenate(found, axis=1), wanted) <= BLOCK_FP32


def test_bfloat16_passes_every_check(level: OpProfile, tmp_path: Path) -> None:
    form = form_of(level, lowering="plugin", target="trt", dtype="bf16")
    path = decoders.write_decoder(decoders.checkpoint(), form, tmp_path / "g.onnx")
    graph = check_graph(path, Limits(target="trt", allowed=level.ops)).graph
    scale = [each for each in graph.initializer if each.name == "attention.scale"]
    assert [each.data_type for each in scale] == [onnx.TensorProto.BFLOAT16] * (level is OPSET20)


PLUGIN_20 = form_of(OPSET20, lowering="plugin", target="trt", dtype="fp16", logits="last")


def test_whole_export_keeps_to_the_level(tmp_path: Path) -> None:
    """Vision and embedding are read by the same parser as the decoder."""
    source = decoders.checkpoint(*PACKED)
    record = export(source, tmp_path / "onnx", family=decoders.FAMILY, forms=(PLUGIN_20,))
    assert {graph.opset for graph in record.graphs} == {20}
    nodes = {op for graph in record.graphs for op in graph.nodes if "::" not in op}
    assert nodes <= read_by(OPSET20.first)
    decoder = record.graph(PLUGIN_20.file_name)
    assert (decoder.attention_layers, decoder.kv_updates) == (0, 0)
    assert decoder.form == PLUGIN_20
    assert sum(map(len, decoder.plugin_layers.values())) == 8


def test_tower_beyond_the_parser_is_refused_with_its_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mbq_export.export.read_by", lambda first: read_by(first) - {"Gelu"})
    source = decoders.checkpoint(*PACKED)
    with pytest.raises(FormatError, match="Operator Gelu is above the op level") as caught:
        export(source, tmp_path / "onnx", family=decoders.FAMILY, forms=(PLUGIN_20,))
    assert caught.value.code == "E4408"
    assert caught.value.where[0] == "vision_encoder_fp16.onnx"
    assert not (tmp_path / "onnx").exists()
