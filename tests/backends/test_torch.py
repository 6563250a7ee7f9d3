"""The oracle is what the checkpoint says, and its engines are the model behind the ports of the graphs."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mbq_export.backends._torch_int8 import Int8Linear
from mbq_export.backends.torch import (
    BACKEND,
    TorchEngine,
    decoder_engine,
    embed_engine,
    fake_quant_model,
    vision_engine,
)
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import FormatError
from mbq_export.export import ops
from mbq_export.families.base import LoadedModel
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL
from mbq_export.schemes.integers import integer_linear
from tests.schemes.integer_weights import weight_of
from tests.tiny import Tiny, load_tiny, tiny_checkpoint

LINEAR_RELATIVE = 2e-6
"""A dot product of 256 float32 terms against float64: some tens of roundings of 6e-8, averaged."""
CACHED_RELATIVE = 1e-5
"""Two orders of summation of the same attention in float32, through two blocks."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> QuantCheckpoint:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_checkpoint(folder / "w3", load_tiny(folder / "model"))


@pytest.fixture(scope="module")
def oracle(checkpoint: QuantCheckpoint) -> LoadedModel:
    return fake_quant_model(checkpoint)


def relative(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(
    ("scheme", "group_size"),
    [
        ("w3a16", 64),
        ("w4a16", 64),
        ("w4a8", CHANNEL),
        ("w4a8", 128),
        ("w8a8", CHANNEL),
        ("w8a16", CHANNEL),
        ("w4a4", CHANNEL),
        ("w6a6", CHANNEL),
        ("w2a16", 64),
    ],
)
def test_every_linear_equals_the_scheme_s_reference(
    tmp_path: Path, scheme: str, group_size: int
) -> None:
    model = load_tiny(tmp_path / "model")
    found = tiny_checkpoint(tmp_path / "c", model, scheme=scheme, group_size=group_size)
    model = fake_quant_model(found)
    rng = np.random.default_rng(0)
    assert len(found.linears) == 14
    for name in found.linears:
        packed = found.packed(name)
        x = rng.standard_normal((5, packed.k)).astype(np.float32)
        with torch.no_grad():
            y = model.module.get_submodule(name)(torch.from_numpy(x)).numpy()
        wanted = SCHEMES[scheme].linear_reference(x, packed)
        assert relative(y, wanted) <= LINEAR_RELATIVE, name


@pytest.mark.parametrize(
    ("scheme", "group_size"),
    [("w4a8", CHANNEL), ("w4a8", 128), ("w8a8", CHANNEL), ("w4a4", CHANNEL), ("w6a6", CHANNEL)],
)
def test_linears_that_round_activations_equal_the_oracle_to_the_bit(
    tmp_path: Path, scheme: str, group_size: int
) -> None:
    """In groups too: both add float64 numbers that need 53 bits at most, so no order of adding them matters."""
    model = load_tiny(tmp_path / "model")
    found = tiny_checkpoint(tmp_path / "c", model, scheme=scheme, group_size=group_size)
    oracle = fake_quant_model(found)
    bits = SCHEMES[scheme].act_bits
    rng = np.random.default_rng(3)
    for name in found.linears[:4]:
        packed = found.packed(name)
        x = rng.standard_normal((2, 9, packed.k)).astype(np.float32)
        x[0, 1], x[0, 2] = 0, x[0, 2] * 1e4
        x[1, 3, 5] = 1e4
        with torch.no_grad():
            y = oracle.module.get_submodule(name)(torch.from_numpy(x)).numpy()
        assert y.shape == (2, 9, packed.n)
        flat = integer_linear(x.reshape(-1, packed.k), packed, act_bits=bits)
        np.testing.assert_array_equal(y.reshape(-1, packed.n), flat)
    assert not any(parameter.requires_grad for parameter in oracle.module.parameters())


def test_wide_rows_are_summed_where_sums_are_exact() -> None:
    """The largest sums there are, beyond what float32 counts to."""
    columns = 33_024
    q = np.full((16, columns), -8)
    weight = weight_of(q)
    x = np.full((1, columns), 3.0, np.float32)
    x[0, 0] = 1.0  # an odd sum
    found = Int8Linear(weight)(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(found, integer_linear(x, weight))


def test_weights_are_exactly_code_minus_zero_times_scale(
    checkpoint: QuantCheckpoint, oracle: LoadedModel
) -> None:
    for name in checkpoint.linears:
        packed = checkpoint.packed(name)
        identity = np.eye(packed.k, dtype=np.float32)
        exact = SCHEMES["w3a16"].linear_reference(identity, packed).T
        exact -= 0 if packed.bias is None else packed.bias.astype(np.float64)[:, None]
        stored = oracle.module.get_parameter(f"{name}.weight").numpy().astype(np.float64)
        np.testing.assert_allclose(stored, exact, rtol=0, atol=1e-15)


def test_untouched_tensors_are_the_stored_ones(
    checkpoint: QuantCheckpoint, oracle: LoadedModel
) -> None:
    for name in checkpoint.tensors:
        found = oracle.module.get_parameter(name).numpy()
        np.testing.assert_array_equal(found, checkpoint.tensor(name).astype(np.float32))
    assert oracle.module.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in oracle.module.parameters())
    embedding = oracle.module.get_submodule(oracle.family.embed).weight
    assert oracle.module.get_submodule(oracle.family.head).weight is embedding


def test_baseline_is_the_model_it_came_from_but_for_folding(tmp_path: Path) -> None:
    model = load_tiny(tmp_path / "model", Tiny(tied=False, dtype="bfloat16"))
    baseline = fake_quant_model(tiny_checkpoint(tmp_path / "none", model, scheme=None))
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        found, wanted = baseline.module(input_ids=ids).logits, model.module(input_ids=ids).logits
    assert relative(found.numpy(), wanted.numpy()) <= CACHED_RELATIVE


def test_blocks_stay_unloaded_when_asked(checkpoint: QuantCheckpoint, oracle: LoadedModel) -> None:
    # As the full-precision model, so that evaluation can stream the oracle too.
    name = checkpoint.linears[3]
    streamed = oracle.family.load(checkpoint.folder, weights=oracle.weights, meta_blocks=True)
    assert streamed.module.get_parameter(f"{name}.weight").is_meta
    read = streamed.weights.read(f"{name}.weight")
    torch.testing.assert_close(read, oracle.module.get_parameter(f"{name}.weight"), rtol=0, atol=0)
    assert streamed.weights.read(f"{name}.weight", dtype=torch.float16).dtype == torch.float16


def test_missing_tensor_of_the_model_is_named(oracle: LoadedModel, tmp_path: Path) -> None:
    other = load_tiny(tmp_path / "model", Tiny(layers=3))
    with pytest.raises(FormatError, match=r"layers\.2") as caught:
        other.family.load(other.folder, weights=oracle.weights)
    assert caught.value.code == "E4103"


def embeddings(oracle: LoadedModel, ids: NDArray[np.int64]) -> NDArray[Any]:
    return embed_engine(oracle).run({"input_ids": ids})["inputs_embeds"]


def feeds(
    embeds: NDArray[Any], past: dict[str, NDArray[Any]] | None = None, *, pads: int = 0
) -> dict[str, NDArray[Any]]:
    """One call over new positions: ``pads`` positions on the left of row 0 are padding."""
    batch, count = embeds.shape[:2]
    names = [f"{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    empty = np.zeros((batch, 2, 0, 32), np.float32)
    start = past["present.0.key"].shape[2] if past else 0
    mask = np.ones((batch, start + count), np.int64)
    mask[0, :pads] = 0
    return {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clip(0)[:, start:],
        **{f"past_key_values.{n}": past[f"present.{n}"] if past else empty for n in names},
    }


def test_ports_are_those_of_the_graphs(oracle: LoadedModel) -> None:
    decoder, embed, vision = decoder_engine(oracle), embed_engine(oracle), vision_engine(oracle)
    caches = [(layer, part) for layer in (0, 1) for part in ("key", "value")]
    assert [spec.name for spec in decoder.inputs] == [
        ops.INPUTS_EMBEDS, ops.ATTENTION_MASK, ops.POSITION_IDS,
        *(ops.past_key_value(*cache) for cache in caches),
    ]  # fmt: skip
    assert [spec.name for spec in decoder.outputs] == [
        ops.LOGITS, *(ops.present_key_value(*cache) for cache in caches),
    ]  # fmt: skip
    assert [spec.name for spec in embed.inputs + embed.outputs] == [
        ops.INPUT_IDS, ops.INPUTS_EMBEDS,
    ]  # fmt: skip
    assert [spec.name for spec in vision.inputs + vision.outputs] == [
        ops.PIXEL_VALUES, ops.IMAGE_FEATURES,
    ]  # fmt: skip
    symbols = {ops.BATCH, ops.SEQUENCE, ops.PAST, ops.TOTAL, ops.TILES}
    specs = (*decoder.inputs, *decoder.outputs, *embed.inputs, *vision.inputs, *vision.outputs)
    assert {size for spec in specs for size in spec.shape if isinstance(size, str)} == symbols


@pytest.mark.parametrize("part", [decoder_engine, embed_engine, vision_engine])
def test_outputs_have_the_shapes_they_promise(oracle: LoadedModel, part: Any) -> None:
    engine: TorchEngine = part(oracle)
    sizes = {
        "batch_size": 2, "sequence_length": 3, "past_sequence_length": 4,
        "total_sequence_length": 7, "num_tiles": 5,
    }  # fmt: skip
    arrays = {
        spec.name: np.ones([sizes.get(str(size), size) for size in spec.shape], spec.dtype)
        for spec in engine.inputs
    }
    for spec in engine.outputs:
        found = engine.run(arrays)[spec.name]
        assert found.dtype == spec.dtype
        assert found.shape == tuple(sizes.get(str(size), size) for size in spec.shape)


def test_decoder_gives_the_logits_of_the_whole_model(oracle: LoadedModel) -> None:
    ids = np.arange(4, 24).reshape(2, 10)
    found = decoder_engine(oracle).run(feeds(embeddings(oracle, ids)))["logits"]
    with torch.no_grad():
        wanted = oracle.module(input_ids=torch.from_numpy(ids)).logits.numpy()
    assert relative(found, wanted) <= CACHED_RELATIVE


@pytest.mark.parametrize("pieces", [(1,) * 10, (6, 1, 1, 1, 1), (3, 7), (1, 9)])
def test_cached_decoding_equals_one_call(oracle: LoadedModel, pieces: tuple[int, ...]) -> None:
    decoder = decoder_engine(oracle)
    embeds = embeddings(oracle, np.arange(4, 24).reshape(2, 10))
    whole = decoder.run(feeds(embeds))
    past, parts, start = None, [], 0
    for count in pieces:
        past = decoder.run(feeds(embeds[:, start : start + count], past))
        parts.append(past["logits"])
        start += count
    assert past is not None
    assert relative(np.concatenate(parts, axis=1), whole["logits"]) <= CACHED_RELATIVE
    for name in ("present.0.key", "present.1.value"):
        assert relative(past[name], whole[name]) <= CACHED_RELATIVE


def test_padding_on_the_left_changes_nothing_for_real_positions(oracle: LoadedModel) -> None:
    decoder = decoder_engine(oracle)
    embeds = embeddings(oracle, np.arange(4, 24).reshape(2, 10))
    padded = decoder.run(feeds(embeds, pads=3))["logits"]
    alone = decoder.run(feeds(embeds[:1, 3:]))["logits"]
    assert relative(padded[:1, 3:], alone) <= CACHED_RELATIVE
    assert np.isfinite(padded).all()


def test_caller_s_arrays_stay_as_they_are(oracle: LoadedModel) -> None:
    decoder = decoder_engine(oracle)
    embeds = embeddings(oracle, np.arange(4, 10)[None])
    past = decoder.run(feeds(embeds[:, :3]))
    given = feeds(embeds[:, 3:], past)
    copies = {name: array.copy() for name, array in given.items()}
    for array in given.values():
        array.setflags(write=False)
    decoder.run(given)
    for name, array in given.items():
        np.testing.assert_array_equal(array, copies[name])


def test_vision_engine_is_tower_and_projector(oracle: LoadedModel) -> None:
    pixels = np.random.default_rng(0).standard_normal((2, 3, 48, 48)).astype(np.float32)
    found = vision_engine(oracle).run({"pixel_values": pixels})["image_features"]
    with torch.no_grad():
        wanted = oracle.family.vision_module(oracle)(torch.from_numpy(pixels)).numpy()
    np.testing.assert_array_equal(found, wanted)


def test_wrong_feeds_are_refused(oracle: LoadedModel) -> None:
    decoder = decoder_engine(oracle)
    given = feeds(embeddings(oracle, np.arange(4, 10)[None]))
    del given["position_ids"]
    with pytest.raises(FormatError, match="Input position_ids of decoder is missing") as caught:
        decoder.run(given)
    assert caught.value.code == "E4102"


def test_closed_engine_refuses_to_run_and_closes_twice(oracle: LoadedModel) -> None:
    with embed_engine(oracle) as engine:
        engine.run({"input_ids": np.ones((1, 1), np.int64)})
    engine.close()
    with pytest.raises(ValueError, match="embed_tokens is closed"):
        engine.run({"input_ids": np.ones((1, 1), np.int64)})


def test_backend_opens_a_checkpoint_folder(checkpoint: QuantCheckpoint) -> None:
    assert BACKEND.name == "torch"
    assert BACKEND.available().ok
    assert "transformers" in BACKEND.available().found
    with BACKEND.open(checkpoint.folder) as engine:
        assert engine.outputs[0].name == "logits"


def test_registry_can_import_it_without_its_libraries() -> None:
    code = (
        "import sys, mbq_export.backends.torch;"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
