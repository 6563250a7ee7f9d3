"""`export`: a checkpoint becomes graphs."""

import json
from pathlib import Path

import pytest

from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.export import ExportRecord
from mbq_export.export.untiled import check_same_weights
from tests.command_line import run, tell


@pytest.fixture(scope="module")
def graphs(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("graphs") / "graphs"
    outcome = tell("export", bundle / "weights", "-o", out)
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["graph", "nodes", "opset", "weight", "bytes", "plugins"]
    assert lines[-1] == f"OK  export  {out}  3 graphs"
    return out


def test_graphs_are_those_of_the_build(graphs: Path, bundle: Path) -> None:
    made = {path.name: path.read_bytes() for path in graphs.iterdir() if "onnx" in path.suffix}
    assert set(made) >= {"embed_tokens.onnx", "vision_encoder.onnx_data"}
    for name, data in made.items():
        assert (bundle / "onnx" / name).read_bytes() == data, name


def test_finished_graphs_are_replaced_only_when_asked(graphs: Path, bundle: Path) -> None:
    refused = run("export", bundle / "weights", "-o", graphs)
    assert (refused.status, refused.code) == (2, "E2011")
    again = run("export", bundle / "weights", "--lowering", "reference", "-o", graphs, "--force")
    assert again.status == 0
    assert [
        graph["form"]["lowering"] for graph in again.document["result"]["graphs"] if graph["form"]
    ] == ["reference"]
    assert not (graphs / "decoder_model_merged_qdq_ort.onnx").exists()


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (["--lowering", "woven"], "E2001", "Unknown lowering 'woven'."),
        (["--lowering", "plugin"], "E2002", "ONNX Runtime has no plugins, only TensorRT."),
        (
            ["--runtime", "trt", "--lowering", "qdq", "--dtype", "bf16"],
            "E2002",
            "Lowering qdq is not written in bf16.",
        ),
        (
            ["--runtime", "trt", "--lowering", "plugin,auto"],
            "E2002",
            "Two graphs would have the same file name",
        ),
        (["--lowering", "qdq,qdq"], "E2002", "Two graphs would have the same file name"),
        (["--runtime", "tvm"], "E2001", "Unknown target 'tvm'."),
        (["--runtime", "trt", "--dtype", "fp32"], "E2002", "A graph for TensorRT cannot be fp32."),
        (["--dtype", "bf16"], "E2002", "Lowering qdq is not written in bf16."),
        (["--dtype", "int8"], "E2001", "Unknown dtype 'int8'."),
        (["--kv", "paged"], "E2001", "Unknown kv 'paged'."),
        (["--logits", "none"], "E2001", "Unknown logits 'none'."),
        (["--op-level", "opset19"], "E2001", "Unknown op level 'opset19'."),
        (["--op-level", "opset20", "--kv", "static"], "E2002", "Op level opset20 has no static"),
        (["--op-level", "opset23", "--kv", "static"], "E2002", "has no static cache"),
        (["--max-context", "513"], "E2009", "longer than the model's 512"),
        (["--max-context", "0"], "E2003", "(got '0')"),
    ],
)
def test_form_that_does_not_exist_is_refused_and_nothing_is_written(
    bundle: Path, tmp_path: Path, line: list[str], code: str, words: str
) -> None:
    outcome = run("export", bundle / "weights", *line, "-o", tmp_path / "graphs")
    assert (outcome.status, outcome.code) == (2, code)
    assert words in outcome.document["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_bundle_in_place_of_its_checkpoint_is_pointed_out(bundle: Path, tmp_path: Path) -> None:
    outcome = run("export", bundle, "-o", tmp_path / "graphs")
    assert (outcome.status, outcome.code) == (4, "E4001")
    assert outcome.document["error"]["fix"] == [f"use {bundle / 'weights'}"]


def test_graphs_do_not_go_into_the_checkpoint(bundle: Path) -> None:
    outcome = tell("export", bundle / "weights", "-o", bundle / "weights" / "graphs")
    assert outcome.status == 2
    assert "lies in" in outcome.err.splitlines()[-1]
    assert not (bundle / "weights" / "graphs").exists()


@pytest.fixture(scope="module")
def plugins(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs for TensorRT in every form but the reference."""
    out = tmp_path_factory.mktemp("plugins") / "graphs"
    line = ["--lowering", "auto,qdq", "--runtime", "trt", "--logits", "last"]
    outcome = tell("export", bundle / "weights", *line, "-o", out)
    assert outcome.status == 0, outcome.err
    return out


def test_plugins_come_first_for_tensorrt_and_are_all_named(plugins: Path) -> None:
    record = ExportRecord.read(plugins)
    graph = record.graph("decoder_model_merged_plugin_fp16.onnx")
    layers = {linear.node for linear in graph.linears if linear.scheme != "none"}
    assert graph.plugin_layers.keys() == {"W3Linear"}
    assert set(graph.plugin_layers["W3Linear"]) == layers
    assert (len(layers), graph.nodes["mbq::W3Linear"]) == (4 * 2, 4 * 2)
    assert graph.layouts == {"w3t": 1}
    assert record.graph("decoder_model_merged_qdq_trt_fp16.onnx").plugin_layers == {}
    assert {each.dtype for each in record.graphs} == {"fp16"}


def test_tiles_of_an_exported_graph_are_the_checkpoint(plugins: Path, bundle: Path) -> None:
    checkpoint = QuantCheckpoint.open(bundle / "weights")
    path = plugins / "decoder_model_merged_plugin_fp16.onnx"
    assert check_same_weights(path, checkpoint) == len(checkpoint.linears) == 7 * 2


def test_inspect_counts_nodes_and_expected_plugins(plugins: Path) -> None:
    found = run("inspect", plugins).document["result"]
    rows = {row["graph"]: row["plugins"] for row in found["graphs"]}
    assert rows["decoder_model_merged_plugin_fp16.onnx"] == 8
    assert rows["decoder_model_merged_qdq_trt_fp16.onnx"] == 0
    assert len(found["expected_plugin_layers"]) == 8
    graph = tell("inspect", plugins / "decoder_model_merged_plugin_fp16.onnx").out
    assert "W3Linear 8" in graph


def test_both_16_bit_types_are_written_side_by_side(bundle: Path, tmp_path: Path) -> None:
    line = ["--lowering", "plugin", "--runtime", "trt", "--dtype", "bf16", "--kv", "concat"]
    outcome = run("export", bundle / "weights", *line, "-o", tmp_path / "graphs")
    assert outcome.status == 0, outcome.document
    names = [graph["file"] for graph in outcome.document["result"]["graphs"]]
    assert names == [
        "embed_tokens_bf16.onnx",
        "decoder_model_merged_plugin_bf16.onnx",
        "vision_encoder_bf16.onnx",
    ]


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_checkpoint_goes_out_to_others_and_comes_back_unchanged(
    bundle: Path, tmp_path: Path, form: str
) -> None:
    sent = tell("export", bundle / "weights", "--to", form, "-o", tmp_path / "out")
    assert sent.status == 0, sent.err
    assert sent.out == f"OK  export  {tmp_path / 'out'}  {form}, 14 linears\n"
    taken = tell("quantize", "--model", tmp_path / "out", "-o", tmp_path / "back")
    assert taken.status == 0, taken.err
    assert "w3a16 g64, imported" in taken.out
    shard = "model-00001-of-00001.safetensors"
    assert (tmp_path / "back" / shard).read_bytes() == (bundle / "weights" / shard).read_bytes()
    again = run("export", bundle / "weights", "--to", form, "-o", tmp_path / "out")
    assert (again.status, again.code) == (2, "E2011")


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (("--to", "awq"), "E2006", "awq cannot hold this checkpoint: it has w3a16 g64."),
        (("--to", "hqq"), "E2001", "Unknown format 'hqq'."),
        (("--to", "gptq", "--dtype", "fp16"), "E2002", "--to gptq contradicts --dtype."),
        (("--to", "gptq", "--runtime", "trt"), "E2002", "--to gptq contradicts --runtime."),
    ],
)
def test_what_cannot_go_out_leaves_nothing(
    bundle: Path, tmp_path: Path, line: tuple[str, ...], code: str, said: str
) -> None:
    outcome = run("export", bundle / "weights", *line, "-o", tmp_path / "out")
    assert (outcome.status, outcome.code) == (2, code)
    assert outcome.document["error"]["message"] == said
    assert list(tmp_path.iterdir()) == []


def test_codes_of_others_need_no_scales_and_nothing_else_may_be_chosen(
    model: Path, bundle: Path, tmp_path: Path
) -> None:
    assert tell("export", bundle / "weights", "--to", "gptq", "-o", tmp_path / "out").status == 0
    scales = ("--scales", bundle / "calibration")
    for line, code in (
        (("quantize", "--model", tmp_path / "out", *scales), "E4009"),
        (("quantize", "--model", tmp_path / "out", "--wbits", "4"), "E2002"),
        (("quantize", "--model", model), "E2003"),
        (("quantize", "--model", bundle / "weights"), "E4009"),
        (("calibrate", "--model", tmp_path / "out"), "E4009"),
    ):
        assert run(*line, "-o", tmp_path / "x").code == code, line
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_build_from_codes_of_others_passes_the_gates_with_the_same_graphs(
    bundle: Path, tmp_path: Path
) -> None:
    """The gates compare ONNX Runtime with the model's own code on dequantized weights."""
    assert tell("export", bundle / "weights", "--to", "gptq", "-o", tmp_path / "out").status == 0
    line = ("--model", tmp_path / "out", "--target", "cpu", "-o", tmp_path / "bundle")
    outcome = tell("build", *line)
    assert outcome.status == 0, outcome.err
    for graph in (bundle / "onnx").glob("*.onnx*"):
        other = tmp_path / "bundle" / "onnx" / graph.name
        assert other.read_bytes() == graph.read_bytes(), graph.name
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["gates"]
    assert all(gate["pass"] for gate in manifest["gates"])
    assert manifest["quant"]["method"]["name"] == "imported"
