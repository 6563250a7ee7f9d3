"""A whole export of the sample model: what lies in the folder, and that it answers as torch does."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from numpy.typing import NDArray

from mbq_export.backends.ort import open_graph
from mbq_export.backends.torch import fake_quant_model
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import FormatError, InternalError, UsageError
from mbq_export.export import (
    ExportRecord,
    GraphForm,
    Limits,
    check_graph,
    decoder,
    export,
    linear_nodes,
    ops,
)
from mbq_export.export import check as check_module
from mbq_export.export.profile import profile_for
from mbq_export.families.base import ANSWER, LoadedModel
from mbq_export.families.inputs import ModelInputs
from mbq_export.quantize import quantize
from mbq_export.schemes import SCHEMES
from mbq_export.tensor_file import TensorFile
from tests.export import decoders
from tests.export.decoders import FAMILY
from tests.questions import questions, sample_model

REFERENCE = GraphForm(lowering="reference")
QDQ = GraphForm()
TRT = GraphForm(target="trt", dtype="fp16", kv="static", logits="last", max_context=256)
PLUGIN = replace(TRT, lowering="plugin")
STEPS = 24


@dataclass(frozen=True)
class Exported:
    """The sample model, rounded to 3 bits, and its graphs."""

    checkpoint: QuantCheckpoint
    folder: Path
    record: ExportRecord
    reports: list[tuple[int, int, str]]


@pytest.fixture(scope="module")
def exported() -> Iterator[Exported]:
    """Export once, in every form."""
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
        reports: list[tuple[int, int, str]] = []
        record = export(
            checkpoint,
            Path(root) / "onnx",
            family=FAMILY,
            forms=(QDQ, REFERENCE, TRT, PLUGIN),
            progress=lambda done, total, note="": reports.append((done, total, note)),
        )
        yield Exported(checkpoint, Path(root) / "onnx", record, reports)


GRAPHS = (
    "embed_tokens.onnx",
    "embed_tokens_fp16.onnx",
    "decoder_model_merged_qdq_ort.onnx",
    "decoder_model_merged_reference.onnx",
    "decoder_model_merged_qdq_trt_fp16.onnx",
    "decoder_model_merged_plugin_fp16.onnx",
    "vision_encoder.onnx",
    "vision_encoder_fp16.onnx",
)


def test_folder_holds_the_graphs_their_data_and_the_record(exported: Exported) -> None:
    found = {path.name for path in exported.folder.iterdir()}
    data = {f"{name}_data" for name in GRAPHS}
    assert found == {*GRAPHS, *data, "mbq_export.json", "host_tensors.safetensors"}


def test_progress_names_every_graph(exported: Exported) -> None:
    assert exported.reports == [(n + 1, 8, name) for n, name in enumerate(GRAPHS)]


def test_record_on_disk_is_the_returned_one(exported: Exported) -> None:
    assert ExportRecord.read(exported.folder) == exported.record


def test_record_holds_the_hash_of_every_file(exported: Exported) -> None:
    for graph in exported.record.graphs:
        assert set(graph.sha256) == {graph.file, *graph.data}
        for name, digest in graph.sha256.items():
            content = (exported.folder / name).read_bytes()
            assert hashlib.sha256(content).hexdigest() == digest


def test_record_lists_every_linear_once_in_columns_without_gaps(exported: Exported) -> None:
    graph = exported.record.graph(QDQ.file_name)
    modules = [part.module for node in graph.linears for part in node.parts]
    assert sorted(modules) == sorted([*exported.checkpoint.linears, "lm_head"])
    for node in graph.linears:
        ends = [0, *(part.rows[1] for part in node.parts)]
        assert [part.rows[0] for part in node.parts] == ends[:-1]
        assert ends[-1] == node.n
    schemes = {node.node: (node.scheme, node.group_size) for node in graph.linears}
    assert schemes["layers.0.qkv_proj"] == ("w3a16", 128)
    assert schemes["lm_head"] == ("none", 0)


@pytest.mark.parametrize("form", [QDQ, REFERENCE, TRT, PLUGIN], ids=lambda form: form.variant)
def test_every_linear_of_the_record_is_a_node_of_the_graph(
    form: GraphForm, exported: Exported
) -> None:
    graph = onnx.load(exported.folder / form.file_name, load_external_data=False).graph
    operators = {node.name: node.op_type for node in graph.node}
    for linear in exported.record.graph(form.file_name).linears:
        assert operators[linear.node] in {"MatMul", "W3Linear"}


def test_record_describes_cache_attention_and_limits(exported: Exported) -> None:
    trt = exported.record.graph(TRT.file_name)
    assert (trt.opset, trt.attention_layers, trt.kv_updates) == (24, 5, 10)
    assert trt.form == TRT
    qdq = exported.record.graph(QDQ.file_name)
    assert (qdq.opset, qdq.attention_layers, qdq.kv_updates) == (23, 5, 0)
    assert qdq.form is not None
    assert qdq.form.max_context == 512, "the model's own limit"
    vision = exported.record.graph("vision_encoder.onnx")
    assert (vision.attention_layers, vision.form) == (3, None)


def test_weights_of_a_decoder_are_counted_to_the_byte(exported: Exported) -> None:
    graph = exported.record.graph(QDQ.file_name)
    packed = sum(node.n * node.k // 2 for node in graph.linears if node.scheme != "none")
    scales = sum(node.n * node.k // 128 * 4 for node in graph.linears if node.scheme != "none")
    head = 64 * 256 * 4
    small = graph.weight_bytes - packed - scales - head
    assert 0 < small < 150_000, "norms, biases, rotary tables and shapes"


def test_host_tensor_is_the_learned_end_of_a_row(exported: Exported) -> None:
    stored = TensorFile(exported.folder / "host_tensors.safetensors").array("image_newline")
    np.testing.assert_array_equal(stored, exported.checkpoint.tensor("model.image_newline"))
    assert exported.record.host_tensors == {"image_newline": (256,)}


@pytest.mark.parametrize("form", [QDQ, REFERENCE, TRT, PLUGIN], ids=lambda form: form.variant)
def test_graphsurgeon_reads_and_writes_every_lowering_unchanged(
    form: GraphForm, exported: Exported
) -> None:
    """Users cut graphs with it: the domain, 4-bit constants, attributes and order must survive."""
    before = onnx.load(exported.folder / form.file_name)
    after = gs.export_onnx(gs.import_onnx(before))
    key = [(node.op_type, node.domain, node.name) for node in before.graph.node]
    assert [(node.op_type, node.domain, node.name) for node in after.graph.node] == key
    types = {tensor.name: tensor.data_type for tensor in after.graph.initializer}
    assert {t.name: t.data_type for t in before.graph.initializer}.items() <= types.items()


def merged(
    inputs: ModelInputs, features: NDArray[np.floating], exported: Exported
) -> NDArray[np.floating]:
    """Embeddings with image rows in their places: the rule ``replace_rows``."""
    checkpoint = exported.checkpoint
    rows = FAMILY.merge_images(
        features,
        image_sizes=inputs.image_sizes,
        tiles_per_image=inputs.tiles_per_image,
        newline=checkpoint.tensor("model.image_newline"),
        config=checkpoint.config,
    )
    with open_graph(exported.folder / "embed_tokens.onnx", threads=1) as embed:
        embeds = embed.run({ops.INPUT_IDS: inputs.input_ids[None]})[ops.INPUTS_EMBEDS].copy()
    embeds[0, inputs.input_ids == checkpoint.config["image_token_index"]] = rows
    return embeds


def greedy(inputs: ModelInputs, form: GraphForm, exported: Exported) -> list[int]:
    """The most likely tokens, one by one, in numpy around the three graphs."""
    folder, config = exported.folder, exported.checkpoint.config["text_config"]
    with open_graph(folder / "vision_encoder.onnx", threads=1) as vision:
        features = vision.run({ops.PIXEL_VALUES: inputs.pixel_values})[ops.IMAGE_FEATURES]
    embeds = merged(inputs, features, exported)
    heads, width = (
        config["num_key_value_heads"],
        config["hidden_size"] // config["num_attention_heads"],
    )
    names = ops.decoder_inputs(config["num_hidden_layers"], static=False)[3:]
    cache = {name: np.zeros((1, heads, 0, width), np.float32) for name in names}
    table = exported.checkpoint.tensor("model.language_model.embed_tokens.weight").astype(
        np.float32
    )
    tokens: list[int] = []
    with open_graph(folder / form.file_name, threads=1) as decoder:
        while len(tokens) < STEPS and config["eos_token_id"] not in tokens:
            past, new = cache[names[0]].shape[2], embeds.shape[1]
            found = decoder.run(
                {
                    ops.INPUTS_EMBEDS: embeds,
                    ops.ATTENTION_MASK: np.ones((1, past + new), np.int64),
                    ops.POSITION_IDS: np.arange(past, past + new)[None],
                    **cache,
                }
            )
            tokens.append(int(found[ops.LOGITS][0, -1].argmax()))
            cache = {name: found[name.replace("past_key_values", "present")] for name in names}
            embeds = table[tokens[-1]][None, None]
    return tokens


def generated(inputs: ModelInputs, model: LoadedModel) -> list[int]:
    """What transformers answers with the same weights."""
    prompt = torch.from_numpy(inputs.input_ids)[None]
    with torch.no_grad():
        found = model.module.generate(  # type: ignore[operator]
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            pixel_values=torch.from_numpy(inputs.pixel_values)[None],
            image_sizes=torch.from_numpy(inputs.image_sizes),
            do_sample=False,
            max_new_tokens=STEPS,
        )
    return [int(token) for token in found[0, prompt.shape[1] :]]


def test_graphs_answer_with_the_tokens_of_torch(exported: Exported) -> None:
    model = fake_quant_model(exported.checkpoint)
    for sample in questions(model, 6):
        prompt = without_answer(sample)
        wanted = generated(prompt, model)
        assert len(wanted) > 1
        assert greedy(prompt, QDQ, exported) == wanted
        assert greedy(prompt, REFERENCE, exported) == wanted


def without_answer(inputs: ModelInputs) -> ModelInputs:
    """The same sample up to where the model begins to speak."""
    length = int((inputs.token_classes == ANSWER).argmax())
    return replace(
        inputs,
        input_ids=inputs.input_ids[:length],
        token_classes=inputs.token_classes[:length],
    )


def test_baseline_without_codes_has_plain_linears(tmp_path: Path) -> None:
    model = decoder.decoder_graph(
        decoders.checkpoint(None), family=FAMILY, form=QDQ, profile=profile_for(QDQ)
    )
    linears = linear_nodes(model)
    assert len(linears) == 2 * 7 + 1
    assert {(linear.scheme, linear.group_size) for linear in linears} == {("none", 0)}
    path = decoders.write_decoder(decoders.checkpoint(None), QDQ, tmp_path / "g.onnx")
    graph = check_graph(path, Limits(allowed=profile_for(QDQ).ops)).graph
    assert "DequantizeLinear" not in {node.op_type for node in graph.node}


def test_finished_export_is_not_replaced(exported: Exported) -> None:
    with pytest.raises(UsageError) as caught:
        export(exported.checkpoint, exported.folder, family=FAMILY, forms=(QDQ,))
    assert caught.value.code == "E2011"


def test_two_graphs_of_one_name_are_refused_before_anything_is_written(
    exported: Exported, tmp_path: Path
) -> None:
    forms = (QDQ, GraphForm(kv="static"))
    with pytest.raises(UsageError, match="Two graphs would have the same file name"):
        export(exported.checkpoint, tmp_path / "onnx", family=FAMILY, forms=forms)
    assert list(tmp_path.iterdir()) == []


def test_unknown_lowering_names_the_known_ones(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        export(
            exported.checkpoint,
            tmp_path / "onnx",
            family=FAMILY,
            forms=(GraphForm(lowering="plug"),),
        )
    assert (caught.value.code, caught.value.why) == ("E2001", "known: plugin, qdq, reference")
    assert list(tmp_path.iterdir()) == []


def test_graph_that_fails_its_checks_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise FormatError("E4407", "Something is wrong.", why="a test", fix="none")

    monkeypatch.setattr(check_module, "check_constants", refuse)
    with pytest.raises(FormatError, match="Something is wrong"):
        export(decoders.checkpoint(), tmp_path / "onnx", family=FAMILY, forms=(QDQ,))
    assert not (tmp_path / "onnx").exists()


def test_wrong_contract_of_a_written_graph_is_a_bug_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mbq_export.export.ports_of", lambda _values: ())
    with pytest.raises(InternalError):
        export(decoders.checkpoint(), tmp_path / "onnx", family=FAMILY, forms=(QDQ,))


EXPORT_ONCE = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.export import GraphForm, export
from mbq_export.families import FAMILIES
torch.set_num_threads(1)
trt = GraphForm(target="trt", dtype="fp16", kv="static")
forms = (GraphForm(), GraphForm(lowering="reference"), trt, replace(trt, lowering="plugin"))
checkpoint = QuantCheckpoint.open(Path(sys.argv[1]))
export(checkpoint, Path(sys.argv[2]), family=FAMILIES["llava_onevision"], forms=forms)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    hashes = []
    for seed in ("1", "2"):
        out = tmp_path / seed / "onnx"
        out.parent.mkdir()
        subprocess.run(
            [sys.executable, "-c", EXPORT_ONCE, str(decoders.checkpoint().folder), str(out)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        hashes.append(
            {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
        )
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 18
