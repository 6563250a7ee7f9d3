"""Bytes of a decode step: by hand, and against what the graph file really holds."""

from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from mbq_export.bundle import Bundle
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.evaluate.roofline import Roofline, StepBytes, graph_step, packed_step
from mbq_export.families.base import LoadedModel
from mbq_export.runtime import DECODER, graph_record
from tests.runtime.bundles import rounded_bundle
from tests.tiny import load_tiny, tiny_checkpoint

STEP = StepBytes(counting="graph", weights=900, embedding=50, kv_per_position=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["w3a16", "w4a16", None])
def bundle(
    model: LoadedModel, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    return rounded_bundle(folder, model, scheme=request.param)


def read_bytes(path: Path) -> int:
    """Bytes of the constants that a step reads whole: everything but the tables of positions."""
    graph = onnx.load(path).graph
    sizes = {
        tensor.name: (tensor.raw_data and len(tensor.raw_data))
        or numpy_helper.to_array(tensor).nbytes
        for tensor in graph.initializer
    }
    assert any("rope" in name for name in sizes)
    return sum(size for name, size in sizes.items() if "rope" not in name)


def test_a_step_reads_weights_its_row_and_the_context() -> None:
    assert STEP.at(10) == 900 + 50 + 50


def test_the_share_is_measured_through_ideal() -> None:
    roof = Roofline(
        step=STEP, context=10, bandwidth_gb_s=1e-3, cached_gb_s=1.0, tokens_per_second=250.0
    )
    assert roof.ideal_tokens_per_second == pytest.approx(1000)
    assert roof.percent == pytest.approx(25)
    found = roof.as_json()
    assert (found["bytes_per_token"], found["counting"], found["source"]) == (
        1000,
        "graph",
        "measured",
    )


def test_without_a_decoded_token_there_is_no_share() -> None:
    roof = Roofline(
        step=STEP, context=1, bandwidth_gb_s=1.0, cached_gb_s=1.0, tokens_per_second=None
    )
    assert roof.percent is None
    assert roof.as_json()["percent_why"] == "no token was decoded"


def test_the_graph_is_counted_as_the_file_holds_it(bundle: Bundle, model: LoadedModel) -> None:
    record = graph_record(bundle, DECODER, lowering="qdq")
    step = graph_step(record, model.text, limit=model.text.max_positions)
    held = read_bytes(bundle.onnx / record["file"])
    # Scalars and shapes that graphs carry beside weights are in one count and not the other.
    assert step.weights == pytest.approx(held, abs=512)
    assert step.embedding == model.text.hidden * 4
    assert step.kv_per_position == 2 * model.text.layers * model.text.kv_heads * 32 * 4


def test_packed_bits_are_those_of_the_scheme_and_the_rest_in_halves(
    bundle: Bundle, model: LoadedModel
) -> None:
    checkpoint = QuantCheckpoint.open(bundle.checkpoint_folder)
    step = packed_step(checkpoint, model.family, model.text)
    text = model.text
    wide, narrow = text.hidden, text.kv_heads * text.head_dim
    sizes = [
        (wide, wide), (narrow, wide), (narrow, wide), (wide, wide),
        (text.intermediate, wide), (text.intermediate, wide), (wide, text.intermediate),
    ]  # fmt: skip
    weights = text.layers * sum(n * k for n, k in sizes)
    bits = {"w3a16": 3 + 20 / 64, "w4a16": 4 + 20 / 64, "none": 16}[checkpoint.scheme_name]
    biases = text.layers * (wide + 2 * narrow)
    norms = (2 * text.layers + 1) * wide
    halves = biases + norms + text.vocab * wide
    assert step.weights == int(weights * bits / 8) + 2 * halves


def test_a_head_of_codes_is_read_instead_of_the_embedding(
    model: LoadedModel, tmp_path: Path
) -> None:
    text = model.text
    steps = [
        packed_step(
            tiny_checkpoint(tmp_path / str(bits), model, head_bits=bits), model.family, text
        )
        for bits in (16, 4)
    ]
    weights = text.vocab * text.hidden
    saved = weights * 2 - weights * (4 + 20 / 128) / 8
    assert steps[0].weights - steps[1].weights == pytest.approx(saved, abs=1)


def test_the_packed_count_is_below_the_graphs(bundle: Bundle, model: LoadedModel) -> None:
    record = graph_record(bundle, DECODER, lowering="qdq")
    graph = graph_step(record, model.text, limit=model.text.max_positions)
    checkpoint = QuantCheckpoint.open(bundle.checkpoint_folder)
    packed = packed_step(checkpoint, model.family, model.text)
    assert packed.at(64) < graph.at(64)
