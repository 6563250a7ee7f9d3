"""A head of codes is rounded for the rows that decide answers, judged alone, and no longer the embedding."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from mbq_export.backends.torch import fake_quant_model
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import UsageError
from mbq_export.families.base import ANSWER, LoadedModel
from mbq_export.quantize import head as rounding
from mbq_export.quantize import quantize
from mbq_export.quantize.gptq import factorise, round_linear
from mbq_export.quantize.head import HeadFormat, divergence, head_format
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.affine import dequantize
from mbq_export.schemes.affine import quantize as nearest
from mbq_export.schemes.oracle import dequantized
from mbq_export.state import State
from tests.quantize.seen import HELD_OUT, KilledError, bytes_of, report, samples
from tests.questions import tiny_model
from tests.tiny import Tiny, random_scales

FLOAT64_RELATIVE = 1e-9
"""Sums over parts of the vocabulary in float64, one order or another."""
SAME_CODES = 0.98
"""The reference adds the Hessian up in another order: a weight beside the edge of two codes falls to either side."""


def four() -> HeadFormat:
    found = head_format(4, 128)
    assert found is not None
    return found


def scales(model: LoadedModel, *, kind: str = "gptq") -> ChannelScales:
    made = random_scales(model)
    switches = (
        Switches(method="mbq+", rounding="gptq", hessian="plain", asym=0.0)
        if kind == "gptq"
        else Switches(method="mbq", clip="group" if kind == "clip" else "none")
    )
    return ChannelScales(
        scales=made.scales, sensitivity=report(model), calib={"switches": switches.resolved()}
    )


def quantized(
    model: LoadedModel,
    out: Path,
    *,
    kind: str = "gptq",
    form: HeadFormat | None = None,
    **more: object,
) -> QuantCheckpoint:
    return quantize(
        model,
        scales(model, kind=kind),
        scheme=SCHEMES["w3a16"],
        group_size=64,
        out=out,
        head=form or four(),
        **{"samples": samples(model), **more},  # type: ignore[arg-type]
    )


@torch.no_grad()
def predicting_rows(model: LoadedModel, inputs: list) -> Tensor:  # type: ignore[type-arg]
    """What the head reads where an answer's token comes next, by the model's own forward pass."""
    rows: list[Tensor] = []
    module = model.module.get_submodule(model.family.head)
    for sample in inputs:
        seen: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        model.module(**sample.tensors(), use_cache=False)
        handle.remove()
        rows.append(seen[0][0, :-1][torch.from_numpy(sample.token_classes[1:] == ANSWER)])
    return torch.cat(rows)


@pytest.fixture(
    scope="module",
    params=[True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["tied", "untied"],
)
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return tiny_model(Tiny(tied=request.param))


@pytest.fixture(scope="module")
def checkpoint(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> QuantCheckpoint:
    return quantized(model, tmp_path_factory.mktemp("head") / "c")


def test_head_is_a_linear_of_its_own_and_the_embedding_stays(
    model: LoadedModel, checkpoint: QuantCheckpoint
) -> None:
    record = checkpoint.records["lm_head"]
    assert (record.scheme.name, record.group_size, record.bias) == ("w4a16", 128, False)
    assert (record.n, record.k) == (model.text.vocab, model.text.hidden)
    assert checkpoint.info["lm_head"] == {
        "scheme": "w4a16", "group_size": 128, "untied": model.text.tied_head,
    }  # fmt: skip
    assert checkpoint.tied == {}
    assert not checkpoint.has("lm_head.weight")
    embedding = f"{model.family.embed}.weight"
    wanted = model.module.get_submodule(model.family.embed).get_parameter("weight").numpy()
    assert np.array_equal(checkpoint.tensor(embedding).astype(np.float32), wanted)
    assert "lm_head" not in [row["pattern"] for row in checkpoint.info["skipped"]]
    assert model.family.text_shape(checkpoint.config).tied_head is False


def test_oracle_multiplies_by_the_codes_of_the_head(checkpoint: QuantCheckpoint) -> None:
    found = fake_quant_model(checkpoint)
    weight = found.module.get_submodule("lm_head").get_parameter("weight")
    embedding = found.module.get_submodule(found.family.embed).get_parameter("weight")
    wanted = dequantized(checkpoint.packed("lm_head")).astype(np.float32)
    assert np.array_equal(weight.numpy(), wanted)
    assert not torch.equal(weight, embedding)


def test_feedback_weighs_by_what_quantized_blocks_feed_the_head(
    model: LoadedModel, checkpoint: QuantCheckpoint
) -> None:
    rows = predicting_rows(fake_quant_model(checkpoint), list(samples(model).inputs))
    hessian = rows.T @ rows
    weight = model.module.get_submodule("lm_head").get_parameter("weight")
    wanted = round_linear(
        weight, hessian, factorise(hessian, damp=0.01), scheme=SCHEMES["w4a16"], group_size=128
    )
    found = dequantized(checkpoint.packed("lm_head"))
    share = float((found == dequantize(wanted.codes).numpy()).mean())
    blind = float(
        (
            found == dequantize(nearest(weight, scheme=SCHEMES["w4a16"], group_size=128)).numpy()
        ).mean()
    )
    assert share >= SAME_CODES > blind
    row = checkpoint.info["linears"][-1]
    assert row["rounding"] == wanted.rounding == "gptq"
    errors = row["feedback"]["weighted_error"]
    assert errors["kept"] == pytest.approx(wanted.kept, rel=1e-3)
    assert errors["nearest"] == pytest.approx(wanted.nearest, rel=1e-3)


def test_cost_is_that_of_the_head_alone_on_held_out_answers(
    model: LoadedModel, checkpoint: QuantCheckpoint
) -> None:
    rows = predicting_rows(model, list(samples(model).held_out)).double()
    weight = model.module.get_submodule("lm_head").get_parameter("weight").double()
    codes = torch.from_numpy(dequantized(checkpoint.packed("lm_head")))
    exact, moved = (log_softmax(rows @ each.T, -1) for each in (weight, codes))
    wanted = float(kl_div(moved, exact, log_target=True, reduction="none").sum(-1).mean())
    kl = checkpoint.info["linears"][-1]["kl"]
    assert kl["positions"] == len(rows) >= HELD_OUT
    assert kl["answers"] == pytest.approx(wanted, rel=1e-3)


def test_parts_of_a_large_head_make_the_same_whole(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, checkpoint: QuantCheckpoint, tmp_path: Path
) -> None:
    monkeypatch.setattr(rounding, "ROWS_AT_ONCE", 100)
    parts = quantized(model, tmp_path / "parts")
    whole, found = checkpoint.packed("lm_head"), parts.packed("lm_head")
    assert (whole.words == found.words).mean() >= SAME_CODES
    rows = torch.randn(7, model.text.hidden)
    weight = model.module.get_submodule("lm_head").get_parameter("weight")
    codes = nearest(weight, scheme=SCHEMES["w4a16"], group_size=128)
    small = divergence(rows, weight, codes)
    monkeypatch.undo()
    assert small == pytest.approx(divergence(rows, weight, codes), rel=FLOAT64_RELATIVE)


@pytest.mark.parametrize("kind", ["nearest", "clip"])
def test_nearest_rounding_reads_nothing(model: LoadedModel, tmp_path: Path, kind: str) -> None:
    found = quantized(model, tmp_path / "c", kind=kind)
    weight = model.module.get_submodule("lm_head").get_parameter("weight")
    wanted = dequantize(nearest(weight, scheme=SCHEMES["w4a16"], group_size=128)).numpy()
    assert np.array_equal(dequantized(found.packed("lm_head")), wanted)
    row = found.info["linears"][-1]
    assert "feedback" not in row
    assert row["kl"]["positions"] > 0


def test_cost_without_samples_is_told_as_unmeasured(
    model: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = quantized(model, tmp_path / "c", kind="nearest", samples=None)
    assert found.info["linears"][-1]["kl"]["answers"] is None
    assert "MBQ-W1121: --lm-head-bits 4" in caplog.text


def test_a_head_that_costs_too_much_is_told_with_the_flag(
    model: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    coarse = replace(model, module=model.module)  # same tensors, a format that nobody is offered
    bad = HeadFormat(scheme=SCHEMES["w3a16"], group_size=128)
    found = quantized(coarse, tmp_path / "c", kind="nearest", form=bad)
    cost = found.info["linears"][-1]["kl"]["answers"]
    told = "MBQ-W1120" in caplog.text
    assert told is (cost > rounding.LIMIT_NATS)
    assert told


@pytest.mark.parametrize("last", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_killed_run_goes_on_to_the_same_bytes(
    model: LoadedModel, checkpoint: QuantCheckpoint, tmp_path: Path, last: int
) -> None:
    def kill(done: int, total: int, _note: str = "") -> None:
        assert total == model.text.layers + 1
        if done == last:
            raise KilledError

    with State.open(tmp_path / "work", {}) as state, pytest.raises(KilledError):
        quantized(model, tmp_path / "out", state=state, progress=kill)
    with State.open(tmp_path / "work", {}) as state:
        quantized(model, tmp_path / "out", state=state)
    assert bytes_of(tmp_path / "out") == bytes_of(checkpoint.folder)


def test_source_is_the_same_whatever_the_head_becomes(
    model: LoadedModel, checkpoint: QuantCheckpoint, tmp_path: Path
) -> None:
    plain = quantize(
        model,
        scales(model, kind="nearest"),
        scheme=SCHEMES["w3a16"],
        group_size=64,
        out=tmp_path / "c",
    )
    assert plain.info["lm_head"] is None
    assert plain.info["model"]["source_sha256"] == checkpoint.info["model"]["source_sha256"]


def test_groups_of_a_head_are_the_largest_that_fit() -> None:
    sizes = {columns: head_format(4, columns) for columns in (256, 896, 192, 96)}
    assert [form and form.group_size for form in sizes.values()] == [128, 128, 64, 32]
    assert head_format(16, 100) is None
    with pytest.raises(UsageError, match="does not divide") as misfit:
        head_format(4, 100)
    with pytest.raises(UsageError, match="Unknown --lm-head-bits 3") as unknown:
        head_format(3, 128)
    assert (misfit.value.code, unknown.value.code) == ("E2004", "E2001")
