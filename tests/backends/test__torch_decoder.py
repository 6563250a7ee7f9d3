"""The packed checkpoint on the kernels answers as the model's own code does on dequantized weights."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mbq_export.backends._torch_decoder import (
    device_of,
    dtype_on,
    load_decoder,
    open_kernel_decoder,
)
from mbq_export.backends.torch import TorchEngine, fake_quant_model, kernel_engines
from mbq_export.calibrate.shapes import evaluation_scenes
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import FormatError, InternalError, MachineError, UsageError
from mbq_export.evaluate.tolerances import PARITY_ROUNDED
from mbq_export.families.inputs import ModelInputs
from mbq_export.runtime import open_session
from mbq_export.runtime.request import Engines, Prepared
from mbq_export.runtime.sampling import Options
from mbq_export.runtime.session import Session
from mbq_export.schemes.base import CHANNEL
from mbq_kernels.decoder_weights import DenseWeight
from mbq_kernels.weights import DeviceWeight
from tests.evaluate.bundles import sample_bundle
from tests.tiny import Tiny, load_tiny, tiny_checkpoint

FEW, ALL = 4, 20
"""Prompts of the sample model: what the fast tests take, and how many there are."""
SEED = 13
NEW_TOKENS = 12
CPU = torch.device("cpu")
FIRST = np.array([1])
FLOAT32_RELATIVE = 1e-5
"""Two orders of summation in float32 through two blocks."""


@cache
def checkpoint() -> QuantCheckpoint:
    return QuantCheckpoint.open(sample_bundle().checkpoint_folder)


@cache
def questions() -> tuple[ModelInputs, ...]:
    """Of every kind in turn, about scenes that nobody trained on."""
    processor = fake_quant_model(checkpoint()).processor
    asked = []
    for index, scene in enumerate(evaluation_scenes(ALL, seed=SEED)):
        question = scene.questions[index % len(scene.questions)]
        asked.append(processor.inputs(question.text, [Image.fromarray(scene.image)]))
    return tuple(asked)


@cache
def expected(count: int) -> list[list[int]]:
    """What transformers itself generates from the oracle's weights."""
    model = fake_quant_model(checkpoint())
    ends = sorted(model.processor.eos_ids)
    found = []
    for asked in questions()[:count]:
        with torch.no_grad():
            ids = model.module.generate(
                **asked.tensors(),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=ends[0],
            )
        found.append(ids[0, len(asked.input_ids) :].tolist())
    return found


def answers(session: Session, count: int) -> list[list[int]]:
    options = Options(max_new_tokens=NEW_TOKENS)
    return [
        list(session.generate(Prepared(inputs=asked), options=options).ids)
        for asked in questions()[:count]
    ]


def tiny(folder: Path, **changes: object) -> QuantCheckpoint:
    return tiny_checkpoint(folder / "c", load_tiny(folder / "model", Tiny()), **changes)  # type: ignore[arg-type]


def engine(found: QuantCheckpoint, slots: int = 32) -> TorchEngine:
    return open_kernel_decoder(found, device=CPU, dtype=torch.float32, slots=slots)


@pytest.mark.parametrize("count", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])
def test_tokens_of_the_sample_model_are_the_oracle_s(count: int) -> None:
    with open_session(sample_bundle(), backend="torch:cpu") as session:
        assert answers(session, count) == expected(count)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tokens_stay_the_oracle_s_in_half_precision(dtype: torch.dtype) -> None:
    """What a GPU computes in, on the host."""
    with open_session(sample_bundle(), backend="torch:cpu") as session:
        model = session.model
        halves = open_kernel_decoder(checkpoint(), device=CPU, dtype=dtype, slots=model.limit)
        engines = Engines(vision=model.engines.vision, embed=model.engines.embed, decoder=halves)
        assert answers(Session(replace(model, engines=engines)), ALL) == expected(ALL)


@pytest.mark.gpu
def test_tokens_of_the_sample_model_are_the_oracle_s_on_a_gpu() -> None:
    with open_session(sample_bundle(), backend="torch:cuda") as session:
        assert session.name == "torch:cuda"
        assert answers(session, ALL) == expected(ALL)
        assert answers(session, ALL) == expected(ALL), "with the graph that the first round left"


@pytest.mark.parametrize(("scheme", "group_size"), [("w3a16", 32), ("w4a16", 128)])
def test_logits_are_the_oracle_s_in_every_format(
    tmp_path: Path, scheme: str, group_size: int
) -> None:
    found = tiny(tmp_path, scheme=scheme, group_size=group_size)
    assert logits_error(found) <= FLOAT32_RELATIVE


@pytest.mark.parametrize("group_size", [CHANNEL, 128])
def test_logits_with_rounded_activations_are_within_what_a_flipped_code_may_do(
    tmp_path: Path, group_size: int
) -> None:
    found = tiny(tmp_path, scheme="w4a8", group_size=group_size)
    assert logits_error(found) <= (PARITY_ROUNDED["fp32"].relative_error or 0)


@pytest.mark.parametrize(("bits", "kind"), [(4, DeviceWeight), (8, DenseWeight)])
def test_a_head_of_codes_is_multiplied_from_tiles_where_there_are_any(
    tmp_path: Path, bits: int, kind: type
) -> None:
    found = tiny(tmp_path, head_bits=bits)
    assert logits_error(found) <= FLOAT32_RELATIVE
    decoder = load_decoder(found, device=CPU, dtype=torch.float32, slots=32)
    assert isinstance(decoder.weights.head, kind)


def logits_error(found: QuantCheckpoint) -> float:
    """Relative distance of the last logits of 20 tokens to the oracle's."""
    model = fake_quant_model(found)
    ids = torch.arange(4, 24)
    with torch.no_grad():
        wanted = model.module(input_ids=ids[None], use_cache=False).logits[0, -1].numpy()
        embeds = model.module.get_submodule(model.family.embed)(ids[None]).numpy()
    feeds = {"inputs_embeds": embeds, "position_ids": np.arange(20)[None], "sequence": FIRST}
    logits = engine(found).run(feeds)["logits"][0, 0]
    return float(np.linalg.norm(logits - wanted) / np.linalg.norm(wanted))


def test_linears_that_share_their_input_are_one(tmp_path: Path) -> None:
    decoder = load_decoder(tiny(tmp_path), device=CPU, dtype=torch.float32, slots=32)
    for block in decoder.weights.blocks:
        assert [weight.n for weight in block.qkv if isinstance(weight, DeviceWeight)] == [256]
        assert [weight.n for weight in block.gate_up if isinstance(weight, DeviceWeight)] == [512]
    assert isinstance(decoder.weights.head, DenseWeight)


def test_linears_that_are_not_quantized_stay_plain(tmp_path: Path) -> None:
    found = tiny(tmp_path, scheme=None)
    decoder = load_decoder(found, device=CPU, dtype=torch.float32, slots=32)
    plain = [isinstance(w, DenseWeight) for block in decoder.weights.blocks for w in block.linears]
    assert plain == [True] * 14


def test_calls_read_one_sequence_without_gaps(tmp_path: Path) -> None:
    decoder = engine(tiny(tmp_path))

    def read(start: int, count: int, sequence: int = 1) -> np.ndarray:
        rows = np.random.default_rng(start).standard_normal((1, count, 128)).astype(np.float32)
        feeds = {
            "inputs_embeds": rows,
            "position_ids": np.arange(start, start + count)[None],
            "sequence": np.array([sequence]),
        }
        return decoder.run(feeds)["logits"]

    first = read(0, 5)
    assert first.shape == (1, 1, 64)
    with pytest.raises(InternalError, match=r"its cache holds 5"):
        read(4, 1)
    with pytest.raises(InternalError, match=r"of sequence 2 from 5 on"):
        read(5, 1, sequence=2)
    read(5, 1)
    np.testing.assert_array_equal(read(0, 5), first)


def test_a_cache_that_is_full_is_refused(tmp_path: Path) -> None:
    decoder = engine(tiny(tmp_path), slots=64)
    with pytest.raises(UsageError) as caught:
        decoder.run(
            {
                "inputs_embeds": np.zeros((1, 65, 128), np.float32),
                "position_ids": np.arange(65)[None],
                "sequence": FIRST,
            }
        )
    assert caught.value.code == "E2009"


@pytest.mark.parametrize(
    "change", [{"rope": "mrope"}, {"qk_norm": True}, {"activation": "gelu"}], ids=str
)
def test_other_kinds_of_decoders_are_refused(
    tmp_path: Path, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tiny(tmp_path)
    families = "mbq_export.backends._torch_decoder.FAMILIES"
    family = fake_quant_model(found).family
    # No family of another kind exists yet: this one with another shape.
    other = replace(family, text_shape=lambda config: replace(family.text_shape(config), **change))
    monkeypatch.setattr(families, {family.name: other})
    with pytest.raises(FormatError, match="--backend oracle") as caught:
        engine(found)
    assert caught.value.code == "E4005"


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == CPU
    with pytest.raises(MachineError) as caught:
        device_of("cuda")
    assert caught.value.code == "E3001"


def test_a_gpu_computes_in_the_half_that_the_model_was_trained_in() -> None:
    found = checkpoint()
    assert dtype_on(CPU, found) == torch.float32
    assert dtype_on(torch.device("cuda"), found) == torch.float16
    trained = replace(found, config={**found.config, "dtype": "bfloat16"})
    assert dtype_on(torch.device("cuda"), trained) == torch.bfloat16


def test_only_the_decoder_is_packed(tmp_path: Path) -> None:
    found = kernel_engines(tiny(tmp_path), device="cpu", slots=32)
    assert found.device == "cpu"
    ids = np.array([[4, 9]])
    wanted = fake_quant_model(QuantCheckpoint.open(tmp_path / "c"))
    table = wanted.module.get_submodule(wanted.family.embed)
    embeds = found.embed.run({"input_ids": ids})["inputs_embeds"]
    np.testing.assert_array_equal(embeds, table(torch.from_numpy(ids)).numpy())
