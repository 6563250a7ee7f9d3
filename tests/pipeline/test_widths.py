"""Widths of units from a request to graphs and engines: refused early, and computed as the checkpoint says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbq_export.backends.ort import open_graph
from mbq_export.backends.torch import fake_quant_model
from mbq_export.calibrate import Recipe, calibrate
from mbq_export.calibrate.methods import METHODS
from mbq_export.channel_scales import FOR_WIDTHS
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import UsageError
from mbq_export.evaluate.describe import describe
from mbq_export.export import ExportRecord, ops
from mbq_export.export.lowerings import LOWERINGS
from mbq_export.families import FAMILIES
from mbq_export.pipeline.continuing import continued_plan
from mbq_export.pipeline.engine_options import EngineOptions
from mbq_export.pipeline.engines import build_engines, engine_facts
from mbq_export.pipeline.plan import make_plan
from mbq_export.pipeline.request import BuildRequest
from mbq_export.pipeline.stages import build
from mbq_export.pipeline.widths import check_widths, width_facts, width_row
from mbq_export.progress import silent
from mbq_export.quantize.widths import SCHEME_OF, MixedBits
from mbq_export.schemes import SCHEMES
from tests.backends import plugin_graphs
from tests.pipeline.test_engines import export_rounded
from tests.pipeline.test_stages import Ear
from tests.questions import questions, tiny_model
from tests.tiny import Tiny, write_tiny

DOWN = MixedBits(patterns=(("mlp.down_proj", 4),))
SAME_NUMBERS = 1e-5
"""Two blocks in float32, summed in another order."""


def request(mixed: MixedBits, **changes: Any) -> BuildRequest:
    return BuildRequest(model="m", out=Path("o"), mixed=mixed, **changes)


def checked(mixed: MixedBits, **changes: Any) -> None:
    text = tiny_model().text
    check_widths(
        request(mixed, **changes),
        SCHEMES["w3a16"],
        group_size=64,
        family=FAMILIES["llava_onevision"],
        text=text,
    )


def test_patterns_and_budgets_are_checked_before_anything_is_computed() -> None:
    checked(MixedBits())
    checked(MixedBits(avg_bits=3.3))
    with pytest.raises(UsageError, match="matches no linear"):
        checked(MixedBits(patterns=(("layers.9.*", 4),)))
    with pytest.raises(UsageError, match="--bytes-budget 1000 is out of reach"):
        checked(MixedBits(bytes_budget=1000))


def test_scales_of_others_come_without_what_a_budget_is_spent_by() -> None:
    with pytest.raises(UsageError, match="--import-scales does not go with a budget") as caught:
        checked(MixedBits(avg_bits=3.3), import_scales=Path("s"))
    assert caught.value.code == "E2002"
    checked(DOWN, import_scales=Path("s"))


def test_codes_of_others_keep_their_widths(tmp_path: Path) -> None:
    class Foreign:
        """Stands for an opened checkpoint of another project: only its names are read."""

        folder = tmp_path / "theirs"
        format = FAMILIES["llava_onevision"]

    with pytest.raises(UsageError, match="Widths of units contradict theirs"):
        check_widths(
            request(DOWN),
            SCHEMES["w4a16"],
            group_size=64,
            family=FAMILIES["llava_onevision"],
            text=tiny_model().text,
            foreign=Foreign(),
        )


def test_a_plan_tells_the_average_with_its_scales_and_a_fingerprint_what_was_asked() -> None:
    w3 = SCHEMES["w3a16"]
    assert width_row(request(MixedBits()), w3, 128) == ("3.156", "w3a16 g128")
    told = width_row(request(MixedBits(avg_bits=3.3)), w3, 128)
    assert told == ("3.456", "w3a16 g128, mixed with 4 bits")
    assert width_facts(request(MixedBits())) == {}
    assert width_facts(request(DOWN))["mixed"]["bits"] == [["mlp.down_proj", 4]]


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_gradients_for_widths_change_nothing_that_a_method_finds(method: str) -> None:
    model = tiny_model()
    recipe = Recipe(scheme=SCHEMES["w3a16"], group_size=64, switches=METHODS[method].switches)
    inputs = questions(model, 3)
    plain = calibrate(model, inputs, recipe)
    found = calibrate(model, inputs, replace(recipe, for_widths=True))
    assert plain.sensitivity == {}
    assert set(found.sensitivity) == {FOR_WIDTHS}
    assert len(found.sensitivity[FOR_WIDTHS]["layers"]) == model.text.layers
    assert found.calib == plain.calib
    assert found.scales.keys() == plain.scales.keys()
    assert all(np.array_equal(found.scales[name], plain.scales[name]) for name in plain.scales)


@pytest.mark.parametrize("lowering", LOWERINGS.names())
@pytest.mark.parametrize("target", ["ort", "trt"])
def test_formats_that_can_be_mixed_have_the_same_forms(lowering: str, target: str) -> None:
    """The form for engines is chosen by the first of them."""
    form = LOWERINGS[lowering]
    schemes = [SCHEMES[name] for name in SCHEME_OF.values()]
    assert len({form.supports(scheme, target) is None for scheme in schemes}) == 1
    for dtype in form.dtypes:
        assert len({form.misfit(scheme, target, dtype) is None for scheme in schemes}) == 1


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny model with units of both widths, its gates left out for their time."""
    root = tmp_path_factory.mktemp("mixed")
    model = write_tiny(root / "model", Tiny(tied=False, walks=True))
    asked = BuildRequest(
        model=str(model),
        out=root / "bundle",
        group_size=64,
        data="builtin:shapes",
        samples=4,
        targets=("cpu",),
        mixed=MixedBits(avg_bits=3.5),
        gate="off",
        gate_reason="the test below compares the graphs itself",
    )
    build(asked, Ear())
    return asked.out


def test_graphs_of_both_widths_compute_what_the_torch_oracle_does(mixed: Path) -> None:
    checkpoint = QuantCheckpoint.open(mixed / "weights")
    oracle = fake_quant_model(checkpoint)
    text = oracle.text
    embeds = np.random.default_rng(0).standard_normal((1, 7, text.hidden)).astype(np.float32)
    with torch.no_grad():
        module = oracle.module
        decoder = module.get_submodule("model.language_model")
        states = decoder(inputs_embeds=torch.from_numpy(embeds), use_cache=False)[0]
        wanted = module.get_submodule("lm_head")(states).numpy()
    names = ops.decoder_inputs(text.layers, static=False)[3:]
    empty = np.zeros((1, text.kv_heads, 0, text.head_dim), np.float32)
    record = ExportRecord.read(mixed / "onnx")
    graphs = [graph for graph in record.graphs if graph.form is not None]
    assert {graph.form.lowering for graph in graphs if graph.form} == {"qdq", "reference"}
    for graph in graphs:
        assert {linear.scheme for linear in graph.linears} >= {"w3a16", "w4a16"}
        assert not graph.declined  # q, k, v have one width, and become one node
        with open_graph(mixed / "onnx" / graph.file, threads=1) as session:
            found = session.run(
                {
                    ops.INPUTS_EMBEDS: embeds,
                    ops.ATTENTION_MASK: np.ones((1, 7), np.int64),
                    ops.POSITION_IDS: np.arange(7)[None],
                    **dict.fromkeys(names, empty),
                }
            )[ops.LOGITS]
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert error <= SAME_NUMBERS


def test_a_bundle_of_both_widths_says_so_everywhere(mixed: Path) -> None:
    manifest = json.loads((mixed / "manifest.json").read_text())
    assert manifest["quant"]["scheme"]["name"] == "w3a16+w4a16"
    found = {unit["bits"] for unit in manifest["quant"]["mixed"]["units"]}
    assert found == {3, 4}
    facts = describe(mixed).facts
    assert facts["scheme"] == "w3a16+w4a16"
    assert "bits on average" in facts["widths"]
    tables = {table.title: table for table in describe(mixed / "weights").tables}
    assert len(tables["widths of units"].rows) == 8
    checkpoint = QuantCheckpoint.open(mixed / "weights")
    assert {record.scheme.name for record in checkpoint.records.values()} == {"w3a16", "w4a16"}


def test_engines_can_be_planned_from_a_bundle_of_both_widths(mixed: Path, tmp_path: Path) -> None:
    asked = BuildRequest(
        model="", bundle=mixed, first="export", out=tmp_path / "out", targets=("rtx4090:rtx",)
    )
    plan = continued_plan(asked)
    assert plan.scheme is not None
    assert plan.scheme.name == "w3a16"


@pytest.mark.trt
@pytest.mark.nvcc
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_engine_holds_every_planned_plugin_of_both_widths(tmp_path: Path) -> None:
    exported = export_rounded(
        tmp_path,
        mixed=DOWN,
        lowering="plugin",
        targets=("rtx4090:rtx",),
        engines=EngineOptions(plugin_lib=plugin_graphs.library().path),
    )
    (decoder,) = [graph for graph in exported.record.graphs if graph.form is not None]
    assert decoder.scheme == "w3a16+w4a16"
    (tmp_path / "engines").mkdir()
    build_engines(
        exported.plan,
        exported.record,
        onnx=exported.onnx,
        out=tmp_path / "engines",
        logs=tmp_path / "logs",
        progress=silent,
    )
    (facts,) = engine_facts(tmp_path / "engines")
    engine = facts["engines"]["decoder"]
    assert [check["name"] for check in engine["checks"] if not check["pass"]] == []
    assert engine["plugin_layers_expected"] == {"W3Linear": 15, "W4A16Linear": 5}
    assert engine["plugin_layers_found"] == {"W3Linear": 15, "W4A16Linear": 5}


def test_a_whole_plan_takes_a_mixture_by_name(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model")
    asked = BuildRequest(
        model=str(model),
        out=tmp_path / "out",
        group_size=64,
        data="builtin:shapes",
        samples=2,
        targets=("cpu",),
        mixed=DOWN,
    )
    plan = make_plan(asked)
    assert plan.fingerprint["quant"]["mixed"]["bits"] == [["mlp.down_proj", 4]]
    assert plan.table()[0][3] == "w3a16 g64, mixed with other widths, mbq"
