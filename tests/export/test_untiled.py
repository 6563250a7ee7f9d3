"""The sample model exported for plugins and read back: what it holds, costs and answers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest

from mbq_export.backends.torch import fake_quant_model
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import InternalError, UsageError
from mbq_export.export import (
    ExportRecord,
    GraphForm,
    check_forms,
    export,
    linear_nodes,
    ops,
)
from mbq_export.export.record import LinearNode
from mbq_export.export.untiled import check_same_weights
from mbq_export.quantize import quantize
from mbq_export.schemes import SCHEMES
from tests.export import decoders
from tests.export.decoders import FAMILY
from tests.export.plugin_twin import write_twin
from tests.questions import sample_model

TRT = GraphForm(target="trt", dtype="fp16", kv="static", logits="last", max_context=256)
PLUGIN = replace(TRT, lowering="plugin")


@dataclass(frozen=True)
class Exported:
    """The sample model, rounded to 3 bits, and its graphs for TensorRT."""

    checkpoint: QuantCheckpoint
    folder: Path
    record: ExportRecord


@pytest.fixture(scope="module")
def exported() -> Iterator[Exported]:
    with TemporaryDirectory() as root:
        scales = ChannelScales(
            scales={}, sensitivity={}, calib={"switches": Switches(method="rtn").resolved()}
        )
        checkpoint = quantize(
            sample_model(),
            scales,
            scheme=SCHEMES["w3a16"],
            group_size=128,
            out=Path(root) / "checkpoint",
        )
        folder = Path(root) / "onnx"
        record = export(checkpoint, folder, family=FAMILY, forms=(TRT, PLUGIN))
        yield Exported(checkpoint, folder, record)


def test_packed_linears_of_plugins_cost_what_the_format_says(exported: Exported) -> None:
    """FORMATS 8: 768 bytes of codes, 32 of scales and 8 of zero points for a tile of 16 x 128."""
    plugin, qdq = (exported.record.graph(form.file_name) for form in (PLUGIN, TRT))
    weights = sum(node.n * node.k for node in plugin.linears if node.scheme != "none")
    saved = weights // 2 + weights // 128 * 2 - weights // 2048 * (768 + 32 + 8)
    assert 0 <= qdq.weight_bytes - plugin.weight_bytes - saved < 200, "sizes of Split and the like"


def test_record_names_every_quantized_linear_as_a_plugin(exported: Exported) -> None:
    graph = exported.record.graph(PLUGIN.file_name)
    names = tuple(node.node for node in graph.linears if node.scheme != "none")
    assert graph.plugin_layers == {"W3Linear": names}
    assert len(names) == graph.nodes["mbq::W3Linear"] == 4 * 5
    assert exported.record.graph(TRT.file_name).plugin_layers == {}
    assert ExportRecord.read(exported.folder) == exported.record
    assert check_same_weights(exported.folder / PLUGIN.file_name, exported.checkpoint) == 7 * 5


def test_plugins_named_in_the_graph_are_those_of_the_record(exported: Exported) -> None:
    model = onnx.load(exported.folder / PLUGIN.file_name, load_external_data=False)
    written = {entry.key: entry.value for entry in model.metadata_props}[ops.PLUGIN_LAYERS]
    recorded = exported.record.graph(PLUGIN.file_name).plugin_layers
    assert {op: tuple(names) for op, names in json.loads(written).items()} == recorded


def test_the_sample_answers_through_its_plugin_graph_as_through_its_reference(
    exported: Exported, tmp_path: Path
) -> None:
    """The tiles that an engine gets, read by the reference function on ONNX Runtime."""
    form = replace(TRT, lowering="reference")
    twin = write_twin(exported.folder / PLUGIN.file_name, tmp_path / "twin.onnx")
    plain = decoders.write_decoder(exported.checkpoint, form, tmp_path / "plain.onnx")
    model = fake_quant_model(exported.checkpoint)
    for call in decoders.CALLS:
        feeds = call.feeds(model)
        found, wanted = (decoders.graph_run(path, feeds, form, slots=256) for path in (twin, plain))
        np.testing.assert_array_equal(found[ops.LOGITS], wanted[ops.LOGITS])


def test_a_linear_that_is_lost_while_lowering_stops_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine would lack it without a word: the plan is made before anything is rewritten."""
    lost = LinearNode(node="lost", n=16, k=128, scheme="w3a16", group_size=128, parts=())
    monkeypatch.setattr(
        "mbq_export.export.linear_nodes", lambda model: (*linear_nodes(model), lost)
    )
    with pytest.raises(InternalError, match="lost a linear"):
        export(decoders.checkpoint(), tmp_path / "onnx", family=FAMILY, forms=(PLUGIN,))
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("lowering", ["qdq", "reference"])
def test_bfloat16_is_not_written_where_it_would_round_scales(lowering: str) -> None:
    """Scales of groups are fp16: bf16 would round them, where plugins read them as they are."""
    form = replace(TRT, lowering=lowering, dtype="bf16")
    with pytest.raises(UsageError, match=f"Lowering {lowering} is not written in bf16") as caught:
        check_forms(decoders.checkpoint(), (form,), longest=512)
    assert caught.value.fix == ("--dtype fp32", "--dtype fp16")
