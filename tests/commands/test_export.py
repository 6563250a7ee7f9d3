"""`export`: a checkpoint becomes graphs."""

from pathlib import Path

import pytest

from tests.command_line import run, tell


@pytest.fixture(scope="module")
def graphs(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("graphs") / "graphs"
    outcome = tell("export", bundle / "weights", "-o", out)
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["graph", "nodes", "opset", "weight", "bytes"]
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
        (["--lowering", "plugin"], "E2001", "Unknown lowering 'plugin'."),
        (["--lowering", "qdq,qdq"], "E2002", "Two graphs would have the same file name"),
        (["--runtime", "tvm"], "E2001", "Unknown target 'tvm'."),
        (["--runtime", "trt", "--dtype", "fp32"], "E2002", "A graph for TensorRT cannot be fp32."),
        (["--dtype", "bf16"], "E2001", "Unknown dtype 'bf16'."),
        (["--kv", "paged"], "E2001", "Unknown kv 'paged'."),
        (["--logits", "none"], "E2001", "Unknown logits 'none'."),
        (["--op-level", "opset20"], "E2002", "Graphs of op level opset20 are not written yet."),
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
