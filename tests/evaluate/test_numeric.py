"""The numeric tier on real graphs: good ones pass by far, planted faults fail and are named."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mbq_export.backends.torch import fake_quant_model
from mbq_export.bundle import Bundle
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.evaluate.comparison import weights_of
from mbq_export.evaluate.numeric import (
    FIRST_BAD_FILE,
    TAP_BUDGET_BYTES,
    Numeric,
    layer_chunks,
    run_numeric,
)
from mbq_export.evaluate.samples import parity_samples
from mbq_export.evaluate.sides import Oracle, Setup
from mbq_export.evaluate.taps import linear_values, role_of
from mbq_export.evaluate.tolerances import PARITY_FP32
from mbq_export.export.ops import linear_input
from mbq_export.families.inputs import ModelInputs
from mbq_export.quantize import quantize
from mbq_export.schemes import SCHEMES
from mbq_export.tensor_file import TensorFile
from tests.evaluate.bundles import tiny_bundle
from tests.evaluate.planted import (
    GRAPHS,
    Constants,
    planted,
    swapped_zero_points,
    transposed_group,
    wrong_scale,
)
from tests.questions import sample_model

NO_SCALES = ChannelScales(
    scales={}, sensitivity={}, calib={"switches": Switches(method="rtn").resolved()}
)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    folder = tiny_bundle().checkpoint_folder
    return Oracle(fake_quant_model(QuantCheckpoint.open(folder)))


@pytest.fixture(scope="module")
def samples(oracle: Oracle) -> list[ModelInputs]:
    return parity_samples(None, 3, oracle.model.processor)


def run(bundle: Bundle, oracle: Oracle, samples: list[ModelInputs], **setup: object) -> Numeric:
    tensors = setup.pop("tensors", None)
    return run_numeric(
        Setup(bundle=bundle, threads=1, **setup),
        oracle,
        samples,
        gates=PARITY_FP32,
        tensors=tensors,
    )


def failed(found: Numeric) -> set[str]:
    return {check.name for check in found.checks if not check.ok}


@pytest.mark.parametrize(
    "setup",
    [{"lowering": "qdq"}, {"lowering": "reference"}, {"backend": "torch"}],
    ids=["qdq", "reference", "torch"],
)
def test_a_good_bundle_is_within_every_gate_by_ten_times(
    oracle: Oracle, samples: list[ModelInputs], setup: dict[str, object]
) -> None:
    found = run(tiny_bundle(), oracle, samples, **setup)
    assert failed(found) == set()
    assert found.first_bad is None
    assert len(found.linears) == 2 * 7
    assert max(error.error for error in found.linears) < PARITY_FP32.linear_error / 10
    assert max(error.error for error in found.stream) < PARITY_FP32.relative_error / 10
    assert {error.modality for error in found.stream} == {"vision", "prompt", "answer"}


@dataclass(frozen=True)
class Fault:
    """One fault, and where it must be found."""

    plant: Callable[[str, int, int], dict[str, Callable[[Constants], None]]]
    lowering: str
    node: str
    row: int
    linear: str
    column: int

    def __str__(self) -> str:
        return f"{self.plant.__name__}-{self.lowering}"


FAULTS = (
    Fault(wrong_scale, "qdq", "layers.1.qkv_proj", 135, "self_attn.k_proj", 7),
    Fault(wrong_scale, "reference", "layers.0.gate_up_proj", 256, "mlp.up_proj", 0),
    Fault(swapped_zero_points, "qdq", "layers.0.down_proj", 90, "mlp.down_proj", 90),
    Fault(swapped_zero_points, "reference", "layers.1.qkv_proj", 135, "self_attn.k_proj", 7),
    Fault(transposed_group, "qdq", "layers.0.gate_up_proj", 256, "mlp.up_proj", 0),
    Fault(transposed_group, "reference", "layers.0.down_proj", 90, "mlp.down_proj", 90),
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_fails_and_names_layer_linear_and_column(
    tmp_path: Path, oracle: Oracle, samples: list[ModelInputs], fault: Fault
) -> None:
    change = fault.plant(fault.node, fault.row, 1)[fault.lowering]
    bad = planted(tiny_bundle(), tmp_path / "bad", file=GRAPHS[fault.lowering], change=change)
    found = run(bad, oracle, samples, lowering=fault.lowering)
    assert "parity.linear" in failed(found)
    assert found.first_bad is not None
    layer = int(fault.node.split(".")[1])
    assert (found.first_bad.layer, found.first_bad.op) == (layer, fault.linear)
    wrong = {(e.layer, e.linear) for e in found.linears if e.error > PARITY_FP32.linear_error}
    assert wrong == {(layer, fault.linear)}, "nothing else is blamed, not even behind the fault"
    if fault.plant is not transposed_group:
        assert found.first_bad.column == fault.column


@pytest.mark.slow
def test_every_scale_and_zero_point_of_the_sample_model_would_be_noticed(tmp_path: Path) -> None:
    """What one wrong scale or zero point adds to its column, for each of the 29,440 of them."""
    checkpoint = quantize(
        sample_model(), NO_SCALES, scheme=SCHEMES["w3a16"], group_size=128, out=tmp_path / "weights"
    )
    oracle = Oracle(fake_quant_model(checkpoint))
    family = oracle.model.family
    samples = parity_samples(None, 8, oracle.model.processor)
    least: dict[str, list[float]] = {"scale": [], "zero": []}
    for layer in range(oracle.model.text.layers):
        runs = [oracle.values(sample, linear_values(layer, family.linears)) for sample in samples]
        for linear in family.linears:
            module = family.linear_path(layer, linear)
            read = linear_input(layer, role_of(linear))
            x = np.concatenate([values[read] for values in runs]).astype(np.float64)
            for name, signal in signals(checkpoint, module, x).items():
                least[name].append(signal)
    assert min(least["scale"]) > 500 * PARITY_FP32.linear_error
    assert min(least["zero"]) > 1000 * PARITY_FP32.linear_error


def signals(checkpoint: QuantCheckpoint, module: str, x: np.ndarray) -> dict[str, float]:
    """The least that any scale off by a tenth, or any zero point off by one, changes its column."""
    weights, bias = weights_of(checkpoint, module)
    packed = checkpoint.packed(module)
    exact = x @ weights.T + (0 if bias is None else bias)
    size = np.maximum(np.sqrt(x**2 @ (weights**2).T), abs(exact))
    if bias is not None:
        size = np.maximum(size, abs(bias.astype(np.float64)))
    found: dict[str, list[float]] = {"scale": [], "zero": []}
    for group in range(packed.groups):
        columns = np.s_[group * packed.group_size : (group + 1) * packed.group_size]
        scaled = 0.1 * abs(x[:, columns] @ weights[:, columns].T)
        moved = abs(x[:, columns].sum(1))[:, None] * packed.scales[:, group].astype(np.float64)
        found["scale"].append(float((scaled / size).max(axis=0).min()))
        found["zero"].append(float((moved / size).max(axis=0).min()))
    return {name: min(values) for name, values in found.items()}


def norm_weight(constants: Constants) -> None:
    constants["layers.1.post_attention_layernorm.weight"][3] *= 1.05


def rotation(constants: Constants) -> None:
    constants["rope.cos"][85:] *= -1


def head(constants: Constants) -> None:
    constants["lm_head.weight"][5] *= 1.01


def last_norm(constants: Constants) -> None:
    constants["norm.weight"][5] *= 1.01


@pytest.mark.parametrize(
    ("change", "layer", "op"),
    [
        (norm_weight, 1, "post_attention_layernorm"),
        (rotation, 0, "attention"),
        (last_norm, None, "norm"),
        (head, None, "lm_head"),
    ],
)
def test_a_fault_outside_the_linears_names_the_operation(
    tmp_path: Path,
    oracle: Oracle,
    samples: list[ModelInputs],
    change: Callable[[Constants], None],
    layer: int | None,
    op: str,
) -> None:
    bad = planted(tiny_bundle(), tmp_path / "bad", file=GRAPHS["qdq"], change=change)
    found = run(bad, oracle, samples)
    assert failed(found)
    assert "parity.linear" not in failed(found)
    assert found.first_bad is not None
    assert (found.first_bad.layer, found.first_bad.op) == (layer, op)


def test_a_fault_in_the_vision_graph_is_found_at_vision_positions_alone(
    tmp_path: Path, oracle: Oracle, samples: list[ModelInputs]
) -> None:
    def change(constants: Constants) -> None:
        name = max(constants, key=lambda each: constants[each].size)
        constants[name].reshape(-1)[:7] += 0.5

    bad = planted(tiny_bundle(), tmp_path / "bad", file="vision_encoder.onnx", change=change)
    found = run(bad, oracle, samples)
    assert found.first_bad is not None
    assert (found.first_bad.layer, found.first_bad.op) == (None, "vision_encoder")
    assert found.first_bad.modality == "vision"


def test_int8_activations_of_the_fast_mode_are_not_taken_for_parity(
    oracle: Oracle, samples: list[ModelInputs]
) -> None:
    found = run(tiny_bundle(), oracle, samples, accuracy_level=4)
    assert "parity.linear" in failed(found)


def test_tensors_of_the_first_bad_block_are_kept(
    tmp_path: Path, oracle: Oracle, samples: list[ModelInputs]
) -> None:
    change = wrong_scale("layers.1.o_proj", 3, 0)["qdq"]
    bad = planted(tiny_bundle(), tmp_path / "bad", file=GRAPHS["qdq"], change=change)
    found = run(bad, oracle, samples, tensors=tmp_path / "kept")
    kept = TensorFile(tmp_path / "kept" / FIRST_BAD_FILE)
    reference, tested = (
        kept.array(f"{side}.layers.1.o_proj.out") for side in ("reference", "tested")
    )
    columns = np.flatnonzero(abs(reference - tested).max(axis=0) > 1e-3 * abs(reference).max())
    assert columns.tolist() == [3]
    assert found.first_bad is not None
    assert set(found.first_bad.statistics) == {"reference", "tested"}


def test_blocks_are_tapped_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, oracle: Oracle, samples: list[ModelInputs]
) -> None:
    together = run(tiny_bundle(), oracle, samples)
    monkeypatch.setattr("mbq_export.evaluate.numeric.TAP_BUDGET_BYTES", 1)
    assert layer_chunks(oracle.model.text, rows=100) == [range(1), range(1, 2)]
    apart = run(tiny_bundle(), oracle, samples)
    for one, other in zip(together.linears, apart.linears, strict=True):
        assert (one.layer, one.linear) == (other.layer, other.linear)
    assert together.stream == apart.stream


def test_all_blocks_fit_at_once_where_they_are_small(oracle: Oracle) -> None:
    assert TAP_BUDGET_BYTES > 1 << 20
    assert layer_chunks(oracle.model.text, rows=100) == [range(2)]
